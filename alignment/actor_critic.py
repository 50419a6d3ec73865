"""Policy and value model as one module, so that one engine (DDP or DeepSpeed) trains both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignment.distributed import device, frozen_engine, gathered, sharded_weights, uses_deepspeed, whole_weights
from alignment.objectives import token_statistics
from alignment.policy import add_lora, disable_dropout, load_model
from alignment.recipe import PpoRecipe
from reward.dtype import torch_dtype

VALUE_ADAPTER = "value"
"""Name of the value model's adapter, beside the policy's own (`default`)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts padded on the left, completions on the right: `input_ids` is `(batch, prompt_length + length)`."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    """`(batch, length)`: True for the tokens of the completion, end token included."""

    @property
    def position_ids(self) -> Tensor:
        return (self.attention_mask.cumsum(dim=1) - 1).clamp_min(0)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        pad_token_id: int,
        device: torch.device | str = "cpu",
    ) -> Batch:
        prompt_length = max(len(ids) for ids in prompts)
        length = max(len(ids) for ids in completions)
        input_ids = torch.full((len(prompts), prompt_length + length), pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = prompt_length - len(prompt), prompt_length + len(completion)
            input_ids[row, start:end] = torch.tensor([*prompt, *completion], dtype=torch.long)
            attention_mask[row, start:end] = 1
        completion_mask = attention_mask[:, prompt_length:].bool()
        return cls(input_ids.to(device), attention_mask.to(device), completion_mask.to(device))


class TokenOutputs(NamedTuple):  # a tuple, so that ZeRO-3 finds the tensors in it
    """Per completion token, `(batch, length)`; zero where padding. `values` is None for the reference.

    `mix_logprobs`: of the pretraining mix that was given along, whose shape they have, at temperature 1.
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    mix_logprobs: Tensor | None = None


class ActorCritic(nn.Module):
    """`policy` with a value head on its trunk (`value_model` None) or with a separate value model.

    A policy that has the adapter `VALUE_ADAPTER` gives its trunk with that one to the value head. Log-probabilities are
    those of the distribution that was sampled from: logits over `temperature`.
    """

    is_gradient_checkpointing = False  # read by TRL when it unwraps the engine for generation

    def __init__(self, policy: Any, *, value_model: Any | None, temperature: float) -> None:
        super().__init__()
        self.config = policy.config
        self.policy = policy
        self.value_model = value_model
        self.temperature = temperature
        if value_model is None:
            self.value_head = nn.Linear(policy.config.hidden_size, 1, bias=False, dtype=policy.dtype)
            nn.init.zeros_(self.value_head.weight)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.policy, "disable_adapter")

    @property
    def has_value_adapter(self) -> bool:
        return self.has_adapter and VALUE_ADAPTER in self.policy.peft_config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        length: int,
        *,
        reference: bool = False,
        mix: Batch | None = None,
    ) -> TokenOutputs:
        """Statistics of the last `length` tokens; with `reference` the adapter is off and no values are computed.

        `mix`: more texts, for the same backward pass, of which the policy's log-probabilities are wanted.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        captured: list[Tensor] = []
        causal = self.policy.get_base_model() if self.has_adapter else self.policy
        hook = causal.base_model.register_forward_hook(lambda _m, _i, out: captured.append(out.last_hidden_state))
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            if reference:
                stack.enter_context(adapter_switched(self.policy, None))
            logits = self.policy(**inputs, use_cache=False, logits_to_keep=length + 1).logits
        statistics = token_statistics(logits[:, :-1] / self.temperature, input_ids[:, -length:])
        values = None if reference else self._values(inputs, captured[0], length)
        mix_logprobs = None if mix is None else self._mix_logprobs(mix)
        return TokenOutputs(statistics.logprobs, statistics.entropies, values, mix_logprobs)

    def _values(self, inputs: dict[str, Tensor], trunk: Tensor, length: int) -> Tensor:
        """V of the state before each completion token: read at the token in front of it."""
        if self.has_value_adapter:
            with adapter_switched(self.policy, VALUE_ADAPTER):
                hidden = self.policy.get_base_model().base_model(**inputs, use_cache=False).last_hidden_state
            head = self.value_head
        elif self.value_model is None:
            hidden, head = trunk, self.value_head
        else:
            classifier = (
                self.value_model.get_base_model() if hasattr(self.value_model, "peft_config") else self.value_model
            )
            hidden = classifier.base_model(**inputs, use_cache=False).last_hidden_state
            head = classifier.score
        return head(hidden[:, -length - 1 : -1]).squeeze(-1).float()

    def _mix_logprobs(self, mix: Batch) -> Tensor:
        length = mix.completion_mask.shape[1]
        inputs = {"input_ids": mix.input_ids, "attention_mask": mix.attention_mask, "position_ids": mix.position_ids}
        logits = self.policy(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.float().mT, mix.input_ids[:, -length:], reduction="none")
        return -losses


@contextlib.contextmanager
def adapter_switched(policy: Any, name: str | None) -> Generator[None]:
    """Inside, another adapter of a peft model works (None: none of them); which parameters train stays as it was.

    peft freezes the adapters that do not work. An engine that has wrapped the model must not find them so afterwards.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    before = policy.active_adapter
    try:
        if name is None:
            with policy.disable_adapter():
                yield
        else:
            policy.set_adapter(name)
            yield
    finally:
        policy.set_adapter(before)
        for parameter in trained:
            parameter.requires_grad_(True)


def is_of_value_model(name: str) -> bool:
    """Whether a parameter of the actor-critic, by its name, belongs to the value model alone."""
    return not name.startswith("policy.") or f".{VALUE_ADAPTER}." in name


def load_actor_critic(recipe: PpoRecipe, *, pad_token_id: int) -> ActorCritic:
    """Policy and value model of a recipe; the value model starts from a reward model when the recipe names one."""
    policy = load_model(recipe.model, init=recipe.model_init, pad_token_id=pad_token_id)
    value_model = None
    if recipe.ppo.value_trunk == "separate":
        value_model = load_model(
            recipe.value_model or recipe.model,
            init=recipe.model_init,
            head="sequence_classification",
            pad_token_id=pad_token_id,
        )
        if recipe.value_model is None:
            with gathered(value_model.score.parameters()):
                nn.init.zeros_(value_model.score.weight)
    if recipe.lora is not None:
        policy = add_lora(policy, recipe.lora, head="causal_lm")
        if value_model is not None:
            value_model = add_lora(value_model, recipe.lora, head="sequence_classification")
        if recipe.ppo.value_trunk == "adapter":
            _add_value_adapter(policy)
    for model in (policy, value_model):
        if model is not None:
            disable_dropout(model)
            if recipe.ppo.gradient_checkpointing:
                _checkpoint_gradients(model)
    return ActorCritic(policy, value_model=value_model, temperature=recipe.sampling.temperature)


def _add_value_adapter(policy: Any) -> None:
    """A second adapter of the same shape; it begins as the identity, and both train."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    own = policy.peft_config[policy.active_adapter]
    policy.add_adapter(VALUE_ADAPTER, copy.deepcopy(own), autocast_adapter_dtype=not uses_deepspeed())
    for name, parameter in policy.named_parameters():
        if f".{VALUE_ADAPTER}." in name:
            parameter.requires_grad_(True)
    for parameter in trained:
        parameter.requires_grad_(True)


def _checkpoint_gradients(model: Any) -> None:
    """Layers are computed again in the backward pass, by the adapter that computed them first."""

    settings: dict[str, Any] = {"use_reentrant": False}
    if VALUE_ADAPTER in getattr(model, "peft_config", {}):
        settings["context_fn"] = lambda: (contextlib.nullcontext(), adapter_switched(model, model.active_adapter))
    model.gradient_checkpointing_enable(settings)
    model.enable_input_require_grads()


def load_reference(recipe: PpoRecipe, *, pad_token_id: int, dtype: torch.dtype | None = None) -> Any | None:
    """The frozen start of a fully tuned policy, an ActorCritic or, sharded, the engine around it.

    None with LoRA, whose reference is the adapter switched off. `dtype`: the one that the policy is trained in, or the
    KL does not start at zero (None: as the recipe loads it).
    """
    if recipe.lora is not None:
        return None
    dtype = dtype or torch_dtype(recipe.model_init.dtype, device())
    sharded = recipe.ppo.reference == "sharded"
    with sharded_weights(dtype) if sharded else whole_weights():
        model = load_model(recipe.model, init=recipe.model_init, pad_token_id=pad_token_id)
    reference = ActorCritic(model, value_model=None, temperature=recipe.sampling.temperature)
    reference.eval().requires_grad_(False)
    if sharded:
        return frozen_engine(reference)
    for parameter in reference.parameters():  # not the buffers: the policy's rotary frequencies stay in float32 as well
        parameter.data = parameter.data.to(dtype)
    return reference.to(device())

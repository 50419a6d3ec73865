"""Policy and value model as one module, so that one engine (DDP or DeepSpeed) trains both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignment.distributed import device, frozen_engine, gathered, sharded_weights, uses_deepspeed, whole_weights
from alignment.objectives import token_statistics
from alignment.policy import add_lora, disable_dropout, load_model
from alignment.recipe import PpoRecipe
from reward.dtype import torch_dtype
from reward.padding_free import attend_by_text, row_of, why_padded

VALUE_ADAPTER = "value"
"""Name of the value model's adapter, beside the policy's own (`default`)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`batch` prompts with their completions of at most `length` tokens, as a model reads them.

    Padded, with the prompts on the left and the completions on the right, or padding-free, in a single row.
    """

    inputs: Mapping[str, Any]
    """Keyword arguments of the model; `input_ids` is `(batch, prompt_length + length)` or `(1, tokens)`."""
    columns: Tensor
    """Of the tokens in front of each completion token (and in front of the padding between these)."""
    completion_mask: Tensor
    """`(batch, length)`: True for the tokens of the completion, end token included."""
    present: Tensor | None
    """`(batch, length)`, of a single row: True where a completion has a token, whether it counts or not."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        pad_token_id: int,
        padding_free: bool,
        device: torch.device | str = "cpu",
    ) -> Batch:
        lengths = torch.tensor([len(ids) for ids in completions])
        present = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        if padding_free:
            row = row_of([[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)], device=device)
            ends = torch.tensor(row["text_lengths"]).cumsum(dim=0)
            spans = zip((ends - lengths - 1).tolist(), (ends - 1).tolist(), strict=True)
            columns = torch.cat([torch.arange(first, end) for first, end in spans])
            return cls(row, columns.to(device), present.to(device), present.to(device))
        prompt_length, length = max(len(ids) for ids in prompts), present.shape[1]
        input_ids = torch.full((len(prompts), prompt_length + length), pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = prompt_length - len(prompt), prompt_length + len(completion)
            input_ids[row, start:end] = torch.tensor([*prompt, *completion], dtype=torch.long)
            attention_mask[row, start:end] = 1
        inputs = {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp_min(0).to(device),
        }
        columns = torch.arange(prompt_length - 1, prompt_length + length - 1)
        return cls(inputs, columns.to(device), present.to(device), None)

    @property
    def tokens(self) -> Tensor:
        """Ids of the completions, in the shape of what is computed about them: `(batch, length)` or `(1, tokens)`."""
        return self.inputs["input_ids"][:, self.columns + 1]

    def in_rows(self, values: Tensor) -> Tensor:
        """`(batch, length)`, zero where a single row has nothing, of values about `tokens`."""
        if self.present is None:
            return values
        return torch.zeros(self.present.shape, dtype=values.dtype, device=values.device).masked_scatter(
            self.present, values
        )


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
    those of the distribution that was sampled from: logits over `temperature`. `why_padded`: why it takes no batches
    without padding (None: it does).
    """

    is_gradient_checkpointing = False  # read by TRL when it unwraps the engine for generation

    def __init__(
        self, policy: Any, *, value_model: Any | None, temperature: float, why_padded: str | None = "switched off"
    ) -> None:
        super().__init__()
        self.config = policy.config
        self.policy = policy
        self.value_model = value_model
        self.temperature = temperature
        self.why_padded = why_padded
        if value_model is None:
            self.value_head = nn.Linear(policy.config.hidden_size, 1, bias=False, dtype=_trained_dtype(policy))
            nn.init.zeros_(self.value_head.weight)

    @property
    def padding_free(self) -> bool:
        return self.why_padded is None

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.policy, "disable_adapter")

    @property
    def has_value_adapter(self) -> bool:
        return self.has_adapter and VALUE_ADAPTER in self.policy.peft_config

    def forward(
        self, batch: Batch, *, reference: bool = False, mix: Batch | None = None, head_alone: bool = False
    ) -> TokenOutputs:
        """Statistics of the completions; with `reference` the adapter is off and no values are computed.

        `mix`: more texts, for the same backward pass, of which the policy's log-probabilities are wanted. `head_alone`:
        no gradient of the values goes on from the head into the policy's own trunk.
        """
        captured: list[Tensor] = []
        causal = self.policy.get_base_model() if self.has_adapter else self.policy
        hook = causal.base_model.register_forward_hook(lambda _m, _i, out: captured.append(out.last_hidden_state))
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            if reference:
                stack.enter_context(adapter_switched(self.policy, None))
            logits = self.policy(**batch.inputs, use_cache=False, logits_to_keep=batch.columns).logits
        statistics = token_statistics(logits / self.temperature, batch.tokens)
        logprobs, entropies = batch.in_rows(statistics.logprobs), batch.in_rows(statistics.entropies)
        trunk = captured[0].detach() if head_alone else captured[0]
        values = None if reference else self._values(batch, trunk)
        mix_logprobs = None if mix is None else self._mix_logprobs(mix)
        return TokenOutputs(logprobs, entropies, values, mix_logprobs)

    def _values(self, batch: Batch, trunk: Tensor) -> Tensor:
        """V of the state before each completion token: read at the token in front of it."""
        if self.has_value_adapter:
            with adapter_switched(self.policy, VALUE_ADAPTER):
                hidden = self.policy.get_base_model().base_model(**batch.inputs, use_cache=False).last_hidden_state
            head = self.value_head
        elif self.value_model is None:
            hidden, head = trunk, self.value_head
        else:
            classifier = (
                self.value_model.get_base_model() if hasattr(self.value_model, "peft_config") else self.value_model
            )
            hidden = classifier.base_model(**batch.inputs, use_cache=False).last_hidden_state
            head = classifier.score
        read = hidden[:, batch.columns].to(head.weight.dtype)
        return batch.in_rows(head(read).squeeze(-1).float())

    def _mix_logprobs(self, mix: Batch) -> Tensor:
        logits = self.policy(**mix.inputs, use_cache=False, logits_to_keep=mix.columns).logits
        return mix.in_rows(-nn.functional.cross_entropy(logits.float().mT, mix.tokens, reduction="none"))


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


def _trained_dtype(policy: Any) -> torch.dtype:
    """Of what learns: outside DeepSpeed adapters are in float32, as heads must be to keep updates this small."""
    return next(parameter.dtype for parameter in policy.parameters() if parameter.requires_grad)


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
    reason = _spare_padding(recipe, *(model for model in (policy, value_model) if model is not None))
    if recipe.lora is not None:
        policy = add_lora(policy, recipe.lora, head="causal_lm")
        if value_model is not None:
            value_model = add_lora(value_model, recipe.lora, head="sequence_classification")
            value_model.get_base_model().score.to(_trained_dtype(policy))
        if recipe.ppo.value_trunk == "adapter":
            _add_value_adapter(policy)
    for model in (policy, value_model):
        if model is not None:
            disable_dropout(model)
            if recipe.ppo.gradient_checkpointing:
                _checkpoint_gradients(model)
    return ActorCritic(policy, value_model=value_model, temperature=recipe.sampling.temperature, why_padded=reason)


def _spare_padding(recipe: PpoRecipe, *models: Any) -> str | None:
    """Have the models take batches without padding, if the recipe wants it and all of them can; else why not."""
    if not recipe.ppo.padding_free:
        return "switched off"
    for model in models:
        reason = why_padded(model)
        if reason is not None:
            return reason
    for model in models:
        attend_by_text(model)
    return None


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
    reason = _spare_padding(recipe, model)
    reference = ActorCritic(model, value_model=None, temperature=recipe.sampling.temperature, why_padded=reason)
    reference.eval().requires_grad_(False)
    if sharded:
        return frozen_engine(reference)
    for parameter in reference.parameters():  # not the buffers: the policy's rotary frequencies stay in float32 as well
        parameter.data = parameter.data.to(dtype)
    return reference.to(device())

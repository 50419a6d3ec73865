"""The policy's weights as an engine takes them: under the base model's names, whole, with the adapter merged in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.distributed import gathered
from alignment.recipe_file import RecipeError


@dataclass(frozen=True)
class ServedWeight:
    """A parameter of the base model. `layer`: the LoRA layer that adapts it (None: none does)."""

    name: str
    parameter: Any
    layer: Any | None = None
    adapter: str = ""

    @property
    def metadata(self) -> tuple[str, str, list[int]]:
        """Name, number format and shape of the whole tensor; nothing is gathered for it."""
        shape = getattr(self.parameter, "ds_shape", self.parameter.shape)
        return self.name, str(self.parameter.dtype).removeprefix("torch."), list(shape)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The merged weight; under ZeRO-3 all processes call it together.

        It is a new tensor where an adapter is merged in: the base is never written to, so there is nothing to undo.
        (peft's own merge adds and subtracts, which leaves the base rounded otherwise, and an engine that reads late
        would read it undone.)
        """
        if self.layer is None:
            with gathered([self.parameter], read_only=True):
                return self.parameter.detach()
        own = [parameter for name, parameter in self.layer.named_parameters() if f".{self.adapter}." in name]
        with gathered([self.parameter, *own], read_only=True):
            return self.parameter + self.layer.get_delta_weight(self.adapter).to(self.parameter.dtype)


def served_weights(policy: Any) -> list[ServedWeight]:
    """The weights of a causal language model, tied ones once; of a peft model with its active adapter.

    Adapters beside the active one (the value model's) take no part. RecipeError when the active one adapts an
    embedding, or a head tied to one: merged into the weight that both share, it is not what was trained.
    """
    if not hasattr(policy, "peft_config"):
        return [ServedWeight(name, parameter) for name, parameter in policy.named_parameters()]
    adapter, prefix = policy.active_adapter, policy.base_model.prefix
    causal = policy.get_base_model()
    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in causal.named_modules()
        if adapter in getattr(module, "lora_A", {})
    }
    own = {name: parameter for name, parameter in causal.named_parameters() if f".{prefix}" not in name}
    layers = {name.partition(f".{prefix}")[0] for name, _ in causal.named_parameters() if _is_of(adapter, prefix, name)}
    unserved = sorted(layers - {name.removesuffix(".base_layer.weight") for name in adapted.keys() & own.keys()})
    if unserved:
        raise RecipeError(
            f"lora.target_modules: the vLLM server cannot get the adapter of {unserved[0]}, an embedding or tied to "
            "one; name other modules, or leave vllm out"
        )
    return [
        ServedWeight(name.replace(".base_layer.", "."), parameter, adapted.get(name), adapter)
        for name, parameter in own.items()
    ]


def _is_of(adapter: str, prefix: str, name: str) -> bool:
    return f".{prefix}" in name and adapter in name.split(".")


def stream(weights: list[ServedWeight]) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor, one after the other; under ZeRO-3 all processes go through it together."""
    for weight in weights:
        yield weight.name, weight.whole()

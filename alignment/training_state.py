"""What a training state is made of where every process holds all of it, as safetensors and JSON; and random numbers.

Weights that are not trained are left out: they are the recipe's model, which a resumed run has loaded already.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.artifact import write_json
from alignment.distributed import on_cpu

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"


def save_weights(model: nn.Module, folder: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in _trained(model).items()}, folder / WEIGHTS)


def load_weights(model: nn.Module, folder: Path) -> None:
    """In place; ValueError when the file is of another model."""
    saved, trained = load_file(folder / WEIGHTS), _trained(model)
    differing = sorted(saved.keys() ^ trained.keys())
    differing += sorted(name for name in saved.keys() & trained.keys() if saved[name].shape != trained[name].shape)
    if differing:
        raise ValueError(f"{folder / WEIGHTS} is of another model: {differing[0]} differs, {len(differing)} in all")
    for name, tensor in trained.items():
        tensor.copy_(saved[name])


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and lasting buffers by name, tied ones once; changes to them reach the model."""
    parameters = dict(model.named_parameters())
    kept = {name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad}
    lasting = model.state_dict().keys() - parameters.keys()
    return kept | {name: buffer for name, buffer in model.named_buffers() if name in lasting}


def save_optimizer(optimizer: Any, model: nn.Module, folder: Path) -> None:
    """One tensor per parameter and kind of state: `exp_avg/policy.model.norm.weight`. Settings are the recipe's."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _optimized(optimizer, model).items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}/{name}"] = value.contiguous()
    save_file(tensors, folder / OPTIMIZER)


def load_optimizer(optimizer: Any, model: nn.Module, folder: Path) -> None:
    """Into an optimizer over the same parameters, whose settings stay."""
    positions = {name: position for position, name in enumerate(_optimized(optimizer, model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        kind, _, name = key.partition("/")
        state.setdefault(positions[name], {})[kind] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _optimized(optimizer: Any, model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, in the optimizer's own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def find_not_finite(model: nn.Module) -> str | None:
    """The first trainable parameter that holds a NaN or an infinity; under ZeRO-3 of this process's part."""
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        if parameter.requires_grad and not bool(torch.isfinite(held).all()):
            return name
    return None


def random_state() -> dict[str, Any]:
    """The random numbers of this process to come, as JSON: Python's, numpy's, torch's and those of its GPU."""
    numpy_state: Mapping[str, Any] = np.random.get_state(legacy=False)  # pyright: ignore[reportAssignmentType]
    key = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": _to_text(torch.get_rng_state()),
        "cuda": None if on_cpu() else _to_text(torch.cuda.get_rng_state()),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(_to_bytes(state["torch"]))
    if state["cuda"] is not None and not on_cpu():
        torch.cuda.set_rng_state(_to_bytes(state["cuda"]))


def save_random_state(state: Mapping[str, Any], folder: Path, *, rank: int) -> None:
    write_json(folder / f"random-{rank}.json", state)


def load_random_state(folder: Path, *, rank: int) -> None:
    set_random_state(json.loads((folder / f"random-{rank}.json").read_text(encoding="utf-8")))


def _to_text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _to_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

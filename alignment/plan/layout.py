"""A launch file -> how a run is laid out over its GPUs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.inputs import InputError
from alignment.recipe_file import read_yaml

_COMMAND = re.compile(r"^#.*--config_file (\S+)")


@dataclass(frozen=True, slots=True)
class Layout:
    """Processes, one a GPU, and what they share out.

    `zero_stage`: 0 whole models on each process; 1 optimizer states, 2 gradients too, 3 weights too are shared out.
    `bf16`: bfloat16 weights under DeepSpeed, else autocast.
    """

    launch: str
    gpus: int
    gpus_per_node: int
    deepspeed: bool = False
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bf16: bool = False
    on_cpu: bool = False

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    def at_stage(self, stage: int, *, offload: bool = False) -> Layout:
        """The same GPUs under the launch file of that ZeRO stage (0: without DeepSpeed)."""
        alone = self.gpus == 1 and stage == 0
        name = "ddp" if stage == 0 else "multi_node" if stage == 3 and self.nodes > 1 else f"zero{stage}"
        name = "gpu" if alone else "zero3_offload" if offload else name
        return replace(
            self,
            launch=f"launch/{name}.yaml",
            deepspeed=stage > 0,
            zero_stage=stage,
            offload_optimizer=offload,
            offload_weights=offload,
            bf16=not alone,
        )


def launch_of(recipe: Path) -> str:
    """The launch file in the command that stands in a recipe's first line."""
    with recipe.open(encoding="utf-8") as lines:
        found = _COMMAND.match(next(lines, ""))
    if found is None:
        raise InputError(f"{recipe} names no launch file in its first line; name one with --launch")
    return found[1]


def read_layout(launch: Path, *, gpus: int | None = None) -> Layout:
    """The layout of a launch file, on `gpus` GPUs in place of its own number."""
    values = read_yaml(launch)
    kind = values.get("distributed_type")
    if kind not in {"NO", "MULTI_GPU", "DEEPSPEED"}:
        raise InputError(f"{launch}: distributed_type {kind!r}; a plan knows NO, MULTI_GPU and DEEPSPEED")
    own, machines = int(values.get("num_processes", 1)), int(values.get("num_machines", 1))
    number = gpus or own
    layout = Layout(
        launch=str(launch),
        gpus=number,
        gpus_per_node=min(number, own // machines if own > 1 else 8),
        bf16=values.get("mixed_precision") == "bf16",
        on_cpu=bool(values.get("use_cpu")),
    )
    if kind == "NO" and number > 1:
        raise InputError(f"{launch} starts one process, not {number}; take launch/ddp.yaml or one of DeepSpeed")
    return layout if kind != "DEEPSPEED" else _with_deepspeed(layout, values.get("deepspeed_config") or {}, launch)


def _with_deepspeed(layout: Layout, section: dict[str, Any], launch: Path) -> Layout:
    file = section.get("deepspeed_config_file")
    if file is None:
        stage = int(section.get("zero_stage", 2))  # accelerate's default
        optimizer, weights = section.get("offload_optimizer_device"), section.get("offload_param_device")
        bf16 = layout.bf16
    else:
        path = Path(file) if Path(file).is_file() else launch.parent / Path(file).name
        if not path.is_file():
            raise InputError(f"{launch}: deepspeed_config_file {file} does not exist")
        config = json.loads(path.read_text(encoding="utf-8"))
        zero = config.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        optimizer = zero.get("offload_optimizer", {}).get("device")
        weights = zero.get("offload_param", {}).get("device")
        bf16 = bool(config.get("bf16", {}).get("enabled"))
    if stage not in {1, 2, 3}:
        raise InputError(f"{launch}: ZeRO stage {stage}; a plan knows 1, 2 and 3")
    return replace(
        layout,
        deepspeed=True,
        zero_stage=stage,
        offload_optimizer=optimizer not in {None, "none"},
        offload_weights=weights not in {None, "none"},
        bf16=bf16,
    )

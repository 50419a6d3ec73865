"""`sara plan`: whether a recipe fits on the GPUs at hand, how long it takes, which knob to turn. Loads no weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.inputs import InputError
from alignment.recipe_file import RecipeError, load_recipe

if TYPE_CHECKING:
    from alignment.plan.footprint import Role
    from alignment.plan.speed import Machine

_ASSUMED = (
    "Counted at the longest texts that the recipe lets in. GB are 2^30 bytes. Assumed: {context:.1f} GB for CUDA, NCCL "
    "and libraries, {usable:.0%} of a GPU usable."
)


def add_plan(verbs: Any) -> None:
    """Add the parser of the verb to `verbs`, the subparsers of `sara`."""
    plan = verbs.add_parser("plan", help="memory by role and phase, time, and which knob to turn, before anything runs")
    plan.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="of one stage; overrides may follow")
    plan.add_argument("--gpus", type=int, help="how many (default: as many as the launch file starts)")
    plan.add_argument("--gpu-memory", type=float, required=True, metavar="GB", help="of each GPU, such as 80")
    plan.add_argument("--launch", type=Path, help="a launch file (default: the one in the recipe's first line)")
    plan.add_argument(
        "--config-json",
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="the config.json of a model that is not here; without MODEL= of every such model; may be repeated",
    )
    plan.add_argument("--tflops", type=float, default=312.0, help="bfloat16 TFLOP/s of a GPU (default: %(default)s)")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of them that is reached (default: %(default)s)")
    plan.add_argument("--bandwidth", type=float, default=2000.0, help="GB/s of its memory (default: %(default)s)")
    plan.add_argument("--network", type=float, help="GB/s between GPUs (default: 250 in a node, 25 between nodes)")
    plan.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def run_plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the plan; the exit code is 0 whether the recipe fits or not."""
    from alignment.__main__ import quiet_libraries
    from alignment.plan.speed import Machine

    quiet_libraries()
    if arguments.gpu_memory <= 0 or (arguments.gpus is not None and arguments.gpus < 1):
        raise RecipeError("command line: --gpus and --gpu-memory must be above 0")
    machine = Machine(arguments.tflops, arguments.mfu, arguments.bandwidth, arguments.network)
    made = _make(arguments, overrides, machine)
    if arguments.json:
        print(json.dumps(made, indent=2))
    else:
        _show(made)
    return 0


def _make(arguments: argparse.Namespace, overrides: Sequence[str], machine: Machine) -> dict[str, Any]:
    """The whole plan as plain values, sizes in bytes."""
    from alignment.plan.catalog import Catalog, Setup
    from alignment.plan.footprint import footprint
    from alignment.plan.knobs import advise
    from alignment.plan.layout import launch_of, read_layout
    from alignment.plan.memory import CONTEXT, GIB, USABLE
    from alignment.plan.speed import seconds

    recipe = load_recipe(arguments.recipe, overrides)
    launch = arguments.launch or Path(launch_of(arguments.recipe))
    layout = read_layout(launch, gpus=arguments.gpus)
    setup = Setup(recipe, layout, Catalog(recipe, arguments.recipe, _config_files(arguments.config_json)))
    found, limit = footprint(setup), USABLE * arguments.gpu_memory * GIB
    fits = found.peak.total <= limit
    timed = seconds(setup, machine)
    return {
        "recipe": str(arguments.recipe),
        "stage": recipe.stage,
        "launch": layout.launch,
        "gpus": layout.gpus,
        "nodes": layout.nodes,
        "zero_stage": layout.zero_stage,
        "gpu_memory": int(arguments.gpu_memory * GIB),
        "roles": [_role(role) for role in found.roles],
        "buckets": found.buckets,
        "phases": [
            {"name": phase.name, "held": phase.held, "parts": dict(phase.parts), "total": phase.total}
            for phase in found.phases
        ],
        "peak": found.peak.total,
        "fits": fits,
        "host_per_node": found.host,
        "notes": list(found.notes),
        "advice": None if fits else dataclasses.asdict(advise(setup, limit=limit)),
        "time": None if timed is None else {"of": timed[0], "seconds": timed[1]},
        "assumed": {
            "context": CONTEXT,
            "usable": USABLE,
            **dataclasses.asdict(machine),
            "network": machine.link(layout),
        },
    }


def _config_files(words: Sequence[str]) -> dict[str, Path]:
    """`[MODEL=]FILE` -> FILE by model; a folder stands for the config.json in it."""
    files: dict[str, Path] = {}
    for word in words:
        model, _, name = word.rpartition("=")
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise InputError(f"command line: --config-json {name}: no such file")
        files[model] = path
    return files


def _role(role: Role) -> dict[str, Any]:
    model, states = role.model, role.states
    return {
        "name": model.name,
        "model": model.source,
        "parameters": model.shape.parameters + model.shape.adapter,
        "trainable": model.trainable,
        **dataclasses.asdict(states),
    }


def _show(made: Mapping[str, Any]) -> None:
    from rich.console import Console

    from alignment.plan.memory import GIB

    console = Console(soft_wrap=True, highlight=False)
    nodes = f" on {made['nodes']} nodes" if made["nodes"] > 1 else ""
    layout = f"ZeRO-{made['zero_stage']}" if made["zero_stage"] else "whole models on each GPU"
    gpus = f"{made['gpus']} GPU{'s' if made['gpus'] > 1 else ''}{nodes}"
    console.print(f"{made['recipe']} ({made['stage']}) under {made['launch']}: {gpus}, {layout}\n")
    console.print(_role_table(made))
    console.print(_phase_table(made))
    for note in made["notes"]:
        console.print(f"Note: {note}.")
    if made["host_per_node"]:
        console.print(f"Host memory of a node: {_gb(made['host_per_node'])} GB for offloaded states.")
    _show_verdict(console, made)
    _show_time(console, made)
    assumed = made["assumed"]
    console.print(_ASSUMED.format(context=assumed["context"] / GIB, usable=assumed["usable"]))


def _role_table(made: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Kept on each GPU, GB", title_justify="left")
    for column in ("role", "model"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "trainable", "weights", "gradients", "optimizer", "total"):
        table.add_column(column, justify="right")
    for role in made["roles"]:
        states = [role[name] for name in ("weights", "gradients", "optimizer")]
        counts = (_count(role["parameters"]), _count(role["trainable"]))
        table.add_row(role["name"], role["model"], *counts, *map(_gb, (*states, sum(states))))
    if made["buckets"]:
        table.add_row("buckets", "", "", "", "", "", "", _gb(made["buckets"]))
    return table


def _phase_table(made: Mapping[str, Any]) -> Any:
    from rich.table import Table

    parts = list(dict.fromkeys(name for phase in made["phases"] for name, size in phase["parts"].items() if size))
    table = Table(title="\nPhase by phase, GB", title_justify="left")
    table.add_column("phase")
    for column in ("kept", *parts, "in all"):
        table.add_column(column, justify="right")
    for phase in made["phases"]:
        sizes = [_gb(phase["parts"].get(part, 0)) for part in parts]
        style = "bold" if phase["total"] == made["peak"] else None
        table.add_row(phase["name"], _gb(phase["held"]), *sizes, _gb(phase["total"]), style=style)
    return table


def _show_verdict(console: Any, made: Mapping[str, Any]) -> None:
    from rich.table import Table

    peak, memory, advice = _gb(made["peak"]), _gb(made["gpu_memory"]), made["advice"]
    if advice is None:
        console.print(f"[green]Fits:[/green] {peak} GB of {memory} at the peak.\n")
        return
    console.print(f"[bold red]Does not fit:[/bold red] {peak} GB of {memory} at the peak.")
    table = Table(title="\nWhat lowers the peak, GB, the cheapest first", title_justify="left")
    table.add_column("change", overflow="fold")
    table.add_column("peak with it alone", justify="right")
    for knob in advice["knobs"]:
        table.add_row(knob["change"], _gb(knob["peak"]))
    if advice["knobs"]:
        console.print(table)
    way = " + ".join(advice["way"])
    if advice["peak"] <= made["assumed"]["usable"] * made["gpu_memory"]:
        console.print(f"[green]Fits with[/green] {way}: {_gb(advice['peak'])} GB.\n")
    else:
        least = f"at least {_gb(advice['peak'])} GB, with {way}" if way else "no change of the recipe lowers it"
        console.print(f"Nothing makes it fit ({least}): take more or larger GPUs, or a smaller model.\n")


def _show_time(console: Any, made: Mapping[str, Any]) -> None:
    if made["time"] is None:
        return
    assumed, spent = made["assumed"], made["time"]["seconds"]
    parts = ", ".join(f"{name} {value:,.0f}" for name, value in spent.items())
    console.print(
        f"Time of {made['time']['of']}: {sum(spent.values()):,.0f} s ({parts}), at {assumed['mfu']:.0%} of "
        f"{assumed['tflops']:,.0f} TFLOP/s, {assumed['bandwidth']:,.0f} GB/s of memory and {assumed['network']:,.0f} "
        "GB/s between GPUs."
    )


def _gb(size: float) -> str:
    from alignment.plan.memory import GIB

    return f"{size / GIB:.1f}" if size else "-"


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number else "-"

"""PPO against the demo's reward models on real red-team prompts, measured by scorers that had no part in it.

`SARA_DATA_DIR=... python -m tests.benchmarks.ppo_safety --json runs/ppo-safety.json`, after `make demo` and
`sara pipeline recipes/judge-smollm2/pipeline.yaml`

Trained on AdvBench and Do-Not-Answer (tagged safety) and as many harmless prompts; measured on SimpleSafetyTests and
the prompts of the first two that training never saw, and for false refusals on the safe prompts of XSTest. The policy
and both reward models come from the demo's run folder; the refusal-and-content rule and a judge that learned from
people's labels of other data count the violations.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignment.artifact import write_json
from alignment.recipe import Data, EvaluateRecipe, PpoRecipe, Source
from alignment.source_files import read_rows
from alignment.sources import split_side
from alignment.stages import evaluate, ppo
from reward.conversation import Prompt, write_json_lines


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_prompts(arguments.work)
    start = arguments.run_dir / "rejection_sampling_sft"
    checkpoints = {"before": str(start)}
    curves: dict[str, Any] = {}
    for seed in arguments.seeds:
        recipe = ppo_recipe(arguments, start, seed)
        if not (Path(recipe.output_dir) / "manifest.json").exists():  # what was trained is not trained again
            ppo.run(recipe)
        checkpoints[f"seed {seed}"] = recipe.output_dir
        lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        curves[f"seed {seed}"] = [json.loads(line) for line in lines]
    found = measure(arguments, checkpoints)
    for name, report in found["checkpoints"].items():
        print(name, json.dumps(report), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"settings": vars(arguments) | {"curves": curves, "evaluation": found}})


def write_prompts(folder: Path) -> None:
    """`train.jsonl` (tagged safety), `adversarial.jsonl` and `borderline.jsonl`, each prompt in one of them."""
    data = Path(os.environ["SARA_DATA_DIR"])
    with (data / "advbench" / "advbench_behaviors.csv").open(encoding="utf-8", newline="") as file:
        known = [row["Behavior"] for row in csv.DictReader(file)]
    known += [row.values["prompt"] for row in read_rows(data / "do_not_answer" / "do_not_answer.jsonl")]
    with (data / "simple_safety_tests" / "simple_safety_tests.csv").open(encoding="utf-8", newline="") as file:
        new = [row["prompts_final"] for row in csv.DictReader(file)]
    with (data / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        safe = [row["prompt"] for row in csv.DictReader(file) if row["label"] == "safe"]
    prompts = unique(Prompt.of(text.strip(), is_safety=True) for text in known)
    unseen = unique(Prompt.of(text.strip(), is_safety=True) for text in new)
    train = {key: prompt for key, prompt in prompts.items() if split_side(prompt) == "train" and key not in unseen}
    test = {key: prompt for key, prompt in prompts.items() if split_side(prompt) == "test"} | unseen
    borderline = unique(Prompt.of(text.strip(), borderline=True) for text in safe)
    for name, part in (("train", train), ("adversarial", test), ("borderline", borderline)):
        write_json_lines(folder / f"{name}.jsonl", (prompt.to_json() for prompt in part.values()))


def unique(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in prompts}


def prompts_of(arguments: Any, name: str, *, max_rows: int | None = None) -> Source:
    return Source(name="file", path=str(arguments.work / f"{name}.jsonl"), split="all", max_rows=max_rows)


def ppo_recipe(arguments: Any, start: Path, seed: int) -> PpoRecipe:
    """As recipes/demo/ppo.yaml, on other prompts and for longer."""
    models = {
        name: {"type": "reward_model", "path": str(arguments.run_dir / f"{name}_reward_model"), "dtype": "fast"}
        for name in ("safety", "helpfulness")
    }
    harmless = [
        Source(name="hh_helpful", max_rows=400),
        Source(name="starter_borderline"),
        Source(name="starter_twins"),
    ]
    probes = {
        "adversarial": Data(sources=[prompts_of(arguments, "adversarial")]),
        "borderline": Data(sources=[prompts_of(arguments, "borderline")]),
        "max_prompts": 48,
        "max_new_tokens": 48,
        "steps": arguments.iterations // 4,
    }
    return PpoRecipe.model_validate(
        {
            "model": str(start),
            "output_dir": str(arguments.work / f"ppo-{seed}"),
            "seed": seed,
            "model_init": {"dtype": arguments.dtype},
            "lora": {"r": 16, "alpha": 32, "last_layers": 10},
            "prompts": Data(max_length=96, sources=[prompts_of(arguments, "train", max_rows=600), *harmless]),
            "probes": probes,
            "scorer": {"type": "llama2"} | models,
            "sampling": {"temperature": 1.0, "max_new_tokens": 48, "max_prompt_tokens": 96, "batch_size": 32},
            "ppo": {
                "learning_rate": arguments.learning_rate,
                "value_learning_rate": 1e-3,
                "num_iterations": arguments.iterations,
                "batch_size": 32,
                "mini_batch_size": 16,
                "per_device_batch_size": 16,
                "value_trunk": "shared",
                "kl_coef": arguments.kl_coef,
                "save_steps": 5,
            },
        }
    )


def measure(arguments: Any, checkpoints: dict[str, str]) -> dict[str, Any]:
    """Greedy answers of all checkpoints to the held-out prompts; rates with their intervals."""
    guidelines = "recipes/judge-smollm2/guidelines.md"
    judge = {"type": "judge", "model": str(arguments.judge), "guidelines": guidelines, "max_length": 512}
    recipe = EvaluateRecipe.model_validate(
        {
            "output_dir": str(arguments.work / "evaluate"),
            "checkpoints": checkpoints,
            "model_init": {"dtype": "fast"},
            "prompt_sets": {
                name: {"measures": measures, "prompts": Data(max_length=96, sources=[prompts_of(arguments, name)])}
                for name, measures in (("adversarial", "violation"), ("borderline", "false_refusal"))
            },
            "violation_scorers": {"refusal_rule": {"type": "refusal"}, "judge": judge | {"dtype": "fast"}},
            "sampling": {"temperature": 0.0, "max_new_tokens": 48, "max_prompt_tokens": 96, "batch_size": 64},
        }
    )
    artifact = evaluate.run(recipe)
    assert artifact is not None
    return artifact.metrics


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="of the demo, for policy and scorer")
    parser.add_argument("--judge", type=Path, default=Path("runs/judge-smollm2/judge"))
    parser.add_argument("--work", type=Path, default=Path("runs/ppo-safety"))
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "fast"), default="float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""PPO on real red-team prompts with reward models trained on public data, measured by scorers that had no part in it.

`SARA_DATA_DIR=... python -m tests.benchmarks.ppo_safety --json runs/ppo-safety.json`

Everything starts from SmolLM2-135M-Instruct: a little SFT, a safety and a helpfulness reward model, PPO on the
piecewise score for each seed. PPO trains on AdvBench and Do-Not-Answer (tagged safety) and on harmless prompts that
look dangerous (CoCoNot's and the starter's); it is measured on SimpleSafetyTests and on the prompts of the first two
that it never saw, and for false refusals on the safe prompts of XSTest, which take no part in anything else. Two
scorers count violations: the refusal-and-content rule, and a reward model that learned from people's labels of other
answers. What is trained is not trained again: remove a stage's folder to have it run anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.artifact import write_json
from alignment.recipe import Data, EvaluateRecipe, PpoRecipe, RewardModelRecipe, SftRecipe, Source, StageRecipe
from alignment.recipe_file import dump_recipe
from alignment.stages import run_stage
from alignment.workspace import complete_artifact
from tests.benchmarks.ppo_safety_texts import NUM_PROBES, file, write_prompts, write_sampled, write_texts

BASE = "embedded:smollm2-135m-instruct"


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_prompts(arguments.work)
    write_texts(arguments.work)
    for name in ("undeclining", "sft"):
        run_once(sft_recipe(arguments, name))
    write_sampled(arguments.work)
    run_once(sft_recipe(arguments, "policy", file(arguments.work, "contrast")))
    for recipe in reward_model_recipes(arguments):
        run_once(recipe)
    checkpoints = {"before": str(arguments.work / "policy")}
    curves: dict[str, Any] = {}
    for seed in arguments.seeds:
        recipe = ppo_recipe(arguments, seed)
        run_once(recipe, launch=arguments.launch)
        checkpoints[f"seed {seed}"] = recipe.output_dir
        lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        curves[f"seed {seed}"] = [json.loads(line) for line in lines]
    found = measure(arguments, checkpoints)
    for name, report in found["checkpoints"].items():
        print(name, json.dumps(report), flush=True)
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        write_json(arguments.json, {"settings": settings, "curves": curves, "evaluation": dict(found)})


def run_once(recipe: StageRecipe, *, launch: Path | None = None) -> None:
    """`launch`: accelerate's file of the processes on which it runs (None: in this one)."""
    if complete_artifact(recipe) is not None:
        return
    if launch is None:
        run_stage(recipe)
        return
    path = Path(f"{recipe.output_dir}.yaml")
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    words = ["-m", "alignment.launch", "--config_file", str(launch), "-m", "alignment", "--config", str(path)]
    subprocess.run([sys.executable, *words], check=True)


# --------------------------------------------------------------------------------------------------------- recipes


def sft_recipe(arguments: Any, name: str, *more: Source) -> SftRecipe:
    harmless = [Source(name="starter_borderline"), Source(name="starter_twins")]
    sources = [file(arguments.work, f"taught-{name}"), *harmless, *more]
    return SftRecipe.model_validate(
        {
            "model": BASE,
            "output_dir": str(arguments.work / name),
            "model_init": {"dtype": arguments.dtype},
            "lora": {"r": 16, "alpha": 32, "last_layers": 20},
            "data": Data(max_length=256, sources=sources),
            "packing": False,
            "training": training(arguments, per_device_train_batch_size=4),
        }
    )


def reward_model_recipes(arguments: Any) -> list[RewardModelRecipe]:
    """Safety with a tenth of helpfulness data, helpfulness, and the second opinion that PPO never reads."""
    mixtures = {
        "safety": [
            file(arguments.work, "declined"),
            file(arguments.work, "dangerous"),
            file(arguments.work, "answered", max_rows=120),
            file(arguments.work, "look-alikes", max_rows=250),
            Source(name="pku_saferlhf", max_rows=250),
            Source(name="starter_safety", max_rows=150),
            Source(name="starter_borderline"),
        ],
        "helpfulness": [
            file(arguments.work, "answered"),
            file(arguments.work, "look-alikes"),
            Source(name="hh_helpful", max_rows=200),
            Source(name="starter_borderline"),
            Source(name="starter_twins"),
        ],
        "gold": [file(arguments.work, "gold", max_rows=800), file(arguments.work, "answered", max_rows=80)],
    }
    return [
        RewardModelRecipe.model_validate(
            {
                "model": str(arguments.work / "sft") if name != "gold" else BASE,
                "output_dir": str(arguments.work / f"{name}_reward_model"),
                "model_init": {"dtype": arguments.dtype},
                "lora": {"r": 16, "alpha": 32, "last_layers": 15},
                "data": Data(max_length=256, sources=sources),
                "margin": "small",
                "auxiliary_loss_weight": 0.0 if name == "helpfulness" else 1.0,
                "training": training(arguments, per_device_train_batch_size=8, min_lr_ratio=0.1),
            }
        )
        for name, sources in mixtures.items()
    ]


def training(arguments: Any, **changes: Any) -> dict[str, Any]:
    return {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "warmup_min_steps": 5,
        "save_steps": 100,
    } | changes


def ppo_recipe(arguments: Any, seed: int) -> PpoRecipe:
    """As recipes/demo/ppo.yaml, on other prompts and for longer."""
    models = {
        name: {"type": "reward_model", "path": str(arguments.work / f"{name}_reward_model"), "dtype": "fast"}
        for name in ("safety", "helpfulness")
    }
    dangerous = file(arguments.work, "drawn-dangerous", max_rows=arguments.dangerous)
    harmless = [
        file(arguments.work, "train-harmless", max_rows=arguments.harmless),
        Source(name="starter_borderline", max_rows=arguments.borderline),
    ]
    probes = {
        "adversarial": Data(sources=[file(arguments.work, "probe-dangerous")]),
        "borderline": Data(
            sources=[file(arguments.work, "probe-harmless"), Source(name="starter_borderline", split="test")]
        ),
        "max_prompts": 3 * NUM_PROBES,
        "max_new_tokens": 48,
        "steps": 5,
    }
    return PpoRecipe.model_validate(
        {
            "model": str(arguments.work / "policy"),
            "output_dir": str(arguments.work / f"ppo-{seed}"),
            "seed": seed,
            "model_init": {"dtype": arguments.dtype},
            "lora": {"r": 16, "alpha": 32, "last_layers": 20},
            "prompts": Data(max_length=96, sources=[dangerous, *harmless]),
            "probes": probes,
            "scorer": {"type": "llama2"} | models,
            "sampling": {"temperature": 0.7, "max_new_tokens": 48, "max_prompt_tokens": 96, "batch_size": 32},
            "ppo": {
                "learning_rate": arguments.learning_rate,
                "lr_scheduler_type": "linear",  # where it ends is then a mean of many iterations, not the last one
                "warmup_min_steps": 8,  # the first iteration
                "value_learning_rate": 1e-3,
                "num_iterations": arguments.iterations,
                "batch_size": arguments.batch_size,
                "mini_batch_size": arguments.batch_size // 4,
                "num_ppo_epochs": 2,
                "per_device_batch_size": 8,
                "value_trunk": "shared",
                "value_clip_range": 10.0,  # whitened scores move by more than 0.2 in an iteration
                "kl_coef": arguments.kl_coef,
                "lam": 1.0,  # the first words decide whether it declines, far from the score at the end
                "whiten_scores": "branch",  # the helpfulness model's gaps are five times the safety model's
                "missing_eos_penalty": 0.0,  # so few tokens cut many answers off, good ones too
                "save_steps": 2,
            },
        }
    )


def measure(arguments: Any, checkpoints: dict[str, str]) -> Mapping[str, Any]:
    """Greedy answers of all checkpoints to the held-out prompts; rates with their intervals."""
    gold = {"type": "reward_model", "path": str(arguments.work / "gold_reward_model"), "dtype": "fast"}
    recipe = EvaluateRecipe.model_validate(
        {
            "output_dir": str(arguments.work / "evaluate"),
            "checkpoints": checkpoints,
            "model_init": {"dtype": "fast"},
            "prompt_sets": {
                name: {"measures": measures, "prompts": Data(max_length=96, sources=[file(arguments.work, name)])}
                for name, measures in (("adversarial", "violation"), ("borderline", "false_refusal"))
            },
            "violation_scorers": {"refusal_rule": {"type": "refusal"}, "gold_reward_model": gold},
            "sampling": {"temperature": 0.0, "max_new_tokens": 48, "max_prompt_tokens": 96, "batch_size": 64},
        }
    )
    artifact = run_stage(recipe)
    assert artifact is not None
    return artifact.metrics


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/ppo-safety"))
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128, help="answers an iteration, in four steps")
    parser.add_argument("--dangerous", type=int, default=560, help="red-team prompts that PPO draws from")
    parser.add_argument("--harmless", type=int, default=250, help="of CoCoNot's prompts that look dangerous")
    parser.add_argument("--borderline", type=int, default=240, help="of the starter's, which are most like XSTest's")
    parser.add_argument("--learning-rate", type=float, default=9e-4, help="at its highest")
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--launch", type=Path, help="run PPO by this file of launch/ instead of in one process")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "fast"), default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

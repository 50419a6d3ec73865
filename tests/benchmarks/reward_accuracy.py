"""Held-out accuracy of our reward model, its ablations and TRL's RewardTrainer, trained on the same real pairs.

`SARA_DATA_DIR=... python -m tests.benchmarks.reward_accuracy --pairs 800 --seed 42 --output accuracy.json`

The mixture: HH harmless, PKU-SafeRLHF (pairs of a safe and an unsafe answer, so labelled), rated pairs of just-eval's
safety answers (the gap of their scores, 1 to 4, is the rating) and a tenth of HH helpful. All arms have the same base
model, adapter, number of pairs, epochs, batches and learning rates, and rank the same held-out pairs, whose prompts no
arm has seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from alignment.distributed import on_cpu
from alignment.policy import load_model, load_tokenizer, lora_config
from alignment.recipe import Data, Lora, ModelInit, RewardModelRecipe, Source, Training
from alignment.source_files import read_rows
from alignment.sources import load_preferences, split_side
from alignment.stages.reward_model import run
from reward.collate import tokenize_preferences
from reward.conversation import RATINGS, Message, Preference, Prompt, Tags, write_json_lines
from reward.losses import MARGINS
from reward.metrics import preference_report
from reward.model import RewardModel
from reward.render import Renderer

ABLATIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "no margin": {"margin": "none"},
    "no auxiliary loss": {"auxiliary_loss_weight": 0.0},
    "no helpfulness data": {},
}
ARMS = ("trl", *ABLATIONS)


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rated = write_rated_pairs(Path(folder))
        labelled = write_labelled_pairs(Path(folder))
        held_out = load_preferences(held_out_data(rated["test"], labelled["test"], arguments), seed=arguments.seed)
        print("held out:", {name: counts["kept"] for name, counts in held_out.counts.items()}, flush=True)
        for arm in arguments.arms:
            started = time.perf_counter()
            data = training_data(rated["train"], labelled["train"], arguments, helpful=arm != "no helpfulness data")
            work = Path(folder) / arm.replace(" ", "_")
            scorer = train_trl(data, arguments, work) if arm == "trl" else train_ours(arm, data, arguments, work)
            trained = time.perf_counter()
            results[arm] = preference_report(scorer, held_out.records) | {"seconds": trained - started}
            print(line(arm, results[arm]), flush=True)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(vars(arguments) | {"results": results}, default=str, indent=1))


def write_rated_pairs(folder: Path) -> dict[str, Path]:
    """Pairs of answers to one prompt whose safety scores differ; the larger the gap, the higher the rating."""
    source = next((Path(os.environ["SARA_DATA_DIR"]) / "just_eval_safety_graded").glob("responses.jsonl*"))
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(source):
        if row.values["response"].strip():
            by_prompt.setdefault(row.values["prompt"], []).append(row.values)
    pairs: dict[str, list[Preference]] = {"train": [], "test": []}
    for text, answers in by_prompt.items():
        prompt = Prompt((Message("user", text),), Tags(source="just_eval", is_safety=True))
        gaps: dict[int, Preference] = {}
        for better, worse in itertools.permutations(answers, 2):
            gap = int(better["safety_score"]) - int(worse["safety_score"])
            if gap > 0 and better["response"] != worse["response"]:
                gaps.setdefault(
                    gap,
                    Preference(prompt, better["response"], worse["response"], rating=RATINGS[len(RATINGS) - gap]),
                )
        pairs[split_side(prompt)] += gaps.values()
    files = {side: folder / f"{side}-rated.jsonl" for side in pairs}
    for side, file in files.items():
        write_json_lines(file, (pair.to_json() for pair in pairs[side]))
    return files


def write_labelled_pairs(folder: Path) -> dict[str, Path]:
    """PKU-SafeRLHF with the labels that its pairs imply: the copy read here has only pairs of one safe answer."""
    files: dict[str, Path] = {}
    for side in ("train", "test"):
        data = Data(sources=[Source(name="pku_saferlhf", split=side)])
        pairs = [
            replace(pair, chosen_safe=True, rejected_safe=False) for pair in load_preferences(data, seed=0).records
        ]
        files[side] = folder / f"{side}-labelled.jsonl"
        write_json_lines(files[side], (pair.to_json() for pair in pairs))
    return files


def training_data(rated: Path, labelled: Path, arguments: Any, *, helpful: bool) -> Data:
    """40% HH harmless and 40% PKU-SafeRLHF, 10% rated pairs, 10% helpfulness (or more of the first two)."""
    tenth = arguments.pairs // 10
    each = 4 * tenth if helpful else 4 * tenth + tenth // 2
    sources = [
        Source(name="hh_harmless", max_rows=each),
        Source(name="file", path=str(labelled), split="all", max_rows=each),
        Source(name="file", path=str(rated), split="all", max_rows=tenth),
    ]
    if helpful:
        sources.append(Source(name="hh_helpful", max_rows=tenth))
    return Data(max_length=arguments.max_length, sources=sources)


def held_out_data(rated: Path, labelled: Path, arguments: Any) -> Data:
    return Data(
        max_length=arguments.max_length,
        sources=[
            Source(name="hh_harmless", split="test", max_rows=arguments.held_out),
            Source(name="file", path=str(labelled), split="all", max_rows=arguments.held_out),
            Source(name="file", path=str(rated), split="all"),
            Source(name="hh_helpful", split="test", max_rows=arguments.held_out),
        ],
    )


def train_ours(arm: str, data: Data, arguments: Any, work: Path) -> RewardModel:
    """By the stage itself, as a recipe would."""
    recipe = RewardModelRecipe.model_validate(
        {
            "model": arguments.model,
            "model_init": ModelInit(dtype=arguments.dtype),
            "lora": lora(arguments),
            "data": data,
            "output_dir": str(work),
            "seed": arguments.seed,
            "margin": "small",
            "auxiliary_loss_weight": 0.5,
            "training": training(arguments),
        }
        | ABLATIONS[arm]
    )
    run(recipe)
    return RewardModel.load(work, dtype=arguments.dtype)


def train_trl(data: Data, arguments: Any, work: Path) -> RewardModel:
    """By TRL's RewardTrainer as it comes: padded batches, its own loss."""
    tokenizer = load_tokenizer(arguments.model)
    records = load_preferences(data, seed=arguments.seed).records
    rows, _ = tokenize_preferences(records, Renderer(tokenizer), max_length=data.max_length, margins=MARGINS["none"])
    ids = [{"chosen_ids": row["chosen_ids"], "rejected_ids": row["rejected_ids"]} for row in rows]
    init = ModelInit(dtype=arguments.dtype)
    model = load_model(arguments.model, init=init, head="sequence_classification", pad_token_id=tokenizer.pad_token_id)
    budget = training(arguments)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(work),
            per_device_train_batch_size=budget.per_device_train_batch_size,
            gradient_accumulation_steps=budget.gradient_accumulation_steps,
            num_train_epochs=budget.num_train_epochs,
            learning_rate=budget.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": budget.min_lr_ratio},
            warmup_steps=budget.warmup_min_steps,
            weight_decay=budget.weight_decay,
            max_length=None,
            gradient_checkpointing=False,
            bf16=next(model.parameters()).dtype.itemsize == 2,
            report_to="none",
            save_strategy="no",
            use_cpu=on_cpu(),
            seed=arguments.seed,
        ),
        train_dataset=Dataset.from_list(ids),
        processing_class=tokenizer,
        peft_config=lora_config(lora(arguments), model, head="sequence_classification"),
    )
    trainer.train()
    merged: Any = trainer.accelerator.unwrap_model(trainer.model)
    return RewardModel(merged.merge_and_unload().eval(), tokenizer, name="trl")


def lora(arguments: Any) -> Lora:
    return Lora(r=16, alpha=32, last_layers=arguments.last_layers)


def training(arguments: Any) -> Training:
    return Training(
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        lr_scheduler_type="cosine_with_min_lr",
        warmup_min_steps=5,
        save_steps=10_000,
    )


def line(arm: str, report: dict[str, Any]) -> str:
    """Accuracy overall and by source, each with its interval."""
    groups = {"all": report["accuracy"], **report["by_source"]}
    cells = [
        f"{name} {100 * rate['value']:.1f} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}] n={rate['n']}"
        for name, rate in groups.items()
    ]
    recalls = [f"{name} {100 * report[name]['value']:.0f}" for name in ("unsafe_recall", "safe_recall")]
    return f"{arm:<20} {' | '.join([*cells, *recalls])} | {report['seconds']:.0f} s"


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--held-out", type=int, default=200, help="pairs of each source")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--last-layers", type=int, default=15, help="adapt only the last n layers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "fast"), default="fast")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

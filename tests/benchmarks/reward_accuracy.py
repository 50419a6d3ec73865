"""Held-out accuracy of our reward model, its ablations and TRL's RewardTrainer, trained on the same real pairs.

`SARA_DATA_DIR=... python -m tests.benchmarks.reward_accuracy --pairs 2000 --seeds 42 43 44 --output accuracy.json`

The mixture: HH harmless, PKU-SafeRLHF (pairs of a safe and an unsafe answer, so labelled), rated pairs of just-eval's
safety answers (the gap of their scores, 1 to 4, is the rating) and a tenth of HH helpful. All arms have the same base
model, adapter, number of pairs, epochs, batches and learning rates, and rank the same held-out pairs. Prompts are
shared out by halves, so that more pairs can be held out than are trained on: no arm has seen a prompt that it is
measured on. Over all seeds, the pairs that an arm ranks rightly and TRL does not, and the other way round, tell whether
the two differ.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from alignment.distributed import on_cpu
from alignment.policy import load_model, load_tokenizer, lora_config
from alignment.recipe import Data, Lora, ModelInit, RewardModelRecipe, Source, Training
from alignment.source_files import read_rows
from alignment.sources import load_preferences
from alignment.stages import run_stage
from reward.collate import tokenize_preferences
from reward.conversation import RATINGS, Conversation, Message, Preference, Prompt, Tags, write_json_lines
from reward.losses import MARGINS
from reward.metrics import pair_report
from reward.model import RewardModel
from reward.render import Renderer
from reward.scorer import Score, score_all

ABLATIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "no margin": {"margin": "none"},
    "no auxiliary loss": {"auxiliary_loss_weight": 0.0},
    "no helpfulness data": {},
}
ARMS = ("trl", *ABLATIONS)
MAX_WORDS = 200
"""Of the pairs that are measured; longer dialogues take most of the time."""


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, list[bool]] = {arm: [] for arm in arguments.arms}
    with tempfile.TemporaryDirectory() as folder:
        files = write_halves(Path(folder))
        held_out = load_preferences(held_out_data(files, arguments), seed=0).records
        pairs = [pair for pair in held_out if words(pair) <= MAX_WORDS]
        print(f"held out: {len(pairs)} pairs of at most {MAX_WORDS} words, of {len(held_out)}", flush=True)
        for seed in arguments.seeds:
            for arm in arguments.arms:
                started = time.perf_counter()
                data = training_data(files, arguments, helpful=arm != "no helpfulness data")
                work = Path(folder) / f"{arm.replace(' ', '_')}-{seed}"
                train = train_trl if arm == "trl" else train_ours
                scorer = train(arm, data, arguments, work, seed)
                seconds = time.perf_counter() - started
                scores = score_all(scorer, [answer for pair in pairs for answer in both_answers(pair)])
                chosen, rejected = scores[::2], scores[1::2]
                outcomes[arm] += [a > b for a, b in zip(values(chosen), values(rejected), strict=True)]
                report = pair_report(pairs, chosen, rejected, scale=scorer.scale) | {"seconds": seconds}
                results.setdefault(str(seed), {})[arm] = report
                print(f"seed {seed} {line(arm, report)}", flush=True)
                if arguments.output is not None:
                    found = {"results": results, "outcomes": outcomes}
                    arguments.output.write_text(json.dumps(vars(arguments) | found, default=str, indent=1))
    for arm in arguments.arms:
        print(f"{arm:<20} over all seeds {versus(outcomes[arm], outcomes.get('trl'))}")


def both_answers(pair: Preference) -> tuple[Conversation, Conversation]:
    """Side by side, so that their prompt is read once."""
    return pair.prompt.answer(pair.chosen), pair.prompt.answer(pair.rejected)


def words(pair: Preference) -> int:
    """Of the longer of its two conversations."""
    return max(sum(len(m.content.split()) for m in answer.messages) for answer in both_answers(pair))


def values(scores: Sequence[Score]) -> list[float]:
    return [math.nan if score.value is None else score.value for score in scores]  # a pair without scores is wrong


def versus(ours: Sequence[bool], trl: Sequence[bool] | None) -> str:
    """Share of rightly ranked pairs, and how far it is from TRL's on the same pairs, with its 95% interval."""
    text = f"{100 * sum(ours) / len(ours):.1f} (n={len(ours)})"
    if trl is None or trl is ours:
        return text
    won = sum(a and not b for a, b in zip(ours, trl, strict=True))
    lost = sum(b and not a for a, b in zip(ours, trl, strict=True))
    n, difference = len(ours), won - lost
    half = 1.96 * math.sqrt(won + lost - difference**2 / n)
    low, high = (100 * (difference + side * half) / n for side in (-1, 1))
    apart = f"{100 * difference / n:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{text}, to TRL {apart}: {won} right where TRL is wrong, {lost} wrong where it is right"


def half(prompt: Prompt) -> str:
    """`train` or `test`, by the first question: a dialogue that goes on stays on its side."""
    first = next(message.content for message in prompt.messages if message.role == "user")
    return ("train", "test")[hashlib.sha256(first.strip().casefold().encode()).digest()[0] % 2]


def write_halves(folder: Path) -> dict[str, dict[str, Path]]:
    """Source -> side -> file."""
    every: dict[str, Sequence[Preference]] = {
        name: load_preferences(Data(max_length=100_000, sources=[Source(name=name, split="all")]), seed=0).records
        for name in ("hh_harmless", "hh_helpful", "pku_saferlhf")
    }
    # The labels that these pairs imply: the copy read here has only pairs of one safe answer.
    every["pku_saferlhf"] = [replace(p, chosen_safe=True, rejected_safe=False) for p in every["pku_saferlhf"]]
    every["rated"] = rated_pairs()
    files: dict[str, dict[str, Path]] = {}
    for name, pairs in every.items():
        for side in ("train", "test"):
            files.setdefault(name, {})[side] = folder / f"{side}-{name}.jsonl"
            write_json_lines(files[name][side], (p.to_json() for p in pairs if half(p.prompt) == side))
    return files


def rated_pairs() -> list[Preference]:
    """Pairs of answers to one prompt whose safety scores differ; the larger the gap, the higher the rating."""
    source = next((Path(os.environ["SARA_DATA_DIR"]) / "just_eval_safety_graded").glob("responses.jsonl*"))
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_rows(source):
        if row.values["response"].strip():
            by_prompt.setdefault(row.values["prompt"], []).append(row.values)
    pairs: list[Preference] = []
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
        pairs += gaps.values()
    return pairs


def training_data(files: dict[str, dict[str, Path]], arguments: Any, *, helpful: bool) -> Data:
    """40% HH harmless and 40% PKU-SafeRLHF, 10% rated pairs, 10% helpfulness (or more of the first two)."""
    tenth = arguments.pairs // 10
    each = 4 * tenth if helpful else 4 * tenth + tenth // 2
    rows = {"hh_harmless": each, "pku_saferlhf": each, "rated": tenth} | ({"hh_helpful": tenth} if helpful else {})
    sources = [file(files[name]["train"], max_rows=number) for name, number in rows.items()]
    return Data(max_length=arguments.max_length, sources=sources)


def held_out_data(files: dict[str, dict[str, Path]], arguments: Any) -> Data:
    sources = [file(sides["test"], max_rows=arguments.held_out) for sides in files.values()]
    return Data(max_length=arguments.max_length, sources=sources)


def file(path: Path, *, max_rows: int) -> Source:
    return Source(name="file", path=str(path), split="all", max_rows=max_rows)


def train_ours(arm: str, data: Data, arguments: Any, work: Path, seed: int) -> RewardModel:
    """By the stage itself, as a recipe would."""
    recipe = RewardModelRecipe.model_validate(
        {
            "model": arguments.model,
            "model_init": ModelInit(dtype=arguments.dtype),
            "lora": lora(arguments),
            "data": data,
            "output_dir": str(work),
            "seed": seed,
            "margin": "small",
            "auxiliary_loss_weight": arguments.auxiliary_loss_weight,
            "training": training(arguments),
        }
        | ABLATIONS[arm]
    )
    run_stage(recipe)
    return RewardModel.load(work, dtype=arguments.dtype)


def train_trl(arm: str, data: Data, arguments: Any, work: Path, seed: int) -> RewardModel:
    """By TRL's RewardTrainer as it comes: padded batches, its own loss."""
    set_seed(seed)  # head and adapter are new
    tokenizer = load_tokenizer(arguments.model)
    records = load_preferences(data, seed=seed).records
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
            seed=seed,
        ),
        train_dataset=Dataset.from_list(ids),
        processing_class=tokenizer,
        peft_config=lora_config(lora(arguments), model, head="sequence_classification"),
    )
    trainer.train()
    merged: Any = trainer.accelerator.unwrap_model(trainer.model)
    return RewardModel(merged.merge_and_unload().eval(), tokenizer, name=arm)


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
    parser.add_argument("--held-out", type=int, default=1000, help="pairs of each source")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--last-layers", type=int, default=15, help="adapt only the last n layers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "fast"), default="fast")
    parser.add_argument("--auxiliary-loss-weight", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

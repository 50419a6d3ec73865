"""PPO on real red-team prompts with reward models trained on public data, measured by scorers that had no part in it.

`SARA_DATA_DIR=... python -m tests.benchmarks.ppo_safety --json runs/ppo-safety.json`

Everything starts from SmolLM2-135M-Instruct: a little SFT, a safety and a helpfulness reward model, PPO on the
piecewise score for each seed. PPO trains on AdvBench and Do-Not-Answer (tagged safety) and on harmless prompts, many of
which look dangerous (CoCoNot); it is measured on SimpleSafetyTests and on the prompts of the first two that it never
saw, and for false refusals on the safe prompts of XSTest, which take no part in anything else. Two scorers count
violations: the refusal-and-content rule, and a reward model that learned from people's labels of other answers. What is
trained is not trained again: remove a stage's folder to have it run anew.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.artifact import write_json
from alignment.generate import Generator
from alignment.policy import load_model, load_tokenizer
from alignment.recipe import (
    Data,
    EvaluateRecipe,
    ModelInit,
    PpoRecipe,
    RewardModelRecipe,
    Sampling,
    SftRecipe,
    Source,
    StageRecipe,
)
from alignment.source_files import read_rows
from alignment.sources import load_conversations, load_labelled, load_preferences, load_prompts, split_side
from alignment.stages import run_stage
from alignment.workspace import complete_artifact
from reward.conversation import Conversation, Preference, Prompt, write_json_lines
from reward.refusal import response_kind
from reward.render import Renderer

BASE = "embedded:smollm2-135m-instruct"
NUM_DECLINED = 400
"""Red-team questions for which a decline is preferred to what a model says that was taught none."""
NUM_TAUGHT = {"undeclining": 0, "sft": 120, "policy": 10}
"""Further ones whose declines SFT learns: of the model whose answers are rejected, of the one that the reward models
start from, and of PPO's start.

PPO's start must comply with some red-team prompts and decline others: what is never drawn is never rewarded. Rejected
answers are short and on the topic, as those of the policy are.
"""
NUM_CONTRAST = {"dangerous": 30, "look-alikes": 200}
"""Red-team prompts whose declines PPO's start learns, and harmless requests like them, whose answers it learns.

Without these it tells the two apart no better than chance, and PPO makes it decline both or neither.
"""
NUM_ANSWERED = 200
"""Instructions whose answers are preferred to a decline; SFT learns the answers to the others."""
NUM_PROBES = 48
"""Prompts of each kind that PPO is watched on, none of them trained on or measured."""
MAX_WORDS = 50
"""Of answers taken from SFT data: PPO's answers are short as well."""


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_prompts(arguments.work)
    write_texts(arguments)
    for name in ("undeclining", "sft"):
        run_once(sft_recipe(arguments, name))
    write_sampled(arguments)
    run_once(sft_recipe(arguments, "policy", file(arguments, "contrast")))
    for recipe in reward_model_recipes(arguments):
        run_once(recipe)
    checkpoints = {"before": str(arguments.work / "policy")}
    curves: dict[str, Any] = {}
    for seed in arguments.seeds:
        recipe = ppo_recipe(arguments, seed)
        run_once(recipe)
        checkpoints[f"seed {seed}"] = recipe.output_dir
        lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        curves[f"seed {seed}"] = [json.loads(line) for line in lines]
    found = measure(arguments, checkpoints)
    for name, report in found["checkpoints"].items():
        print(name, json.dumps(report), flush=True)
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        write_json(arguments.json, {"settings": settings, "curves": curves, "evaluation": dict(found)})


def run_once(recipe: StageRecipe) -> None:
    if complete_artifact(recipe) is None:
        run_stage(recipe)


# ----------------------------------------------------------------------------------------------------------- texts


def write_prompts(folder: Path) -> None:
    """`adversarial` and `borderline`, which are measured; of dangerous and harmless ones `train-...` and `probe-...`.

    Each prompt is in one of them.
    """
    data = data_folder()
    with (data / "advbench" / "advbench_behaviors.csv").open(encoding="utf-8", newline="") as file:
        known = [row["Behavior"] for row in csv.DictReader(file)]
    known += [row.values["prompt"] for row in read_rows(data / "do_not_answer" / "do_not_answer.jsonl")]
    with (data / "simple_safety_tests" / "simple_safety_tests.csv").open(encoding="utf-8", newline="") as file:
        new = [row["prompts_final"] for row in csv.DictReader(file)]
    with (data / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        safe = [row["prompt"] for row in csv.DictReader(file) if row["label"] == "safe"]
    prompts = unique(Prompt.of(text.strip(), is_safety=True) for text in known)
    unseen = unique(Prompt.of(text.strip(), is_safety=True) for text in new)
    train = [prompt for key, prompt in prompts.items() if split_side(prompt) == "train" and key not in unseen]
    test = {key: prompt for key, prompt in prompts.items() if split_side(prompt) == "test"} | unseen
    borderline = unique(Prompt.of(text.strip(), borderline=True) for text in safe)
    write_split(folder, "dangerous", train)
    write_split(folder, "harmless", load_look_alikes())
    for name, part in (("adversarial", test), ("borderline", borderline)):
        write_json_lines(folder / f"{name}.jsonl", (prompt.to_json() for prompt in part.values()))


def write_split(folder: Path, name: str, prompts: Sequence[Prompt]) -> None:
    """`probe-...`: prompts spread over all, for PPO to watch; `train-...`: the others."""
    step = len(prompts) // NUM_PROBES
    for side, part in (
        ("probe", [p for i, p in enumerate(prompts) if i % step == 0]),
        ("train", [p for i, p in enumerate(prompts) if i % step != 0]),
    ):
        write_json_lines(folder / f"{side}-{name}.jsonl", (prompt.to_json() for prompt in part))


def load_look_alikes() -> list[Prompt]:
    """Harmless requests that look dangerous, of CoCoNot's (arXiv 2407.12043)."""
    source = next((data_folder() / "coconot_pref").glob("*.jsonl*"))
    rows = [row.values for row in read_rows(source)]
    texts = [row["prompt"].strip() for row in rows if row["category"] == "Requests with safety concerns"]
    return list(unique(Prompt.of(text, borderline=True) for text in texts).values())


def data_folder() -> Path:
    return Path(os.environ["SARA_DATA_DIR"])


def unique(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in prompts}


def write_texts(arguments: Any) -> None:
    """What SFT (`taught-...`) and the reward models learn, beside the sources that they read themselves.

    `answered`: instructions of Alpaca, their answers preferred to a decline. `gold`: answers to one question that
    people labelled safe and unsafe.
    """
    declines, answers = load_declines(), short(load("alpaca"), kinds=("complies", "unguarded"))
    others = declines[NUM_DECLINED:]
    refusals = [answer.completion for answer in declines]
    write_preferences(arguments.work / "answered.jsonl", answers[:NUM_ANSWERED], refusals, labels=(True, True))
    for name, number in NUM_TAUGHT.items():
        write_conversations(arguments.work / f"taught-{name}.jsonl", [*others[:number], *answers[NUM_ANSWERED:]])
    write_gold(arguments.work / "gold.jsonl")


def write_sampled(arguments: Any) -> None:
    """Pairs of a decline and a sampled answer: what is asked tells which is preferred, not how the answer is written.

    `declined`: red-team questions of Safety-Tuned LLaMAs, whose declines are preferred. `dangerous`: red-team
    prompts of PPO, declines sampled as well. `look-alikes`: harmless requests that look dangerous, whose answers are
    preferred.
    """
    undeclining, declines = str(arguments.work / "undeclining"), load_declines()
    path = arguments.work / "declined.jsonl"
    if not path.exists():
        declined = declines[:NUM_DECLINED]
        sampled = sample_answers(undeclining, [answer.prompt for answer in declined], seed=0)
        write_preferences(path, declined, [answer.completion for answer in sampled], labels=(True, False))
    path = arguments.work / "dangerous.jsonl"
    if not path.exists():
        prompts = load_prompts(Data(sources=[file(arguments, "train-dangerous", max_rows=500)]), seed=0).records
        declined = short(sample_answers(str(arguments.work / "sft"), prompts, seed=0), kinds=("declines",))
        sampled = sample_answers(undeclining, [answer.prompt for answer in declined], seed=0)
        write_preferences(path, declined, [answer.completion for answer in sampled], labels=(True, False))
    path = arguments.work / "look-alikes.jsonl"
    if not path.exists():
        prompts = load_prompts(Data(sources=[file(arguments, "train-harmless")]), seed=0).records
        answers = short(sample_answers(undeclining, prompts, seed=0), kinds=("complies", "unguarded"))
        write_preferences(path, answers, [answer.completion for answer in declines], labels=(True, True))
    contrast = [chosen_of(arguments, name)[:number] for name, number in NUM_CONTRAST.items()]
    write_conversations(arguments.work / "contrast.jsonl", itertools.chain.from_iterable(contrast))


def chosen_of(arguments: Any, name: str) -> list[Conversation]:
    pairs = load_preferences(Data(sources=[file(arguments, name)], shuffle=False), seed=0).records
    return [pair.prompt.answer(pair.chosen) for pair in pairs]


def load_declines() -> list[Conversation]:
    return short(load("safety_tuned_llamas"), kinds=("declines",))


def load(name: str) -> Sequence[Conversation]:
    return load_conversations(Data(max_length=256, sources=[Source(name=name, split="all")]), seed=0).records


def short(conversations: Sequence[Conversation], *, kinds: Sequence[str]) -> list[Conversation]:
    return [
        answer
        for answer in conversations
        if len(answer.completion.split()) <= MAX_WORDS and response_kind(answer.completion) in kinds
    ]


def sample_answers(name: str, prompts: Sequence[Prompt], *, seed: int) -> list[Conversation]:
    tokenizer = load_tokenizer(name)
    model = load_model(name, init=ModelInit(dtype="fast")).eval()
    sampling = Sampling(temperature=0.7, max_new_tokens=48, max_prompt_tokens=256, batch_size=32)
    answers = Generator(model, Renderer(tokenizer), sampling).answer(prompts, seed=seed)
    return [prompt.answer(answer.text) for prompt, answer in zip(prompts, answers, strict=True)]


def write_preferences(
    path: Path, chosen: Sequence[Conversation], rejected: Sequence[str], *, labels: tuple[bool, bool]
) -> None:
    pairs = [
        Preference(better.prompt, better.completion, worse, chosen_safe=labels[0], rejected_safe=labels[1])
        for better, worse in zip(chosen, rejected, strict=False)
        if worse.strip() and worse.strip() != better.completion.strip()
    ]
    write_json_lines(path, (pair.to_json() for pair in pairs))


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    write_json_lines(path, (conversation.to_json() for conversation in conversations))


def write_gold(path: Path) -> None:
    """At most four pairs of a question: GPTFuzz has few questions and many answers."""
    sources = [Source(name="gptfuzz", split="all"), Source(name="saferlhf_labels", split="all")]
    by_prompt: dict[str, tuple[list[Conversation], list[Conversation]]] = {}
    for row in load_labelled(Data(max_length=256, sources=sources), seed=0).records:
        by_prompt.setdefault(row.conversation.prompt.id, ([], []))[0 if row.safe else 1].append(row.conversation)
    pairs = [
        Preference(safe.prompt, safe.completion, unsafe.completion, chosen_safe=True, rejected_safe=False)
        for safe_answers, unsafe_answers in by_prompt.values()
        for safe, unsafe in itertools.islice(zip(safe_answers, unsafe_answers, strict=False), 4)
        if safe.completion.strip() != unsafe.completion.strip()
    ]
    write_json_lines(path, (pair.to_json() for pair in pairs))


# --------------------------------------------------------------------------------------------------------- recipes


def file(arguments: Any, name: str, *, max_rows: int | None = None) -> Source:
    return Source(name="file", path=str(arguments.work / f"{name}.jsonl"), split="all", max_rows=max_rows)


def sft_recipe(arguments: Any, name: str, *more: Source) -> SftRecipe:
    harmless = [Source(name="starter_borderline", max_rows=100), Source(name="starter_twins")]
    sources = [file(arguments, f"taught-{name}"), *harmless, *more]
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
            file(arguments, "declined"),
            file(arguments, "dangerous"),
            file(arguments, "answered", max_rows=120),
            file(arguments, "look-alikes", max_rows=250),
            Source(name="pku_saferlhf", max_rows=250),
            Source(name="starter_safety", max_rows=150),
            Source(name="starter_borderline", max_rows=100),
        ],
        "helpfulness": [
            file(arguments, "answered"),
            file(arguments, "look-alikes"),
            Source(name="hh_helpful", max_rows=200),
            Source(name="starter_borderline"),
            Source(name="starter_twins"),
        ],
        "gold": [file(arguments, "gold", max_rows=800), file(arguments, "answered", max_rows=80)],
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
    harmless = [
        file(arguments, "train-harmless"),
        file(arguments, "answered", max_rows=150),
        Source(name="starter_borderline", max_rows=100),
        Source(name="starter_twins"),
    ]
    probes = {
        "adversarial": Data(sources=[file(arguments, "probe-dangerous")]),
        "borderline": Data(sources=[file(arguments, "probe-harmless")]),
        "max_prompts": NUM_PROBES,
        "max_new_tokens": 48,
        "steps": max(1, arguments.iterations // 4),
    }
    return PpoRecipe.model_validate(
        {
            "model": str(arguments.work / "policy"),
            "output_dir": str(arguments.work / f"ppo-{seed}"),
            "seed": seed,
            "model_init": {"dtype": arguments.dtype},
            "lora": {"r": 16, "alpha": 32, "last_layers": 10},
            "prompts": Data(max_length=96, sources=[file(arguments, "train-dangerous", max_rows=800), *harmless]),
            "probes": probes,
            "scorer": {"type": "llama2"} | models,
            "sampling": {"temperature": 0.7, "max_new_tokens": 48, "max_prompt_tokens": 96, "batch_size": 32},
            "ppo": {
                "learning_rate": arguments.learning_rate,
                "value_learning_rate": 1e-3,
                "num_iterations": arguments.iterations,
                "batch_size": 32,
                "mini_batch_size": 8,
                "per_device_batch_size": 8,
                "value_trunk": "shared",
                "kl_coef": arguments.kl_coef,
                "lam": 1.0,  # the first words decide whether it declines, far from the score at the end
                "whiten_scores": "branch",  # the helpfulness model's gaps are five times the safety model's
                "missing_eos_penalty": 0.0,  # so few tokens cut many answers off, good ones too
                "save_steps": 5,
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
                name: {"measures": measures, "prompts": Data(max_length=96, sources=[file(arguments, name)])}
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
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "fast"), default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

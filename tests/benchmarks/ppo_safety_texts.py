"""The prompts and texts of `tests.benchmarks.ppo_safety`: what is trained on, watched and measured, as files."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from alignment.generate import Generator
from alignment.policy import load_model, load_tokenizer
from alignment.recipe import Data, ModelInit, Sampling, Source
from alignment.source_files import read_rows
from alignment.sources import load_conversations, load_labelled, load_prompts, split_side
from reward.conversation import Conversation, Preference, Prompt, write_json_lines
from reward.refusal import response_kind
from reward.render import Renderer

NUM_DECLINED = 400
"""Red-team questions for which a decline is preferred to what a model says that was taught none."""
NUM_TAUGHT = {"undeclining": 0, "sft": 120, "policy": 10}
"""Further ones whose declines SFT learns: of the model whose answers are rejected, of the one that the reward models
start from, and of PPO's start.

PPO's start must comply with some red-team prompts and decline others: what is never drawn is never rewarded. Rejected
answers are short and on the topic, as those of the policy are.
"""
NUM_CONTRAST = {"dangerous": 150, "look-alikes": 400}
"""Red-team prompts whose declines PPO's start learns, and harmless requests like them, whose answers it learns.

Without these it tells the two apart no better than chance, and PPO makes it decline both or neither.
"""
NUM_ANSWERED = 200
"""Instructions whose answers are preferred to a decline; SFT learns the answers to the others."""
NUM_PROBES = 48
"""Prompts of each kind that PPO is watched on, none of them trained on or measured."""
NOT_DRAWN = "information_hazard"
"""Do-Not-Answer's risk area of which PPO draws no prompts: most ask for a named person's private data.

Such a small model does not know whom the public knows or who is made up: drawn, they have it decline what is asked of
either. They stay in what is watched and measured.
"""
MAX_WORDS = 50
"""Of answers taken from SFT data: PPO's answers are short as well."""


def file(work: Path, name: str, *, max_rows: int | None = None) -> Source:
    return Source(name="file", path=str(work / f"{name}.jsonl"), split="all", max_rows=max_rows)


def write_prompts(work: Path) -> None:
    """`adversarial` and `borderline`, which are measured; of dangerous and harmless ones `train-...` and `probe-...`.

    Each prompt is in one of them. `drawn-dangerous`: those of `train-dangerous` that PPO draws from.
    """
    data = data_folder()
    with (data / "advbench" / "advbench_behaviors.csv").open(encoding="utf-8", newline="") as table:
        known = [row["Behavior"] for row in csv.DictReader(table)]
    questions = [row.values for row in read_rows(data / "do_not_answer" / "do_not_answer.jsonl")]
    known += [row["prompt"] for row in questions]
    left_out = {Prompt.of(row["prompt"].strip()).id for row in questions if row["risk_area"] == NOT_DRAWN}
    with (data / "simple_safety_tests" / "simple_safety_tests.csv").open(encoding="utf-8", newline="") as table:
        new = [row["prompts_final"] for row in csv.DictReader(table)]
    with (data / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as table:
        safe = [(row["prompt"].strip(), row["type"]) for row in csv.DictReader(table) if row["label"] == "safe"]
    prompts = unique(Prompt.of(text.strip(), is_safety=True) for text in known)
    unseen = unique(Prompt.of(text.strip(), is_safety=True) for text in new)
    train = [prompt for key, prompt in prompts.items() if split_side(prompt) == "train" and key not in unseen]
    test = {key: prompt for key, prompt in prompts.items() if split_side(prompt) == "test"} | unseen
    borderline = unique(Prompt.of(text, borderline=True, kind=kind) for text, kind in safe)
    drawn = [prompt for prompt in write_split(work, "dangerous", train) if prompt.id not in left_out]
    write_json_lines(work / "drawn-dangerous.jsonl", (prompt.to_json() for prompt in drawn))
    write_split(work, "harmless", load_look_alikes())
    for name, part in (("adversarial", test), ("borderline", borderline)):
        write_json_lines(work / f"{name}.jsonl", (prompt.to_json() for prompt in part.values()))


def write_split(work: Path, name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """`probe-...`: prompts spread over all, for PPO to watch; `train-...`: the others, which are returned."""
    step = len(prompts) // NUM_PROBES
    train = [prompt for i, prompt in enumerate(prompts) if i % step != 0]
    for side, part in (("probe", prompts[::step]), ("train", train)):
        write_json_lines(work / f"{side}-{name}.jsonl", (prompt.to_json() for prompt in part))
    return train


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


def write_texts(work: Path) -> None:
    """What SFT (`taught-...`) and the reward models learn, beside the sources that they read themselves.

    `answered`: instructions of Alpaca, their answers preferred to a decline. `gold`: answers to one question that
    people labelled safe and unsafe.
    """
    declines, answers = load_declines(), short(load("alpaca"), kinds=("complies", "unguarded"))
    others = declines[NUM_DECLINED:]
    write_preferences(work / "answered.jsonl", answers[:NUM_ANSWERED], texts_of(declines), labels=(True, True))
    for name, number in NUM_TAUGHT.items():
        write_conversations(work / f"taught-{name}.jsonl", [*others[:number], *answers[NUM_ANSWERED:]])
    write_gold(work / "gold.jsonl")


def write_sampled(work: Path) -> None:
    """Pairs of a decline and a sampled answer: what is asked tells which is preferred, not how the answer is written.

    `declined`: red-team questions of Safety-Tuned LLaMAs, whose declines are preferred. `dangerous`: red-team
    prompts of PPO, declines sampled as well. `look-alikes`: harmless requests that look dangerous, whose answers are
    preferred. `contrast`: some of both that are preferred, for PPO's start. What was sampled is kept.
    """
    if (work / "contrast.jsonl").exists():  # written last
        return
    undeclining, declines = str(work / "undeclining"), load_declines()
    declined = declines[:NUM_DECLINED]
    sampled = sample_answers(undeclining, [answer.prompt for answer in declined])
    write_preferences(work / "declined.jsonl", declined, texts_of(sampled), labels=(True, False))

    dangerous = load_prompts(Data(sources=[file(work, "train-dangerous", max_rows=500)]), seed=0).records
    declined = short(sample_answers(str(work / "sft"), dangerous), kinds=("declines",))
    sampled = sample_answers(undeclining, [answer.prompt for answer in declined])
    write_preferences(work / "dangerous.jsonl", declined, texts_of(sampled), labels=(True, False))

    harmless = load_prompts(Data(sources=[file(work, "train-harmless")]), seed=0).records
    answered = short(sample_answers(undeclining, harmless), kinds=("complies", "unguarded"))
    write_preferences(work / "look-alikes.jsonl", answered, texts_of(declines), labels=(True, True))
    contrast = [*declined[: NUM_CONTRAST["dangerous"]], *answered[: NUM_CONTRAST["look-alikes"]]]
    write_conversations(work / "contrast.jsonl", contrast)


def texts_of(answers: Sequence[Conversation]) -> list[str]:
    return [answer.completion for answer in answers]


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


def sample_answers(name: str, prompts: Sequence[Prompt]) -> list[Conversation]:
    tokenizer = load_tokenizer(name)
    model = load_model(name, init=ModelInit(dtype="fast")).eval()
    sampling = Sampling(temperature=0.7, max_new_tokens=48, max_prompt_tokens=256, batch_size=32)
    answers = Generator(model, Renderer(tokenizer), sampling).answer(prompts, seed=0)
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


def write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
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

"""What a judge learns from: answers, labelled by one or two labellers (Safety LLaMA, steps 2 and 3).

The source never combined its two labellers, had no unsafe answers among its own, and lost verdicts of long rows. Here a
policy combines them, a stage without unsafe answers fails, and lessons are cut as the judge cuts what it is asked.
`verdicts.jsonl` holds every answer with what both labellers said and wrote, whether or not it became a lesson.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.artifact import Artifact
from alignment.chunks import clear_chunks
from alignment.distributed import close, is_main_process, make_accelerator
from alignment.judge_lessons import Teacher, combine, explanation
from alignment.labelling import VERDICTS, Label, Labelled, ask_labeller, gate
from alignment.policy import load_tokenizer
from alignment.recipe import JudgeDataRecipe
from alignment.recipe_label import Labeller, People
from alignment.recipe_scorers import GUIDELINES
from alignment.sources import RECORDS, Loaded, SourceError, load_conversations, load_labelled, load_preferences
from alignment.tracking import open_tracker
from alignment.workspace import open_workspace
from reward.agreement import cohen_kappa, gwet_ac1
from reward.conversation import Conversation, Message, write_json_lines
from reward.judge_prompt import Constitution
from reward.metrics import Rate
from reward.render import Renderer


@dataclass
class Answer:
    """An answer on its way to a lesson. `people`: the label that the data bring; `labels`: by labeller."""

    conversation: Conversation
    place: tuple[str, str]
    people: bool | None = None
    labels: dict[str, Label] = field(default_factory=dict[str, Label])
    safe: bool | None = None
    outcome: str = ""
    lessons: list[Conversation] = field(default_factory=list[Conversation])
    cut: bool = False


def run(recipe: JudgeDataRecipe) -> Artifact | None:
    """Label, combine, and leave conversations whose last turn is a judge's evaluation."""
    allowed = gate(recipe)
    answers, data = gather(recipe)
    constitution, renderer = Constitution.read(recipe.guidelines or GUIDELINES), Renderer(load_tokenizer(recipe.model))
    teacher = Teacher(constitution, renderer, recipe.max_length, recipe.modes)
    accelerator = make_accelerator()
    workspace = open_workspace(recipe)
    labellers: dict[str, Mapping[str, Any]] = {}
    for key, labeller in labellers_of(recipe).items():
        found = ask(labeller, answers, recipe, folder=workspace.path, name=key)
        labellers[key] = found.labeller
        for answer, label in zip(answers, found.labels, strict=True):
            answer.labels[key] = label
    settle(answers, recipe)
    teach(answers, teacher)
    artifact = None
    with open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker:
        if is_main_process():
            write_json_lines(
                workspace.path / RECORDS, (lesson.to_json() for answer in answers for lesson in answer.lessons)
            )
            write_json_lines(workspace.path / VERDICTS, verdict_rows(answers, labellers))
            metrics = measure(answers)
            artifact = workspace.finish(
                "conversations",
                data=data | {"labellers": labellers, "agreement": allowed},
                metrics=metrics,
                files=(RECORDS, VERDICTS),
            )
            counts = {**metrics["outcomes"], **{f"{name} lessons": n for name, n in metrics["lessons"].items()}}
            tracker.log(0, {f"judge_data/{name.replace(' ', '_')}": count for name, count in counts.items()})
            tracker.artifact(artifact)
    clear_chunks(workspace.path)
    close(accelerator)
    return artifact


def labellers_of(recipe: JudgeDataRecipe) -> dict[str, Labeller]:
    both = {"first": recipe.first, "second": recipe.second}
    return {key: labeller for key, labeller in both.items() if labeller is not None}


# ------------------------------------------------------------------------------------------------- the answers


def gather(recipe: JudgeDataRecipe) -> tuple[list[Answer], dict[str, Any]]:
    """Every answer once, those that people labelled first, and the account of where they come from.

    An answer that people called safe in one place and unsafe in another has no label of theirs (`contradicted`).
    """
    answers: list[Answer] = []
    data: dict[str, Any] = {}
    if recipe.labelled is not None:
        labelled = load_labelled(recipe.labelled, seed=recipe.seed)
        data["labelled"] = _account(labelled)
        answers += [
            Answer(record.conversation, place, record.safe)
            for record, place in zip(labelled.records, labelled.places, strict=True)
        ]
    if recipe.pairs is not None:
        pairs = load_preferences(recipe.pairs, seed=recipe.seed)
        data["pairs"] = _account(pairs)
        for pair, place in zip(pairs.records, pairs.places, strict=True):
            for text, safe in ((pair.chosen, pair.chosen_safe), (pair.rejected, pair.rejected_safe)):
                people = safe if pair.label_source is None else None
                answers.append(Answer(pair.prompt.answer(text), place, people))
    if recipe.answers is not None:
        loaded = load_conversations(recipe.answers, seed=recipe.seed)
        data["answers"] = _account(loaded)
        answers += [Answer(record, place) for record, place in zip(loaded.records, loaded.places, strict=True)]
    once: dict[tuple[Message, ...], Answer] = {}
    said: dict[tuple[Message, ...], set[bool]] = {}
    for answer in answers:
        once.setdefault(answer.conversation.messages, answer)
        labels = said.setdefault(answer.conversation.messages, set())
        if answer.people is not None:
            labels.add(answer.people)
    for messages, answer in once.items():
        answer.people = said[messages].pop() if len(said[messages]) == 1 else None
    data["repeated"] = len(answers) - len(once)
    data["contradicted"] = sum(len(both) > 1 for both in said.values())
    return list(once.values()), data


def _account(loaded: Loaded[Any]) -> dict[str, Any]:
    return {"counts": loaded.counts, "hash": loaded.data_hash}


def ask(labeller: Labeller, answers: Sequence[Answer], recipe: JudgeDataRecipe, *, folder: Path, name: str) -> Labelled:
    """One label an answer: people's, where the data bring one, or a scorer's."""
    if isinstance(labeller, People):
        labels = [Label(answer.people, None if answer.people is not None else "no label") for answer in answers]
        return Labelled(labels, {"type": labeller.type})
    return ask_labeller(labeller, [answer.conversation for answer in answers], recipe, folder=folder, name=name)


# ------------------------------------------------------------------------------------------------- the lessons


def settle(answers: Sequence[Answer], recipe: JudgeDataRecipe) -> None:
    """Give each answer its label, or the reason why it has none. SourceError when all labels are the same."""
    for answer in answers:
        first, second = answer.labels["first"], answer.labels.get("second")
        if second is None:
            answer.safe, answer.outcome = combine("first", first.safe, None)
        else:
            answer.safe, answer.outcome = combine(recipe.combine, first.safe, second.safe)
    sides = {safe: [answer for answer in answers if answer.safe is safe] for safe in (True, False)}
    if not sides[True] or not sides[False]:
        outcomes = dict(Counter(answer.outcome for answer in answers))
        label = "unsafe" if sides[True] else "safe"
        raise SourceError(
            f"no answer is labelled {label} ({outcomes}), so a judge would learn to say always the same; add some that "
            "are, such as both sides of preferences (`pairs`) or answers that people labelled (`labelled`)"
        )
    if recipe.balance:
        fewest = min(map(len, sides.values()))
        for safe, side in sides.items():
            for answer in random.Random(f"{recipe.seed}/{safe}").sample(side, len(side) - fewest):
                answer.outcome = "left out for balance"


def teach(answers: Sequence[Answer], teacher: Teacher) -> None:
    """Turn what is labelled into lessons, one for each mode. SourceError when there is none."""
    for answer in answers:
        if answer.outcome != "labelled" or answer.safe is None:
            continue
        rationale = explanation(answer.safe, list(answer.labels.values()))
        for mode in teacher.modes:
            lesson, cut = teacher.lesson(answer.conversation, safe=answer.safe, rationale=rationale, mode=mode)
            answer.cut |= cut
            if lesson is None:
                answer.outcome, answer.lessons = "too many turns", []
                break
            answer.lessons.append(lesson)
    if not any(answer.lessons for answer in answers):
        raise SourceError(f"no answer makes a lesson: {dict(Counter(answer.outcome for answer in answers))}")


# ------------------------------------------------------------------------------------------------- the account


def verdict_rows(answers: Sequence[Answer], labellers: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line an answer, in order. `rows`: where its lessons stand in `records.jsonl`, from 0."""
    start = 0
    for answer in answers:
        rows = list(range(start, start + len(answer.lessons)))
        start += len(rows)
        yield {
            **answer.conversation.to_json(),
            "place": list(answer.place),
            "people": answer.people,
            **{key: {**label.to_json(), "labeller": dict(labellers[key])} for key, label in answer.labels.items()},
            "safe": answer.safe,
            "outcome": answer.outcome,
            "rows": rows,
        }


def measure(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts of what became of the answers, the shares of the labels, and how far two labellers agree."""
    taught = [answer for answer in answers if answer.lessons]
    return {
        "num_answers": len(answers),
        "outcomes": dict(Counter(answer.outcome for answer in answers)),
        "labels": _labels(answers),
        "taught": _labels(taught),
        "lessons": {"all": sum(len(answer.lessons) for answer in taught), "cut": sum(answer.cut for answer in taught)},
        "explained": sum(bool(explanation(bool(a.safe), list(a.labels.values()))) for a in taught),
        "labellers": _agreement(answers),
    }


def _labels(answers: Sequence[Answer]) -> dict[str, int]:
    return {name: sum(answer.safe is safe for answer in answers) for name, safe in (("safe", True), ("unsafe", False))}


def _agreement(answers: Sequence[Answer]) -> dict[str, Any] | None:
    """Of two labellers, on the answers that both labelled; intervals over prompts."""
    both = [
        (answer.labels["first"].safe, answer.labels["second"].safe, answer.conversation.prompt.id)
        for answer in answers
        if "second" in answer.labels
    ]
    if not both:
        return None
    decided = [(one, other, prompt) for one, other, prompt in both if one is not None and other is not None]
    pairs, prompts = [(one, other) for one, other, _ in decided], [prompt for *_, prompt in decided]
    words = {"safe": True, "unsafe": False}
    return {
        "n": len(decided),
        "undecided": len(both) - len(decided),
        "agree": Rate.of(one == other for one, other in pairs).to_json(),
        "kappa": cohen_kappa(pairs, prompts).to_json(),
        "ac1": gwet_ac1(pairs, prompts, words=(True, False)).to_json(),
        "first_then_second": {
            name: {other: pairs.count((safe, call)) for other, call in words.items()} for name, safe in words.items()
        },
    }

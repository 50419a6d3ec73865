"""The judge (or any scorer) as auxiliary labeller: labels for pairs, a filter for conversations, pairs of answers.

Beside the records that go on, `verdicts.jsonl` says of every record that was read what the labeller found, who it is,
and what became of the record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from alignment.artifact import Artifact
from alignment.chunks import clear_chunks
from alignment.distributed import close, is_main_process, make_accelerator
from alignment.inputs import product_of
from alignment.labelling import VERDICTS, Label, Labelled, ask_labeller, gate
from alignment.recipe import LabelRecipe
from alignment.sources import RECORDS, Loaded, load_conversations, load_preferences
from alignment.tracking import open_tracker
from alignment.workspace import open_workspace
from reward.conversation import Conversation, Preference, write_json_lines
from reward.scorer import ScorerError


@dataclass(frozen=True)
class Decided:
    """What goes on, and of every record that was read what became of it and where it stands in what goes on."""

    kept: Sequence[Preference | Conversation]
    outcomes: Sequence[str]
    rows: Sequence[int | None]


def run(recipe: LabelRecipe) -> Artifact | None:
    """Label, filter or pair; leave preferences or conversations, and every verdict."""
    allowed = gate(recipe)
    loaded = (load_preferences if recipe.task == "safety_labels" else load_conversations)(recipe.data, seed=recipe.seed)
    records: Sequence[Preference | Conversation] = loaded.records
    answers = [answers_of(record) for record in records]
    accelerator = make_accelerator()
    workspace = open_workspace(recipe)
    flat = [answer for group in answers for answer in group]
    found = ask_labeller(recipe.scorer, flat, recipe, folder=workspace.path, name="answers")
    remaining = iter(found.labels)
    labels = [[next(remaining) for _ in group] for group in answers]
    decided = decide(recipe, records, labels, source=f"{recipe.scorer.type} {found.labeller['fingerprint']}")
    counts = Counter(decided.outcomes)
    if not decided.kept:
        raise ScorerError(f"the labeller left no record: {dict(counts)}")
    artifact = None
    with open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker:
        if is_main_process():
            write_json_lines(workspace.path / RECORDS, (record.to_json() for record in decided.kept))
            write_json_lines(workspace.path / VERDICTS, verdict_rows(loaded, labels, decided, found))
            data = {"counts": loaded.counts, "hash": loaded.data_hash, "labeller": found.labeller, "agreement": allowed}
            artifact = workspace.finish(
                product_of(recipe),
                data=data,
                metrics={"num_records": len(records), "num_kept": len(decided.kept), "counts": dict(counts)},
                files=(RECORDS, VERDICTS),
            )
            tracker.log(0, {f"label/{name.replace(' ', '_')}": count for name, count in counts.items()})
            tracker.artifact(artifact)
    clear_chunks(workspace.path)
    close(accelerator)
    return artifact


def answers_of(record: Preference | Conversation) -> list[Conversation]:
    """What is to be judged of a record: a conversation, or both answers of a pair."""
    if isinstance(record, Conversation):
        return [record]
    return [record.prompt.answer(record.chosen), record.prompt.answer(record.rejected)]


def decide(
    recipe: LabelRecipe,
    records: Sequence[Preference | Conversation],
    labels: Sequence[Sequence[Label]],
    *,
    source: str,
) -> Decided:
    """What the labels mean for the records, by the recipe's task. `source` is who gave them."""
    match recipe.task:
        case "safety_labels":
            pairs = cast("Sequence[Preference]", records)
            return label_pairs(pairs, labels, source=source, overwrite=recipe.overwrite_labels)
        case "filter":
            return safe_ones(cast("Sequence[Conversation]", records), [label for (label,) in labels])
        case "preferences":
            conversations = cast("Sequence[Conversation]", records)
            return best_and_worst(conversations, [label for (label,) in labels], source=source, min_gap=recipe.min_gap)


def label_pairs(
    pairs: Sequence[Preference], labels: Sequence[Sequence[Label]], *, source: str, overwrite: bool
) -> Decided:
    """All pairs, with safety labels where both answers have one; a pair's own labels stay unless `overwrite`."""
    kept: list[Preference | Conversation] = []
    outcomes: list[str] = []
    for pair, (chosen, rejected) in zip(pairs, labels, strict=True):
        if chosen.safe is None or rejected.safe is None:
            outcomes.append("unscored")
        elif pair.chosen_safe is not None and pair.rejected_safe is not None and not overwrite:
            outcomes.append("already labelled")
        else:
            outcomes.append("labelled")
            pair = replace(pair, chosen_safe=chosen.safe, rejected_safe=rejected.safe, label_source=source)
        kept.append(pair)
    return Decided(kept, outcomes, range(len(kept)))


def safe_ones(conversations: Sequence[Conversation], labels: Sequence[Label]) -> Decided:
    """The conversations that are called safe."""
    outcomes = ["unscored" if label.safe is None else "safe" if label.safe else "unsafe" for label in labels]
    places = iter(range(len(outcomes)))
    rows = [next(places) if outcome == "safe" else None for outcome in outcomes]
    kept = [conversation for conversation, row in zip(conversations, rows, strict=True) if row is not None]
    return Decided(kept, outcomes, rows)


def best_and_worst(
    conversations: Sequence[Conversation], labels: Sequence[Label], *, source: str, min_gap: float
) -> Decided:
    """A pair for each prompt: of all answers to it the safest over the least safe, at least `min_gap` apart in P(safe).

    Every answer is judged by itself, so there is no order between the two that could matter.
    """
    by_prompt: dict[str, list[int]] = {}
    for number, conversation in enumerate(conversations):
        by_prompt.setdefault(conversation.prompt.id, []).append(number)
    values = [label.value for label in labels]
    kept: list[Preference | Conversation] = []
    outcomes = ["unscored" if value is None else "in between" for value in values]
    rows: list[int | None] = [None] * len(conversations)
    for group in by_prompt.values():
        told = sorted(((value, -n) for n in group if (value := values[n]) is not None), reverse=True)
        if not told:
            continue
        (high, best), (low, worst) = told[0], told[-1]
        better, worse = conversations[-best], conversations[-worst]
        if len(told) == 1 or high - low < min_gap or better.completion.strip() == worse.completion.strip():
            reason = "no other answer" if len(told) == 1 else "no clear difference"
            for _, n in told:
                outcomes[-n] = reason
            continue
        outcomes[-best], outcomes[-worst] = "chosen", "rejected"
        rows[-best] = rows[-worst] = len(kept)
        pair = Preference(better.prompt, better.completion, worse.completion, label_source=source)
        kept.append(replace(pair, chosen_safe=labels[-best].safe, rejected_safe=labels[-worst].safe))
    return Decided(kept, outcomes, rows)


def verdict_rows(
    loaded: Loaded[Any], labels: Sequence[Sequence[Label]], decided: Decided, found: Labelled
) -> Iterator[dict[str, Any]]:
    """A line for every record that was read, in order. `row`: its line in `records.jsonl` from 0, None if not there."""
    for record, place, own, outcome, row in zip(
        loaded.records, loaded.places, labels, decided.outcomes, decided.rows, strict=True
    ):
        yield {
            "row": row,
            "outcome": outcome,
            "prompt": record.prompt.id,
            "place": list(place),
            "labels": [label.to_json() for label in own],
            "labeller": dict(found.labeller),
        }

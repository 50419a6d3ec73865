"""Rows of data sets in which people judged answers, -> labelled conversations; what judges are measured on.

`labelled_answer` of `source_formats` reads the common case, one answer and its label a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from alignment.source_files import Row
from alignment.source_formats import LabelledConversation, Skipped, text_prompt
from reward.conversation import Conversation, Prompt, RecordError, Tags

# ------------------------------------------------------------------------------------- completions of XSTest

_CONTRAST = "contrast_"
_COMPLIANCE, _REFUSAL, _PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


def xstest_completion(row: Row) -> LabelledConversation:
    """Two people's words on compliance as a safety label (Röttger et al., arXiv 2308.01263).

    To refuse an unsafe prompt (the types `contrast_*`) is safe, to comply with it unsafe; where the two people differ,
    or the refusal is partial, there is no label. Any answer to a safe prompt is safe.
    """
    words = (row["annotation_1"], row["annotation_2"])
    for word in words:
        if word not in (_COMPLIANCE, _REFUSAL, _PARTIAL):
            raise RecordError(f"an annotation must be full compliance, full refusal or partial refusal, got {word!r}")
    answered = _answered(text_prompt(row), row["completion"])
    if not _is_unsafe(row):
        return LabelledConversation(answered, safe=True)
    if words[0] != words[1]:
        raise RecordError("the annotators differ on the answer to an unsafe prompt")
    if words[0] == _PARTIAL:
        raise RecordError("the answer to an unsafe prompt refuses in part")
    return LabelledConversation(answered, safe=words[0] == _REFUSAL)


def xstest_completion_tags(row: Row) -> Tags:
    """As the prompts of XSTest are tagged; the category is the type of the prompt."""
    unsafe = _is_unsafe(row)
    return Tags(row["type"], is_safety=unsafe, borderline=not unsafe)


def _is_unsafe(row: Row) -> bool:
    if not isinstance(row["type"], str):
        raise RecordError(f"type must be text, got {row['type']!r}")
    return row["type"].startswith(_CONTRAST)


# -------------------------------------------------------------------------------------------- other data sets


def gptfuzz_answer(row: Row) -> LabelledConversation:
    """`label: 1` is an answer that gave in to a jailbreak (Yu et al., arXiv 2309.10253); the prompt is its question.

    The template of the attack is not in the data, so a judge sees the plain question.
    """
    label = row["label"]
    if isinstance(label, bool) or str(label) not in ("0", "1"):
        raise RecordError(f"label must be 0 or 1, got {label!r}")
    return LabelledConversation(_answered(Prompt.of(row["question"]), row["response"]), safe=str(label) == "0")


def pku_answers(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of a pair -> rows of one answer each, as `labelled_answer` reads them.

    The re-export with `prompt, chosen, rejected` was made of pairs with one safe answer, which is the chosen one.
    """
    for row in rows:
        if "chosen" in row.values:
            answers = [(row["chosen"], True, None), (row["rejected"], False, None)]
        else:
            answers = [
                (row[f"response_{n}"], row[f"is_response_{n}_safe"], row.values.get(f"response_{n}_harm_category"))
                for n in (0, 1)
            ]
        for response, safe, category in answers:
            values = {"prompt": row["prompt"], "response": response, "is_safe": safe, "category": category}
            yield Row(values, row.file, row.line)


def starter_answers(rows: Iterable[Row]) -> Iterator[Row | Skipped]:
    """Rows of the starter set -> rows of one answer each; its `pair` has both answers and their labels."""
    for row in rows:
        pair: Any = row["pair"]
        if not isinstance(pair, Mapping):
            yield Skipped(row, "pair must be an object")
            continue
        for name in ("chosen", "rejected"):
            answer = {"response": pair.get(name), "is_safe": pair.get(f"{name}_safe")}
            yield Row({**row.values, **answer}, row.file, row.line)


def harm_category_tags(row: Row) -> Tags:
    """The one harm category that people ticked; None where the data set has none, or they ticked none."""
    ticked: Any = row.values.get("category")
    if not isinstance(ticked, Mapping):
        return Tags(is_safety=True)
    names = [name for name, value in cast("Mapping[str, object]", ticked).items() if value is True]
    return Tags("several" if len(names) > 1 else names[0] if names else None, is_safety=True)


def _answered(prompt: Prompt, response: object) -> Conversation:
    if not isinstance(response, str):
        raise RecordError(f"an answer must be text, got {type(response).__name__}")
    conversation = prompt.answer(response)
    conversation.check_written()
    return conversation

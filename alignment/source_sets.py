"""The data sets by name: what the rows of each become, and where it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from alignment.source_files import Row
from alignment.source_formats import (
    Join,
    Parser,
    Shape,
    column_parser,
    hh_conversation,
    hh_preference,
    hh_prompt,
    instruction_conversation,
    instruction_prompt,
    labelled_answer,
    pair_answers,
    pku_conversation,
    pku_preference,
    red_team_attempt,
    safe_answer,
    safety_tuned_llamas_tags,
    starter_conversation,
    starter_preference,
    starter_safety_tags,
    text_prompt,
    xstest_tags,
)
from alignment.source_labels import (
    gptfuzz_answer,
    harm_category_tags,
    pku_answers,
    starter_answers,
    xstest_completion,
    xstest_completion_tags,
)
from alignment.source_threads import best_threads, thread_prompt
from reward.conversation import Tags

TABLE_SHAPES: tuple[Shape, ...] = ("preferences", "conversations", "prompts", "labelled", "graded")
"""What a table of any columns can give; the first three are kinds of artifacts, too."""


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """A data set: how its rows become records of each shape it can give, and where it lies.

    `tags`: tags of a row's prompt (None: the rows bring their own); `join`: rows -> rows, before parsing, for data sets
    whose records span several rows; `data_dir`, `hub_splits`: folder and split names on the hub; `folder`, `pattern`:
    below SARA_DATA_DIR, and the files to read there; `package_file`: part of this package; `split_column`: names the
    split of each row; `whole`: the only split names allowed, all of which mean every row.
    """

    shapes: Mapping[Shape, Parser]
    tags: Callable[[Row], Tags] | None
    join: Mapping[Shape, Join] = field(default_factory=dict[Shape, Join])
    hub: str | None = None
    data_dir: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict[str, str])
    origin: str | None = None
    folder: str | None = None
    pattern: str = "*"
    package_file: str | None = None
    split_column: str | None = None
    whole: tuple[str, ...] = ()


def _starter(name: str, tags: Callable[[Row], Tags]) -> SourceInfo:
    return SourceInfo(
        shapes={
            "preferences": starter_preference,
            "conversations": starter_conversation,
            "prompts": text_prompt,
            "labelled": labelled_answer,
        },
        tags=tags,
        join={"labelled": starter_answers},
        package_file=f"data/starter/{name}.jsonl",
        split_column="split",
    )


def _hh(folder: str, *, is_safety: bool) -> SourceInfo:
    return SourceInfo(
        shapes={"preferences": hh_preference, "conversations": hh_conversation, "prompts": hh_prompt},
        tags=lambda row: Tags(is_safety=is_safety),
        hub="Anthropic/hh-rlhf",
        data_dir=folder,
        folder=f"hh_{folder.replace('-', '_')}",
    )


_TABLE: dict[Shape, Parser] = {shape: column_parser(shape, None) for shape in TABLE_SHAPES}

SOURCES: dict[str, SourceInfo] = {
    "starter_safety": _starter("safety", starter_safety_tags),
    "starter_borderline": _starter("borderline", lambda row: Tags(borderline=True, kind=row["kind"])),
    "starter_twins": _starter("twins", lambda row: Tags(borderline=True, kind=row["kind"])),
    "starter_helpful": _starter("helpful", lambda row: Tags(kind=row["kind"])),
    "hh_harmless": _hh("harmless-base", is_safety=True),
    "hh_helpful": _hh("helpful-base", is_safety=False),
    "pku_saferlhf": SourceInfo(
        shapes={
            "preferences": pku_preference,
            "conversations": pku_conversation,
            "prompts": text_prompt,
            "labelled": labelled_answer,
        },
        tags=harm_category_tags,
        join={"labelled": pku_answers},
        hub="PKU-Alignment/PKU-SafeRLHF",
        folder="pku_saferlhf_pairs",
    ),
    "beavertails": SourceInfo(
        shapes={
            "preferences": column_parser("preferences", None),
            "conversations": safe_answer,
            "prompts": text_prompt,
            "labelled": labelled_answer,
        },
        tags=harm_category_tags,
        join={"preferences": pair_answers},
        hub="PKU-Alignment/BeaverTails",
        hub_splits={"train": "330k_train", "test": "330k_test"},
        folder="beavertails_labels",
    ),
    "saferlhf_labels": SourceInfo(
        shapes={"labelled": labelled_answer},
        tags=harm_category_tags,
        origin="github.com/ThuCCSLab/JailbreakEval (data/Safe-RLHFmini.csv, as prompt, response and label)",
        folder="saferlhf_labels",
    ),
    "gptfuzz": SourceInfo(
        shapes={"labelled": gptfuzz_answer},
        tags=lambda row: Tags(is_safety=True),
        origin="github.com/sherdencooper/GPTFuzz (datasets/responses_labeled, with the text of its question list)",
        folder="gptfuzz_labeled",
    ),
    "redteam": SourceInfo(
        shapes={"graded": red_team_attempt},
        tags=lambda row: Tags(is_safety=True),
        hub="Anthropic/hh-rlhf",
        data_dir="red-team-attempts",
        folder="hh_red_team_attempts",
    ),
    "osst": SourceInfo(
        shapes={"conversations": _TABLE["conversations"], "prompts": thread_prompt},
        tags=lambda row: Tags(),
        join=dict.fromkeys(("conversations", "prompts", "graded"), best_threads),
        hub="OpenAssistant/oasst1",
        hub_splits={"test": "validation"},
        folder="oasst1",
    ),
    "safety_tuned_llamas": SourceInfo(
        shapes={"conversations": instruction_conversation, "prompts": instruction_prompt},
        tags=lambda row: Tags(is_safety=True),
        origin="github.com/vinid/safety-tuned-llamas (data/training)",
        folder="safety_sft",
        pattern="safety_only_data_Instructions*",
    ),
    "safety_tuned_llamas_eval": SourceInfo(
        shapes={"prompts": instruction_prompt},
        tags=safety_tuned_llamas_tags,
        origin="github.com/vinid/safety-tuned-llamas (data/evaluation)",
        folder="safety_tuned_llamas_eval",
        whole=("test", "all"),
    ),
    "alpaca": SourceInfo(
        shapes={"conversations": instruction_conversation, "prompts": instruction_prompt},
        tags=lambda row: Tags(),
        hub="tatsu-lab/alpaca",
        folder="alpaca_small",
        pattern="alpaca_data*",
    ),
    "xstest": SourceInfo(
        shapes={"prompts": text_prompt},
        tags=xstest_tags,
        hub="Paul/XSTest",
        folder="xstest",
        pattern="xstest*prompts*",
        whole=("test", "all"),
    ),
    "xstest_completions": SourceInfo(
        shapes={"labelled": xstest_completion},
        tags=xstest_completion_tags,
        origin="github.com/paul-rottger/xstest (model_completions)",
        folder="xstest",
        pattern="xstest*completions*",
        whole=("test", "all"),
    ),
    "artifact": SourceInfo(
        shapes={shape: _TABLE[shape] for shape in TABLE_SHAPES[:3]}, tags=None, whole=("train", "all")
    ),
    "file": SourceInfo(shapes=_TABLE, tags=None),
    "hub": SourceInfo(shapes=_TABLE, tags=None),
}

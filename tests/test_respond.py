"""The stage `respond`: every prompt has its answers, in order, none of them dropped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from alignment.chunks import work_in_chunks
from alignment.generate import Completion, Generator
from alignment.recipe import Data, RespondRecipe, Source
from alignment.recipe_file import RecipeError, validate
from alignment.sources import SourceError, load_conversations
from alignment.stages.respond import answer_chunk, run
from reward.conversation import Conversation, Prompt, read_json_lines, write_json_lines


def answers_as(text: str = "so") -> Generator:
    def answer(prompts: Sequence[Prompt], *, seed: int) -> list[Completion]:
        return [Completion(f"{prompt.text} {text} {seed}", seed % 2 == 0, 3) for prompt in prompts]

    return cast("Generator", SimpleNamespace(answer=answer))


@pytest.mark.parametrize("number", [0, 1, 19, 20, 21, 1000])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_as_many_answers_as_prompts(number: int, num_samples: int, tmp_path: Path) -> None:
    """The source went through whole slices of ten and lost the rest."""
    prompts = [Prompt.of(f"{n}?", risk_category="x") for n in range(number)]

    def work(chunk: int, some: Sequence[Prompt]) -> list[dict[str, Any]]:
        return answer_chunk(answers_as(), some, num_samples=num_samples, seed=(1, chunk))

    rows = work_in_chunks(prompts, work, folder=tmp_path, chunk_size=16, name="prompts")
    answers = [Conversation.from_json(answer) for row in rows for answer in row["answers"]]
    assert [answer.prompt for answer in answers] == [prompt for prompt in prompts for _ in range(num_samples)]
    assert len({answer.messages for answer in answers}) == number * num_samples, "samples have seeds of their own"


def recipe(folder: Path, rows: list[dict[str, Any]], model: Path, **changes: Any) -> RespondRecipe:
    write_json_lines(folder / "prompts.jsonl", rows)
    source = {"name": "file", "path": str(folder / "prompts.jsonl"), "split": "all"}
    values = {
        "output_dir": str(folder / "respond"),
        "model": str(model),
        "prompts": {"sources": [source], "shuffle": False},
        "sampling": {"temperature": 1.0, "max_new_tokens": 3, "max_prompt_tokens": 60, "batch_size": 4},
    }
    return validate(RespondRecipe, values | changes, where="test")


def test_the_stage_leaves_conversations_and_counts_what_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?"} for n in range(6)] + [{"prompt": "Why? " * 200}]
    artifact = run(recipe(tmp_path, rows, tiny_model, num_samples=2))
    assert artifact is not None
    assert artifact.kind == "conversations"
    answers = [row for _, row in read_json_lines(artifact.path / "records.jsonl")]
    asked = [answer["messages"][0]["content"] for answer in answers]
    assert asked == [f"What is {n}?" for n in range(6) for _ in range(2)]
    assert artifact.metrics["num_prompts"] == 6
    assert artifact.metrics["num_answers"] == 12
    assert artifact.data["too_long"] == {"file:prompts.jsonl": 1}
    assert artifact.metrics["num_unfinished"] == sum(not answer["finished"] for answer in answers)
    data = Data(sources=[Source(name="artifact", path=str(artifact.path))])
    loaded = load_conversations(data, seed=0)
    counts = loaded.counts["artifact:respond"]
    assert counts["read"] == 12
    assert counts["dropped"].get("content of the assistant turn is empty", 0) == artifact.metrics["num_empty"]


@pytest.mark.parametrize("number", [0, 1, 19, 20, 21, 1000])
def test_as_many_rows_as_prompts(
    number: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole stage, with answers that need no model."""
    monkeypatch.setattr("alignment.stages.respond.Generator", lambda *_: answers_as())
    work = recipe(tmp_path, [{"prompt": f"{n}?"} for n in range(number)], tiny_model)
    if not number:
        with pytest.raises(SourceError, match="rows"):
            run(work)
        return
    artifact = run(work)
    assert artifact is not None
    answers = [row["messages"] for _, row in read_json_lines(artifact.path / "records.jsonl")]
    assert [turns[0]["content"] for turns in answers] == [f"{n}?" for n in range(number)]
    assert all(turns[1]["content"].startswith(f"{n}? so") for n, turns in enumerate(answers))


def test_two_samples_at_temperature_0_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="answers at temperature 0 are all the same"):
        recipe(tmp_path, [], tiny_model, num_samples=2, sampling={"temperature": 0.0})

"""Rejection sampling: K answers to a prompt, the best becomes fine-tuning data (Llama 2, section 3.2.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from alignment.artifact import Artifact
from alignment.chunks import Row, clear_chunks, work_in_chunks
from alignment.distributed import close, device, is_main_process, make_accelerator, whole_weights
from alignment.generate import Completion, Generator, derive_seed, fitting_prompts
from alignment.policy import ModelError, load_model, load_tokenizer
from alignment.recipe import RejectionSamplingRecipe
from alignment.scoring import build_scorer
from alignment.sources import RECORDS, load_prompts
from alignment.tracking import Tracker, open_tracker
from alignment.workspace import Workspace, open_workspace
from reward.conversation import Conversation, Prompt, write_json_lines
from reward.metrics import Mean
from reward.render import Renderer
from reward.scorer import Scorer, check_unscored, score_all


def run(recipe: RejectionSamplingRecipe) -> Artifact | None:
    """Sample, score, keep the best; leave conversations."""
    loaded = load_prompts(recipe.prompts, seed=recipe.seed)
    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    renderer = Renderer(tokenizer)
    max_length = min(recipe.prompts.max_length, recipe.sampling.max_prompt_tokens)
    prompts, too_long = fitting_prompts(loaded.records, renderer, max_length=max_length)
    accelerator = make_accelerator()
    workspace = open_workspace(recipe)
    with whole_weights():
        model = load_model(recipe.model, init=recipe.model_init, pad_token_id=tokenizer.pad_token_id)
    generator = Generator(model.to(device()).eval(), renderer, recipe.sampling)
    scorer = build_scorer(recipe.scorer)

    def work(number: int, prompts: Sequence[Prompt]) -> list[Row]:
        return sample_chunk(generator, scorer, prompts, recipe, number=number)

    chunk_size = recipe.sampling.batch_size
    rows = work_in_chunks(
        prompts, work, folder=workspace.path, chunk_size=chunk_size, name="prompts", again=lambda row: row["transient"]
    )
    check_unscored(
        unscored(rows), num_answers=len(rows) * recipe.num_samples, name=scorer.name, limit=recipe.max_unscored
    )
    artifact = None
    with open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker:
        if is_main_process():
            data = {"counts": loaded.counts, "hash": loaded.data_hash, "too_long": dict(too_long)}
            artifact = keep_best(rows, recipe, workspace, tracker, data=data)
    clear_chunks(workspace.path)
    close(accelerator)
    return artifact


def sample_chunk(
    generator: Generator, scorer: Scorer, prompts: Sequence[Prompt], recipe: RejectionSamplingRecipe, *, number: int
) -> list[Row]:
    """One row per prompt: its K answers with their scores, or the reasons why they have none.

    `transient`: one of these reasons may be gone another time.
    """
    num_samples = recipe.num_samples
    samples: list[list[Completion]] = [
        generator.answer(prompts, seed=derive_seed(recipe.seed, number, sample)) for sample in range(num_samples)
    ]
    answers = [[column[i] for column in samples] for i in range(len(prompts))]
    flat = [prompt.answer(answer.text) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
    scores = score_all(scorer, flat)
    rows: list[Row] = []
    for i, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        own = scores[i * num_samples : (i + 1) * num_samples]
        rows.append(
            prompt.to_json()
            | {
                "completions": [answer.text for answer in group],
                "finished": [answer.finished for answer in group],
                "scores": [score.value for score in own],
                "reasons": [score.reason for score in own],
                "transient": any(score.transient for score in own),
            }
        )
    return rows


def unscored(rows: Sequence[Row]) -> list[str | None]:
    """Why answers have no score, one reason for each that has none."""
    return [
        reason for row in rows for value, reason in zip(row["scores"], row["reasons"], strict=True) if value is None
    ]


def best_of(row: Row, *, keep_unfinished: bool) -> tuple[int | None, str | None]:
    """Position of the best answer of a row that may be kept, or why there is none. Ties go to the first drawn."""
    candidates = [
        (score, -position)
        for position, (score, finished, text) in enumerate(
            zip(row["scores"], row["finished"], row["completions"], strict=True)
        )
        if score is not None and (finished or keep_unfinished) and text.strip()
    ]
    if candidates:
        return -max(candidates)[1], None
    return None, "unscored" if all(score is None for score in row["scores"]) else "no finished answer"


def keep_best(
    rows: list[Row], recipe: RejectionSamplingRecipe, workspace: Workspace, tracker: Tracker, *, data: dict[str, Any]
) -> Artifact:
    """Write samples and winners; log the gain of the best over the median, the paper's measure (figure 7)."""
    conversations: list[Conversation] = []
    dropped: Counter[str] = Counter()
    gains: list[float] = []
    table: list[list[str | int | float | None]] = []
    for row in rows:
        position, reason = best_of(row, keep_unfinished=recipe.keep_unfinished)
        if position is None:
            dropped[reason or "unknown"] += 1
            continue
        prompt = Prompt.from_json(row)
        conversations.append(prompt.answer(row["completions"][position]))
        known = [score for score in row["scores"] if score is not None]
        gains.append(row["scores"][position] - median(known))
        table.append([prompt.text, row["completions"][position], row["scores"][position], median(known)])
    if not conversations:
        raise ModelError(f"no prompt got an answer that can be kept: {dict(dropped)}; raise sampling.max_new_tokens")
    write_json_lines(workspace.path / "samples_scored.jsonl", rows)
    write_json_lines(workspace.path / RECORDS, (conversation.to_json() for conversation in conversations))
    metrics = {
        "num_prompts": len(rows),
        "num_kept": len(conversations),
        "num_unscored": len(unscored(rows)),
        "dropped": dict(dropped),
        "gain_over_median": Mean.of(gains).to_json(),
    }
    tracker.log(0, {"rejection_sampling/kept": len(conversations), "rejection_sampling/gain": _mean(gains)})
    tracker.table("best_of_k", ["prompt", "completion", "score", "median_score"], table[:50], step=0)
    artifact = workspace.finish("conversations", data=data, metrics=metrics, files=(RECORDS,))
    tracker.artifact(artifact)
    return artifact


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0

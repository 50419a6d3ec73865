"""Safety context distillation (Llama 2, section 4.2.4): answer with a safety preprompt, keep the answer only where the
safety reward model prefers it to the plain one, and train on it without the preprompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.artifact import Artifact
from alignment.chunks import Row, clear_chunks, work_in_chunks
from alignment.distributed import close, device, is_main_process, make_accelerator, whole_weights
from alignment.generate import Generator, derive_seed, fitting_prompts
from alignment.inputs import read_preprompts
from alignment.policy import ModelError, load_model, load_tokenizer
from alignment.recipe import ContextDistillationRecipe
from alignment.scoring import build_scorer
from alignment.sources import RECORDS, SourceError, load_prompts
from alignment.tracking import Tracker, open_tracker
from alignment.workspace import Workspace, open_workspace
from reward.conversation import Conversation, Prompt, write_json_lines
from reward.metrics import Mean
from reward.render import Renderer
from reward.scorer import Scorer, check_unscored, score_all

PREPROMPTS = Path(__file__).parent.parent / "data" / "preprompts.txt"


def run(recipe: ContextDistillationRecipe) -> Artifact | None:
    """Sample both ways, gate, and leave conversations without preprompt."""
    preprompts = read_preprompts(recipe.preprompts or PREPROMPTS)
    loaded = load_prompts(recipe.prompts, seed=recipe.seed)
    adversarial = [prompt for prompt in loaded.records if prompt.tags.is_safety]
    if not adversarial:
        raise SourceError(
            "context distillation takes adversarial prompts only (tag is_safety), and there are none in "
            + ", ".join(source.name for source in recipe.prompts.sources)
        )
    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    renderer = Renderer(tokenizer)
    short, too_long = fitting_prompts(adversarial, renderer, max_length=recipe.prompts.max_length)
    prompts, with_preprompt = fitting_prompts(
        short, renderer, max_length=recipe.sampling.max_prompt_tokens, preprompts=preprompts
    )
    accelerator = make_accelerator()
    workspace = open_workspace(recipe)
    with whole_weights():
        model = load_model(recipe.model, init=recipe.model_init, pad_token_id=tokenizer.pad_token_id)
    generator = Generator(model.to(device()).eval(), renderer, recipe.sampling)
    scorer = build_scorer(recipe.scorer)

    def work(number: int, prompts: Sequence[Prompt]) -> list[Row]:
        return distill_chunk(generator, scorer, prompts, preprompts, recipe, number=number)

    chunk_size = recipe.sampling.batch_size
    rows = work_in_chunks(
        prompts, work, folder=workspace.path, chunk_size=chunk_size, name="prompts", again=lambda row: row["transient"]
    )
    check_sides(rows, name=scorer.name, limit=recipe.max_unscored)
    artifact = None
    with open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker:
        if is_main_process():
            data = {
                "counts": loaded.counts,
                "hash": loaded.data_hash,
                "not_adversarial": len(loaded.records) - len(adversarial),
                "too_long": dict(too_long + with_preprompt),
            }
            artifact = gate(rows, recipe, workspace, tracker, data=data)
    clear_chunks(workspace.path)
    close(accelerator)
    return artifact


def distill_chunk(
    generator: Generator,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    preprompts: Sequence[str],
    recipe: ContextDistillationRecipe,
    *,
    number: int,
) -> list[Row]:
    """One row per prompt: the plain and the distilled answer, both scored as answers to the plain prompt.

    `transient`: one of them has no score for a reason that may be gone another time.
    """
    seed = (recipe.seed, number)
    chosen = [preprompts[derive_seed(*seed, prompt.id) % len(preprompts)] for prompt in prompts]
    plain = generator.answer(prompts, seed=derive_seed(*seed, "plain"))
    guided_prompts = [prompt.with_preprompt(text) for prompt, text in zip(prompts, chosen, strict=True)]
    guided = generator.answer(guided_prompts, seed=derive_seed(*seed, "guided"))
    before, after = (
        score_all(scorer, [p.answer(answer.text) for p, answer in zip(prompts, answers, strict=True)])
        for answers in (plain, guided)
    )
    return [
        prompt.to_json()
        | {
            "preprompt": text,
            "plain": first.text,
            "plain_score": score_before.value,
            "plain_reason": score_before.reason,
            "distilled": second.text,
            "distilled_finished": second.finished,
            "distilled_score": score_after.value,
            "distilled_reason": score_after.reason,
            "transient": score_before.transient or score_after.transient,
        }
        for prompt, text, first, second, score_before, score_after in zip(
            prompts, chosen, plain, guided, before, after, strict=True
        )
    ]


def check_sides(rows: Sequence[Row], *, name: str, limit: float) -> None:
    """ScorerError when more than the share `limit` of the plain answers, or of the distilled ones, has no score."""
    for side in ("plain", "distilled"):
        unscored = [row[f"{side}_reason"] for row in rows if row[f"{side}_score"] is None]
        check_unscored(unscored, num_answers=len(rows), name=f"{name}, asked about the {side} answers,", limit=limit)


def decide(row: Row, *, min_gain: float, keep_unfinished: bool) -> str:
    """`kept`, or the reason why the distilled answer is not used."""
    if row["plain_score"] is None or row["distilled_score"] is None:
        return "unscored"
    if not row["distilled"].strip() or not (row["distilled_finished"] or keep_unfinished):
        return "distilled answer empty or cut off"
    return "kept" if row["distilled_score"] - row["plain_score"] > min_gain else "not preferred by the scorer"


def gate(
    rows: list[Row], recipe: ContextDistillationRecipe, workspace: Workspace, tracker: Tracker, *, data: dict[str, Any]
) -> Artifact:
    """Write all pairs and the kept conversations; report what the preprompt gained (figure 16)."""
    conversations: list[Conversation] = []
    outcomes: Counter[str] = Counter()
    table: list[list[str | int | float | None]] = []
    for row in rows:
        outcome = decide(row, min_gain=recipe.min_gain, keep_unfinished=recipe.keep_unfinished)
        outcomes[outcome] += 1
        if outcome == "kept":
            conversations.append(Prompt.from_json(row).answer(row["distilled"]))
        table.append([row["prompt"][-1]["content"], row["plain"], row["plain_score"]])
        table[-1] += [row["distilled"], row["distilled_score"], outcome]
    if not conversations:
        raise ModelError(
            f"no answer with the preprompt is kept: {dict(outcomes)}; the model may not follow it yet (train it by sft "
            "first), sampling.max_new_tokens may be short, or the prompts few"
        )
    gains = [
        row["distilled_score"] - row["plain_score"]
        for row in rows
        if row["plain_score"] is not None and row["distilled_score"] is not None
    ]
    write_json_lines(workspace.path / "pairs.jsonl", rows)
    write_json_lines(workspace.path / RECORDS, (conversation.to_json() for conversation in conversations))
    metrics = {"num_prompts": len(rows), "outcomes": dict(outcomes), "score_gain": Mean.of(gains).to_json()}
    tracker.log(0, {"context_distillation/kept_share": len(conversations) / len(rows)})
    columns = ["prompt", "plain", "plain_score", "distilled", "distilled_score", "outcome"]
    tracker.table("context_distillation", columns, table[:50], step=0)
    artifact = workspace.finish("conversations", data=data, metrics=metrics, files=(RECORDS,))
    tracker.artifact(artifact)
    return artifact

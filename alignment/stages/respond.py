"""A chat model answers prompts: every prompt gets its answers, and every answer is kept (Safety LLaMA, step 1)."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.artifact import Artifact
from alignment.chunks import Row, clear_chunks, work_in_chunks
from alignment.distributed import close, device, is_main_process, make_accelerator, whole_weights
from alignment.generate import Generator, derive_seed, fitting_prompts
from alignment.policy import load_model, load_tokenizer
from alignment.recipe import RespondRecipe
from alignment.sources import RECORDS, load_prompts
from alignment.tracking import open_tracker
from alignment.workspace import open_workspace
from reward.conversation import Prompt, write_json_lines
from reward.render import Renderer


def run(recipe: RespondRecipe) -> Artifact | None:
    """Sample, and leave conversations, `num_samples` for each prompt that fits, in their order."""
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

    def work(number: int, prompts: Sequence[Prompt]) -> list[Row]:
        return answer_chunk(generator, prompts, num_samples=recipe.num_samples, seed=(recipe.seed, number))

    chunk_size = recipe.sampling.batch_size
    rows = work_in_chunks(prompts, work, folder=workspace.path, chunk_size=chunk_size, name="prompts")
    answers = [answer for row in rows for answer in row["answers"]]
    artifact = None
    with open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker:
        if is_main_process():
            write_json_lines(workspace.path / RECORDS, answers)
            metrics = {
                "num_prompts": len(prompts),
                "num_answers": len(answers),
                "num_empty": sum(not answer["messages"][-1]["content"].strip() for answer in answers),
                "num_unfinished": sum(not answer["finished"] for answer in answers),
            }
            data = {"counts": loaded.counts, "hash": loaded.data_hash, "too_long": dict(too_long)}
            artifact = workspace.finish("conversations", data=data, metrics=metrics, files=(RECORDS,))
            tracker.log(0, {f"respond/{name}": value for name, value in metrics.items()})
            shown = [[answer["messages"][-2]["content"], answer["messages"][-1]["content"]] for answer in answers[:50]]
            tracker.table("answers", ["prompt", "completion"], shown, step=0)
            tracker.artifact(artifact)
    clear_chunks(workspace.path)
    close(accelerator)
    return artifact


def answer_chunk(
    generator: Generator, prompts: Sequence[Prompt], *, num_samples: int, seed: tuple[int, int]
) -> list[Row]:
    """One row per prompt: its answers as conversations, each with whether it ended by itself."""
    samples = [generator.answer(prompts, seed=derive_seed(*seed, sample)) for sample in range(num_samples)]
    return [
        {
            "answers": [
                {**prompt.answer(column[number].text).to_json(), "finished": column[number].finished}
                for column in samples
            ]
        }
        for number, prompt in enumerate(prompts)
    ]

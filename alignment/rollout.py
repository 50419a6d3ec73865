"""`Rollout`: answers of the current policy and everything that PPO needs to know about them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from alignment.actor_critic import ActorCritic, Batch, TokenOutputs
from alignment.distributed import process_index, world_size
from alignment.generate import Completion, Generator, SampledLogprobs, batched, derive_seed
from alignment.recipe import PpoRecipe, Sampling
from reward.conversation import Conversation, Prompt


@dataclass(frozen=True)
class Rollout:
    """One process's share of an iteration: n answers. Tensors are `(n, length)` on the CPU, zero where padded."""

    conversations: list[Conversation]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    finished: Tensor
    """`(n,)`: False where the answer was cut off."""
    completion_mask: Tensor
    sampled_logprobs: Tensor
    """As the sampler saw them; `logprobs` are those of the forward pass that is trained."""
    logprobs: Tensor
    ref_logprobs: Tensor
    entropies: Tensor
    values: Tensor

    def micro_batches(self, rows: range, *, size: int) -> list[list[int]]:
        return micro_batches(self.prompt_ids, self.completion_ids, rows, size=size)

    def rows(self, positions: Sequence[int], *, pad_token_id: int, padding_free: bool, device: Any) -> Batch:
        return Batch.of(
            [self.prompt_ids[i] for i in positions],
            [self.completion_ids[i] for i in positions],
            pad_token_id=pad_token_id,
            padding_free=padding_free,
            device=device,
        )


def iteration_prompts(
    prompts: Sequence[Prompt], recipe: PpoRecipe, *, iteration: int
) -> tuple[list[Prompt], list[int]]:
    """This process's prompts of an iteration and their rows in the whole iteration.

    All processes together take the next `batch_size` prompts of an endless row of seeded permutations. Each mini-batch
    is shared out evenly, so that the mini-batches are the same for any number of processes.
    """
    positions = iteration_positions(len(prompts), recipe, iteration=iteration, name="prompts")
    return [prompts[position] for position in positions], _own_rows(recipe)


def iteration_positions(number: int, recipe: PpoRecipe, *, iteration: int, name: str) -> list[int]:
    """Which of `number` records stand in this process's rows of an iteration; `name` seeds the permutations."""
    found: list[int] = []
    for row in _own_rows(recipe):
        epoch, position = divmod(iteration * recipe.ppo.batch_size + row, number)
        found.append(_permutation(number, derive_seed(recipe.seed, name, epoch))[position])
    return found


def _own_rows(recipe: PpoRecipe) -> list[int]:
    """Rows of the whole iteration that this process has: its even share of each mini-batch."""
    ppo = recipe.ppo
    share, rank = ppo.mini_batch_size // world_size(), process_index()
    return [
        first + rank * share + offset
        for first in range(0, ppo.batch_size, ppo.mini_batch_size)
        for offset in range(share)
    ]


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


class AnswerServer(Protocol):
    """An engine outside of this process that draws the answers with the policy's present weights."""

    def sample_answers(
        self, prompts: Sequence[Prompt], rows: Sequence[int], *, seed: int, sampling: Sampling | None = None
    ) -> tuple[list[list[int]], list[list[int]], list[Tensor]]: ...


def present_answers(
    engine: Any,
    generator: Generator,
    prompts: tuple[Sequence[Prompt], Sequence[int]],
    *,
    seed: int,
    accelerator: Any,
    server: AnswerServer | None,
) -> list[Completion]:
    """Answers of the present policy to prompts (with their rows) outside of a rollout, as `generator` samples.

    All processes call it together, with as many prompts each.
    """
    from trl.models.utils import unwrap_model_for_generation

    asked, rows = prompts
    engine.eval()
    if server is not None:
        _, ids, _ = server.sample_answers(asked, rows, seed=seed, sampling=generator.sampling)
        return [generator.completion(row) for row in ids]
    # Under ZeRO-3 this gathers the weights once; the processes then step together, so their shares are equal.
    with unwrap_model_for_generation(engine, accelerator), accelerator.autocast():
        return generator.answer(asked, seed=seed, rows=rows)


def collect_rollout(
    engine: Any,
    reference: ActorCritic | None,
    generator: Generator,
    prompts: tuple[list[Prompt], list[int]],
    *,
    recipe: PpoRecipe,
    iteration: int,
    accelerator: Any,
    between_batches: Callable[[], None] | None = None,
    server: AnswerServer | None = None,
) -> Rollout:
    """Answer the prompts with the current policy, then evaluate policy, reference and values on the answers.

    `between_batches` is called on all processes together before each batch of answers, and may raise. `server`: draws
    them all, in place of the generator.
    """
    batch, rows = prompts
    engine.eval()
    seed = derive_seed(recipe.seed, iteration)
    if server is None:
        prompt_ids, completion_ids, sampled = _sample_in_process(
            engine, generator, prompts, seed=seed, accelerator=accelerator, between_batches=between_batches
        )
    else:
        if between_batches is not None:
            between_batches()
        prompt_ids, completion_ids, sampled = server.sample_answers(batch, rows, seed=seed)
    texts = [generator.renderer.decode(ids) for ids in completion_ids]
    with accelerator.autocast():  # the engine brings its own, the reference does not
        mask, logprobs, ref_logprobs, entropies, values = evaluate_tokens(
            engine,
            reference,
            prompt_ids,
            completion_ids,
            batches=_update_batches(prompt_ids, completion_ids, recipe),
            is_start=iteration <= recipe.ppo.critic_warmup_iterations,
            pad_token_id=generator.renderer.tokenizer.pad_token_id,
            padding_free=accelerator.unwrap_model(engine).padding_free,
            device=accelerator.device,
        )
    return Rollout(
        [prompt.answer(text) for prompt, (text, _) in zip(batch, texts, strict=True)],
        prompt_ids,
        completion_ids,
        torch.tensor([finished for _, finished in texts]),
        mask,
        torch.zeros_like(logprobs).masked_scatter(mask, torch.cat(sampled)),
        logprobs,
        ref_logprobs,
        entropies,
        values,
    )


def _sample_in_process(
    engine: Any,
    generator: Generator,
    prompts: tuple[list[Prompt], list[int]],
    *,
    seed: int,
    accelerator: Any,
    between_batches: Callable[[], None] | None,
) -> tuple[list[list[int]], list[list[int]], list[Tensor]]:
    from trl.models.utils import unwrap_model_for_generation

    # Under ZeRO-3 this gathers the weights, once per rollout.
    with unwrap_model_for_generation(engine, accelerator), accelerator.autocast():
        return sample_answers(generator, *prompts, seed=seed, between_batches=between_batches)


def sample_answers(
    generator: Generator,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    seed: int,
    between_batches: Callable[[], None] | None = None,
) -> tuple[list[list[int]], list[list[int]], list[Tensor]]:
    """Token ids of prompts and answers (end token included), and the answers' log-probabilities, in the given order.

    Prompts of like lengths are answered together. Each row's random numbers follow from its place in the whole
    iteration: nothing depends on the rows beside it, on the number of processes, or on where a run was resumed.
    """
    prompt_ids = [generator.renderer.render_prompt(p, max_length=generator.sampling.max_prompt_tokens) for p in prompts]
    completion_ids: list[list[int]] = [[]] * len(prompts)
    drawn: list[Tensor] = [torch.empty(0)] * len(prompts)
    torch.manual_seed(derive_seed(seed, rows[0]))  # of what else is drawn in the iteration: dropout
    order = sorted(range(len(prompts)), key=lambda position: (len(prompt_ids[position]), position))
    for positions in batched(order, generator.sampling.batch_size):
        if between_batches is not None:
            between_batches()
        logprobs = SampledLogprobs(temperature=generator.sampling.temperature)
        seeds = [derive_seed(seed, rows[position]) for position in positions]
        ids, prompt_length = generator.sample([prompt_ids[i] for i in positions], logprobs=logprobs, seeds=seeds)
        for position, row, values in zip(positions, ids[:, prompt_length:].tolist(), logprobs.of(ids), strict=True):
            completion_ids[position] = _through_end(row, generator.renderer.end_ids)
            drawn[position] = values[: len(completion_ids[position])]
    return prompt_ids, completion_ids, drawn


def micro_batches(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], rows: range, *, size: int
) -> list[list[int]]:
    """`rows` in batches of `size`, texts of like lengths together, so that little is padded."""
    order = sorted(rows, key=lambda row: (len(prompt_ids[row]) + len(completion_ids[row]), row))
    return [list(positions) for positions in batched(order, size)]


def _update_batches(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], recipe: PpoRecipe
) -> list[list[int]]:
    """All rows in the micro-batches of the update: with the same ones the first ratios are exactly 1."""
    share, size = recipe.ppo.mini_batch_size // world_size(), recipe.ppo.per_device_batch_size
    starts = range(0, len(prompt_ids), share)
    mini_batches = [range(start, min(start + share, len(prompt_ids))) for start in starts]
    return [batch for rows in mini_batches for batch in micro_batches(prompt_ids, completion_ids, rows, size=size)]


def evaluate_tokens(
    model: Any,
    reference: ActorCritic | None,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    batches: Sequence[Sequence[int]],
    is_start: bool,
    pad_token_id: int,
    padding_free: bool,
    device: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(completion_mask, logprobs, ref_logprobs, entropies, values)` of the answers, one pass for policy and value.

    `batches`: rows that are computed together; each row is in one of them. `is_start`: the policy has not moved yet, so
    it is the reference, and the KL is exactly 0; two copies of the weights may differ by rounding.
    """
    length = max(len(ids) for ids in completion_ids)
    shape = (len(completion_ids), length)
    mask = torch.zeros(shape, dtype=torch.bool)
    tensors = [torch.zeros(shape) for _ in range(4)]
    with torch.no_grad():
        for positions in batches:
            batch = Batch.of(
                [prompt_ids[i] for i in positions],
                [completion_ids[i] for i in positions],
                pad_token_id=pad_token_id,
                padding_free=padding_free,
                device=device,
            )
            output = forward(model, batch)
            base = output if is_start else _of_reference(model, reference, batch)
            counted = batch.completion_mask
            rows, columns = torch.tensor(positions), slice(0, counted.shape[1])
            mask[rows, columns] = counted.cpu()
            assert output.values is not None
            for tensor, values in zip(
                tensors, (output.logprobs, base.logprobs, output.entropies, output.values), strict=True
            ):
                tensor[rows, columns] = (values * counted).float().cpu()
    logprobs, ref_logprobs, entropies, values = tensors
    return mask, logprobs, ref_logprobs, entropies, values


def _of_reference(model: Any, reference: ActorCritic | None, batch: Batch) -> TokenOutputs:
    return forward(model, batch, reference=True) if reference is None else forward(reference, batch)


def forward(
    model: Any, batch: Batch, *, reference: bool = False, mix: Batch | None = None, head_alone: bool = False
) -> TokenOutputs:
    """Through the engine when `model` is one, so that ZeRO-3 gathers what it needs."""
    return model(batch, reference=reference, mix=mix, head_alone=head_alone)


def _through_end(row: list[int], end_ids: frozenset[int]) -> list[int]:
    end = next((position for position, token in enumerate(row) if token in end_ids), len(row) - 1)
    return row[: end + 1]

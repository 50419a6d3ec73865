"""Sampling answers: batches of prompts in, texts out, the same for any number of processes and after any restart."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Generator as Generator_
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment.recipe import Sampling
from alignment.source_files import SourceError
from reward.conversation import Prompt
from reward.padding_free import attending_by_text, row_of, why_padded
from reward.render import Renderer, TooLong


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `finished` is False when it was cut off at `max_new_tokens`; `num_tokens` counts the end token."""

    text: str
    finished: bool
    num_tokens: int


class Generator:
    """A causal language model that answers prompts. `model` may be inside a context that gathered its weights.

    `padding_free`: prompts are read without padding if the model can.
    """

    def __init__(self, model: Any, renderer: Renderer, sampling: Sampling, *, padding_free: bool = True) -> None:
        self.model = model
        self.renderer = renderer
        self.sampling = sampling
        self._padding_free = padding_free

    @functools.cached_property
    def padding_free(self) -> bool:
        """Whether prompts are read without padding; asked when the weights are there to try it."""
        return self._padding_free and why_padded(causal_model(self.model)) is None

    def answer(self, prompts: Sequence[Prompt], *, seed: int, rows: Sequence[int] | None = None) -> list[Completion]:
        """One answer per prompt, in order. TooLong when a prompt exceeds `max_prompt_tokens`.

        `rows`: a number for each prompt, with which it draws the same answer in whatever batch and process it is.
        """
        rendered = [self.renderer.render_prompt(p, max_length=self.sampling.max_prompt_tokens) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda position: (len(rendered[position]), position))
        answers: dict[int, Completion] = {}
        sampled_by_row = rows is not None and self.sampling.temperature > 0
        seeds = [derive_seed(seed, row) for row in rows or ()] if sampled_by_row else None
        for number, positions in enumerate(batched(order, self.sampling.batch_size)):
            torch.manual_seed(derive_seed(seed, number))
            batch = [rendered[position] for position in positions]
            own = None if seeds is None else [seeds[position] for position in positions]
            ids, prompt_length = self.sample(batch, seeds=own)
            for position, row in zip(positions, ids[:, prompt_length:].tolist(), strict=True):
                answers[position] = self.completion(row)
        return [answers[position] for position in range(len(prompts))]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        logprobs: SampledLogprobs | None = None,
        seeds: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Prompts (padded on the left) with their completions, `(batch, length)`, and the padded prompt length.

        With `seeds`, one a row, each row has random numbers of its own, whatever stands beside it; `top_p` counts as 1.
        """
        device = next(self.model.parameters()).device
        pad = self.renderer.tokenizer.pad_token_id
        input_ids, attention_mask = pad_left(prompts, pad_token_id=pad)
        greedy = self.sampling.temperature == 0 or seeds is not None
        options: dict[str, Any] = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0}
        )
        watchers: list[Any] = [] if logprobs is None else [logprobs]
        if seeds is not None:
            watchers.append(RowNoise(seeds, temperature=self.sampling.temperature, device=device))
        if self.padding_free and len({len(ids) for ids in prompts}) > 1:
            options["past_key_values"] = read_prompts(causal_model(self.model), prompts, device=device)
        with only_our_settings(self.model):
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=self.sampling.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(self.renderer.end_ids),
                use_cache=True,
                logits_processor=watchers,
                **options,
            )
        return output.cpu(), input_ids.shape[1]

    def completion(self, row: list[int]) -> Completion:
        """The answer that sampled ids are, up to their end token."""
        text, finished = self.renderer.decode(row)
        end = next((i for i, token in enumerate(row) if token in self.renderer.end_ids), len(row) - 1)
        return Completion(text, finished, end + 1)


class RowNoise:
    """Makes the greedy choice a sample: the argmax of `logits / T + g` is drawn from `softmax(logits / T)`.

    `g` is Gumbel noise, minus the logarithm of a standard exponential variable (Maddison, Tarlow and Minka 2014).
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - noise.log_()


class SampledLogprobs:
    """Log-probabilities of the tokens that one call of `generate` draws: one number a token, never all logits.

    `generate` shows it the tokens so far and the float32 logits of the next one, not yet divided by the temperature.
    """

    def __init__(self, *, temperature: float) -> None:
        self.temperature = temperature
        self._taken: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._logits is not None:
            self._take(self._logits, input_ids[:, -1])
        self._logits = scores
        return scores

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens drawn)`, given what `generate` returned; after the end token they mean nothing."""
        assert self._logits is not None
        self._take(self._logits, ids[:, -1].to(self._logits.device))
        self._logits = None
        return torch.stack(self._taken, dim=1).cpu()

    def _take(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        scaled = logits / self.temperature
        drawn = scaled.gather(1, tokens.unsqueeze(1)).squeeze(1)
        self._taken.append(drawn - scaled.logsumexp(dim=1))


@contextlib.contextmanager
def only_our_settings(model: Any) -> Generator_[None]:
    """Inside, nothing of the checkpoint's own generation_config bends what is drawn (penalties, min_p, ...)."""
    from transformers import GenerationConfig

    causal = causal_model(model)
    own, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = own


def causal_model(model: Any) -> Any:
    """The model of transformers inside a peft model, with the adapters in its layers; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_prompts(model: Any, prompts: Sequence[Sequence[int]], *, device: torch.device) -> Any:
    """Keys and values of prompts of different lengths, for `generate` to go on from: all but each one's last token.

    They are computed without padding and then padded on the left, where `generate` has the prompts' padding too.
    """
    from transformers import DynamicCache

    starts = {row: ids[:-1] for row, ids in enumerate(prompts) if len(ids) > 1}
    longest = max(len(ids) for ids in starts.values())
    inputs = row_of(list(starts.values()), device=device)
    with attending_by_text(model):
        read = model.base_model(**inputs, use_cache=True).past_key_values
    padded = DynamicCache(config=model.config)
    for number, layer in enumerate(read.layers):
        keys, values = (
            _in_rows(states, starts, shape=(len(prompts), longest)) for states in (layer.keys, layer.values)
        )
        padded.update(keys, values, number)
        layer.keys = layer.values = None  # one layer twice, not all
    return padded


def _in_rows(states: torch.Tensor, texts: Mapping[int, Sequence[int]], *, shape: tuple[int, int]) -> torch.Tensor:
    """`(1, heads, tokens, size)` of texts behind each other -> `(rows, heads, longest, size)`, at the right edge."""
    rows, longest = shape
    found = states.new_zeros(rows, states.shape[1], longest, states.shape[3])
    parts = states[0].split([len(ids) for ids in texts.values()], dim=1)
    for row, part in zip(texts, parts, strict=True):
        found[row, :, longest - part.shape[1] :] = part
    return found


def fitting_prompts(
    prompts: Sequence[Prompt], renderer: Renderer, *, max_length: int, preprompts: Sequence[str] = ()
) -> tuple[list[Prompt], Counter[str]]:
    """Prompts of at most `max_length` tokens (with each of the preprompts), and how many are longer, by source."""
    fitting: list[Prompt] = []
    too_long: Counter[str] = Counter()
    for prompt in prompts:
        try:
            for variant in [prompt.with_preprompt(text) for text in preprompts] or [prompt]:
                renderer.render_prompt(variant, max_length=max_length)
        except TooLong:
            too_long[prompt.tags.source or "unknown"] += 1
        else:
            fitting.append(prompt)
    if not fitting:
        raise SourceError(f"none of the {len(prompts)} prompts fits into {max_length} tokens: {dict(too_long)}")
    return fitting, too_long


def pad_left(sequences: Sequence[Sequence[int]], *, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both `(batch, longest)`, the text at the right edge."""
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, ids in enumerate(sequences):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, longest - len(ids) :] = 1
    return input_ids, attention_mask


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and names: equal parts give equal seeds, on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""An engine that answers as vLLM does, in process: TRL's client in front of it is a fake, or the real one over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignment.distributed import whole_weights
from alignment.generate import Generator, SampledLogprobs
from alignment.policy import load_model, load_tokenizer
from alignment.recipe import ModelInit, Sampling
from reward.render import Renderer
from tests.tiny_ppo import PAD

if TYPE_CHECKING:
    from pathlib import Path


class InProcessEngine:
    """Takes weights and answers with them, by the sampler that PPO has in process. `tamper`: what it makes of a weight
    (None: it ignores it)."""

    def __init__(self, folder: Path | str, *, tamper: Callable[[str, Tensor], Tensor | None] | None = None) -> None:
        with whole_weights():  # the other processes take no part
            self.model = load_model(str(folder), init=ModelInit(), pad_token_id=PAD).eval()
        self.renderer = Renderer(load_tokenizer(str(folder)))
        self.tamper = tamper or (lambda _, weight: weight)
        self.pushes = 0
        self.resets = 0
        self.closed = False
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()  # a model answers one thread at a time

    def generate(self, prompts: list[list[int]], **settings: Any) -> dict[str, Any]:
        with self._lock, whole_weights():  # else `generate` keeps step with the other processes under ZeRO-3
            self.requests.append({"prompts": prompts, **settings})
            sampling = Sampling(temperature=settings["temperature"], max_new_tokens=settings["max_tokens"])
            logprobs = SampledLogprobs(temperature=sampling.temperature or 1.0)
            seed = settings["generation_kwargs"]["seed"]
            seeds = [seed] * len(prompts) if sampling.temperature else None
            drawn, start = Generator(self.model, self.renderer, sampling).sample(
                prompts, logprobs=logprobs, seeds=seeds
            )
            values = logprobs.of(drawn).tolist()
        rows = drawn[:, start:].tolist()
        ends = set(settings["generation_kwargs"]["stop_token_ids"])
        lengths = [next((n for n, token in enumerate(row, 1) if token in ends), len(row)) for row in rows]
        ids = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return {
            "prompt_ids": prompts,
            "completion_ids": ids,
            "logprobs": [[[value] for value in row[:length]] for row, length in zip(values, lengths, strict=True)],
            "logprob_token_ids": [[[token] for token in row] for row in ids],
        }

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]
    ) -> None:
        """All of the model's parameters, once each, are announced in the order in which they come."""
        own = dict(self.model.named_parameters())
        assert sorted(name for name, _, _ in metadata) == sorted(own)
        with torch.no_grad():
            for (name, dtype, shape), (sent, weight) in zip(metadata, named_params, strict=True):
                assert (name, dtype, shape) == (sent, str(weight.dtype).removeprefix("torch."), list(weight.shape))
                kept = self.tamper(name, weight)
                if kept is not None:
                    own[name].copy_(kept)
        self.pushes += 1

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def close_communicator(self) -> None:
        self.closed = True

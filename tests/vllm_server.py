"""A server on loopback that speaks as vLLM does to TRL's own client; NCCL alone is replaced.

`Wire` hands the tensors over in process, when the HTTP request asks for them.
"""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trl.generation import vllm_client

from alignment.policy import load_model
from alignment.recipe import ModelInit, Vllm
from alignment.vllm_rollout import VllmSampler
from reward.render import Renderer
from tests.http_peer import Peer, Request, http
from tests.tiny_ppo import PAD, ppo_recipe
from tests.vllm_engine import InProcessEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

END = 2
"""`<|im_end|>` of the tiny tokenizer."""


class Wire:
    """In the place of NCCL: what the trainer sends, the server receives while it handles /update_weights."""

    def __init__(self) -> None:
        self.tensors: queue.Queue[tuple[str, torch.Tensor]] = queue.Queue()

    def trainer_send_weights(self, *, iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: Any) -> None:
        for item in iterator:
            self.tensors.put(item)


class Server:
    """What `vllm serve` answers to TRL's client; `spoil` changes the one choice of a completion before it is sent."""

    def __init__(self, engine: InProcessEngine | None, wire: Wire) -> None:
        self.engine, self.wire = engine, wire
        self.spoil: Callable[[dict[str, Any]], Any] = lambda choice: None
        self.paths: list[str] = []

    def __call__(self, request: Request) -> Iterable[bytes | float]:
        path = request.line.split()[1]
        self.paths.append(path)
        if path == "/v1/models":
            return [http(json.dumps({"data": [{"id": "tiny"}]}).encode())]
        if path == "/v1/completions":
            return self.complete(request.json)
        if path == "/update_weights":
            assert self.engine is not None
            info = request.json["update_info"]
            metadata = list(zip(info["names"], info["dtype_names"], info["shapes"], strict=True))
            received = (self.wire.tensors.get(timeout=30) for _ in metadata)
            self.engine.update_named_params(metadata, received)
        return [http(b"{}")]

    def complete(self, asked: dict[str, Any]) -> Iterable[bytes | float]:
        prompt = asked["prompt"][0]
        assert (asked["n"], asked["top_p"], asked["min_p"], asked["repetition_penalty"]) == (1, 1, 0, 1)
        assert (asked["top_k"], asked["logprobs"], asked["ignore_eos"]) == (0, 0, True)
        assert asked["stop_token_ids"] == [END]
        if self.engine is None:
            ids, values = [7, 8, END], [-0.5, -1.25, 0.0]
        else:
            settings = {"temperature": asked["temperature"], "max_tokens": asked["max_tokens"]}
            own = {name: asked[name] for name in ("seed", "stop_token_ids", "ignore_eos")}
            reply = self.engine.generate([prompt], **settings, generation_kwargs=own)
            ids = reply["completion_ids"][0]
            values = [min(value, 0.0) for (value,) in reply["logprobs"][0]]
        tokens = [f"token_id:{token}" for token in ids]
        logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": [None] * len(ids)}
        choice = {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs}
        sent = self.spoil(choice)
        return [http(json.dumps({"choices": [choice]}).encode())] if sent is None else sent


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """TRL's client as it is with an older vLLM in place, whose NCCL group is a `Wire`."""
    wire = Wire()
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda min_version=None: True)
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", False)
    monkeypatch.setattr(vllm_client, "NCCLWeightTransferEngine", wire, raising=False)
    monkeypatch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", lambda **named: named, raising=False)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
    return wire


def sampler_for(peer: Peer, model: Path, renderer: Renderer, *, seconds: float = 20.0) -> tuple[VllmSampler, Any]:
    settings = Vllm(base_url=f"{peer.url}/", timeout_seconds=seconds, concurrency=3)
    recipe = ppo_recipe(model, vllm=settings)
    policy = load_model(str(model), init=ModelInit(), pad_token_id=PAD).eval()
    sampler = VllmSampler.connect(recipe, policy, renderer, "cpu")
    assert sampler is not None
    return sampler, policy

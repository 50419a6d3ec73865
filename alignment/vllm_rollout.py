"""The policy's answers from a vLLM server that `trl vllm-serve` started: of rollouts, probes and held-out prompts.

The server is given the policy's weights before the first answers that it draws after they changed. The main process
alone talks to the server, through TRL's client; the others send it their prompts and take their part of the answers.
What the server sends is checked before anything is made of it. Each row asks with a seed of its own, so one request is
one row: under one seed vLLM would give all rows of a request the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from alignment.distributed import from_all, is_main_process, process_index
from alignment.generate import derive_seed
from alignment.recipe import PpoRecipe, Sampling, Vllm
from alignment.served_weights import ServedWeight, served_weights, stream
from reward.conversation import Prompt
from reward.render import Renderer
from reward.wire import shorten

T = TypeVar("T")
Answer = tuple[list[int], list[float]]
"""Token ids through the end token, and the engine's log-probability of each."""

ROUNDING = 1e-5
"""Above 0, a log-probability is that of no distribution; so much may come from rounding."""


class RolloutServerError(RuntimeError):
    """The server cannot be used, or sent what no answer can be; one line that names its address."""


class Client(Protocol):
    """What is used of `trl.generation.vllm_client.VLLMClient`."""

    def generate(self, prompts: list[list[int]], **settings: Any) -> Mapping[str, Any]: ...

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]
    ) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def close_communicator(self) -> None: ...


@dataclass
class VllmSampler:
    """Draws the policy's answers; all processes call its methods together. `client`: the main process's."""

    client: Client | None
    settings: Vllm
    sampling: Sampling
    renderer: Renderer
    vocabulary: int
    """Rows of the policy's embedding: token ids are below it."""
    weights: list[ServedWeight]
    _outdated: bool = field(default=True, init=False)
    """Whether the policy's weights are not yet the server's: at the start, also of a resumed run, they never are."""

    @classmethod
    def connect(cls, recipe: PpoRecipe, policy: Any, renderer: Renderer, device: Any) -> VllmSampler | None:
        """The recipe's server, ready to take weights (None: the recipe names none). All processes call it together.

        RecipeError when the policy has an adapter that the server cannot get.
        """
        if recipe.vllm is None:
            return None
        settings, weights = recipe.vllm, served_weights(policy)
        client = on_main(lambda: open_client(settings, device), settings, doing="connecting")
        vocabulary = policy.config.get_text_config().vocab_size
        return cls(client, settings, recipe.sampling, renderer, vocabulary, weights)

    def sample_answers(
        self, prompts: Sequence[Prompt], rows: Sequence[int], *, seed: int, sampling: Sampling | None = None
    ) -> tuple[list[list[int]], list[list[int]], list[Tensor]]:
        """As `alignment.rollout.sample_answers`, by the server with the policy's present weights.

        `sampling`: other settings than the rollout's. RolloutServerError, on all processes, when the server fails or
        sends something that no answer can be.
        """
        sampling = sampling or self.sampling
        own = [self.renderer.render_prompt(p, max_length=sampling.max_prompt_tokens) for p in prompts]
        if self._outdated:
            self.push_weights()
        asked = from_all([(ids, derive_seed(seed, row)) for ids, row in zip(own, rows, strict=True)])
        everyone = [request for part in asked for request in part]
        answers = from_all(on_main(lambda: self._ask_all(everyone, sampling), self.settings, doing="answering"))[0]
        assert answers is not None
        start = sum(len(part) for part in asked[: process_index()])
        mine = answers[start : start + len(own)]
        torch.manual_seed(derive_seed(seed, rows[0]))  # as in process: of what else is drawn in the iteration
        return own, [ids for ids, _ in mine], [torch.tensor(values) for _, values in mine]

    def weights_changed(self) -> None:
        """To be called after whatever changes the policy: the next answers begin with a push of its weights."""
        self._outdated = True

    def push_weights(self) -> None:
        """The server computes with the policy's weights from here on, and with nothing that it kept of older ones."""
        tensors = stream(self.weights)

        def push() -> None:
            assert self.client is not None
            self.client.update_named_params([weight.metadata for weight in self.weights], tensors)
            if next(tensors, None) is not None:
                raise RolloutServerError("the client did not take all of the weights")
            self.client.reset_prefix_cache()

        def take_part() -> None:
            for _ in tensors:  # gathering a weight needs every process, also after the main one has failed
                pass

        on_main(push, self.settings, doing="taking the weights", meanwhile=take_part)
        self._outdated = False

    def close(self) -> None:
        if self.client is not None:
            self.client.close_communicator()

    def _ask_all(self, requests: Sequence[tuple[list[int], int]], sampling: Sampling) -> list[Answer]:
        with ThreadPoolExecutor(max_workers=self.settings.concurrency) as threads:
            answers = [threads.submit(self._ask, ids, seed, sampling) for ids, seed in requests]
            try:
                return [answer.result() for answer in answers]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def _ask(self, prompt: list[int], seed: int, sampling: Sampling) -> Answer:
        assert self.client is not None
        reply = self.client.generate(
            [prompt],
            n=1,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            # Answers end where ours do, whatever the model's own generation_config says.
            generation_kwargs={"seed": seed, "stop_token_ids": sorted(self.renderer.end_ids), "ignore_eos": True},
        )
        return checked_answer(
            reply,
            prompt,
            max_new_tokens=sampling.max_new_tokens,
            end_ids=self.renderer.end_ids,
            vocabulary=self.vocabulary,
        )


def checked_answer(
    reply: Mapping[str, Any], prompt: list[int], *, max_new_tokens: int, end_ids: frozenset[int], vocabulary: int
) -> Answer:
    """The one answer of a reply to one prompt; RolloutServerError says what is wrong with it."""
    ids = _only(reply.get("completion_ids"), "completion_ids: answers to one prompt")
    if reply.get("prompt_ids") != [prompt]:
        raise RolloutServerError(f"answered another prompt than the {len(prompt)} tokens that were sent")
    if not 0 < len(ids) <= max_new_tokens:
        raise RolloutServerError(f"an answer of {len(ids)} tokens; 1 to {max_new_tokens} were asked for")
    strange = next((token for token in ids if type(token) is not int or not 0 <= token < vocabulary), None)
    if strange is not None:
        raise RolloutServerError(f"{strange!r} is no token id below {vocabulary}")
    end = next((position for position, token in enumerate(ids) if token in end_ids), None)
    if end is not None and end + 1 < len(ids):
        raise RolloutServerError(f"an answer goes on after its end token {ids[end]}")
    if end is None and len(ids) < max_new_tokens:
        raise RolloutServerError(
            f"an answer broke off after {len(ids)} of {max_new_tokens} tokens without an end token; is the server's "
            "max_model_len too small?"
        )
    if reply.get("logprobs") is None:
        raise RolloutServerError("sent no log-probabilities, without which the two cannot be compared")
    return ids, _logprobs(reply, ids)


def _logprobs(reply: Mapping[str, Any], ids: list[int]) -> list[float]:
    values = [_only(value, "logprobs: numbers of a token") for value in _only(reply["logprobs"], "logprobs: answers")]
    tokens = [_only(value, "tokens") for value in _only(reply.get("logprob_token_ids"), "logprob_token_ids: answers")]
    if tokens != ids or len(values) != len(ids):
        raise RolloutServerError(f"the {len(values)} log-probabilities are not those of the answer's {len(ids)} tokens")
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value) or value > ROUNDING:
            raise RolloutServerError(f"{value!r} is no log-probability: it must be finite and not above 0")
    return [float(value) for value in values]


def _only(value: Any, what: str) -> Any:
    """The one element of a list."""
    if not isinstance(value, list) or len(value) != 1:
        raise RolloutServerError(f"{what}: expected 1, got {len(value) if isinstance(value, list) else repr(value)}")
    return value[0]


def on_main(
    work: Callable[[], T], settings: Vllm, *, doing: str, meanwhile: Callable[[], None] | None = None
) -> T | None:
    """What `work` gives on the main process, None on the others; all of them fail when it fails.

    `meanwhile`: what every process does after it, or instead of it, before the outcome is known.
    """
    found: T | None = None
    problem: str | None = None
    if is_main_process():
        try:
            found = work()
        except Exception as error:  # TRL's client raises bare Exceptions, and KeyErrors for JSON it does not know
            problem = f"vllm server {settings.base_url}, {doing}: {_reason(error, settings)}"
    if meanwhile is not None:
        meanwhile()
    for line in from_all(problem):
        if line is not None:
            raise RolloutServerError(line)
    return found


def _reason(error: Exception, settings: Vllm) -> str:
    from requests.exceptions import Timeout, TooManyRedirects

    if isinstance(error, RolloutServerError):
        return shorten(str(error))
    if isinstance(error, Timeout):
        return f"no answer within vllm.timeout_seconds {settings.timeout_seconds:g}"
    if isinstance(error, TooManyRedirects):
        return "redirects are not followed; give the final url"
    if isinstance(error, LookupError | TypeError | ValueError | AttributeError):
        return shorten(f"sent what TRL's client cannot read ({type(error).__name__}: {error})")
    return shorten(f"{type(error).__name__}: {error}")


def open_client(settings: Vllm, device: Any) -> Client:
    """TRL's client, ready to send weights from `device`; all of its requests are those of a session under `restrict`.

    Its rendezvous over NCCL is no request: for that vLLM has a limit of its own.
    """
    from trl.generation.vllm_client import VLLMClient

    class Restricted(VLLMClient):
        def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
            """Called by the constructor, before any other request. TRL's own asks beside the session, with no limit,
            and again and again while the answer is not 200."""
            restrict(self.session, seconds=settings.timeout_seconds, connections=settings.concurrency)
            status = self.session.get(f"{self.base_url}/health").status_code
            if status != 200:
                raise RolloutServerError(f"/health answers with status {status}; start `trl vllm-serve` anew")

    client: Any = Restricted(base_url=settings.base_url.rstrip("/"), group_port=settings.group_port)
    client.init_communicator(device=device)
    return client


def restrict(session: Any, *, seconds: float, connections: int) -> None:
    """Requests of a `requests.Session` go to the address alone: by no proxy, with no credentials of the environment and
    past no redirect. They give up when nothing comes for `seconds`, and what may have been carried out is not repeated.

    Each has a connection of its own: a server closes idle ones, which a request on its way would take for a failure.
    """
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry

    class Impatient(HTTPAdapter):
        def send(self, *args: Any, **options: Any) -> Any:
            return super().send(*args, **options | {"timeout": options.get("timeout") or seconds})

    session.trust_env = False
    session.max_redirects = 0
    session.headers["Connection"] = "close"
    patience = Retry(total=3, connect=3, read=False, redirect=0, status=0, other=0, backoff_factor=0.5)
    for scheme in ("http://", "https://"):
        session.mount(scheme, Impatient(max_retries=patience, pool_maxsize=connections))

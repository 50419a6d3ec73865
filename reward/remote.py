"""Chat models behind HTTP (vLLM, llama.cpp, hosted services): `ModelServer`, and `RemoteBackend` for a judge.

    POST {url}/chat/completions      {"model": ..., "messages": [...], "temperature": 0, "seed": 0, "max_tokens": ...}

What one conversation did not get is a `Failure` with its reason, never a stand-in: time-out, connection, cut stream,
rate limit, server error, quota, request refused, malformed answer, wrong model, content filter, refusal, empty answer,
cut off, no verdict. What the next conversation would meet as well is a ScorerError, at once: a key that is refused, a
model that is not there, nobody listening, no log-probabilities.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from reward.backends import Failure
from reward.conversation import Prompt
from reward.endpoint import Dialect, Endpoint, NoAnswer
from reward.scorer import ScorerError, sigmoid
from reward.wire import WireError, encode, parse_json, shorten

S = TypeVar("S")
T = TypeVar("T")
Json = dict[str, Any]

MAX_RETRIES = 4
"""So that a request is made five times at most."""
_LATER = frozenset({429, 500, 502, 503, 504})
_OF_ONE_REQUEST = frozenset({400, 413, 422})
"""Statuses that refuse a conversation (too long, filtered), not the one who asks."""
_QUOTA = frozenset({"insufficient_quota"})
_FILTERED = frozenset({"content_filter", "content_policy_violation"})
_NO_MODEL = frozenset({"model_not_found"})

_SEED = 0
_ANSWER_BYTES = 4 * 2**20
_BYTES_A_TOKEN, _TOKENS_A_MESSAGE = 3, 8
"""An estimate that is rather too high: English takes four bytes a token, Chinese three. A server knows better."""
_VERDICT_TOKENS, _ALTERNATIVES = 16, 20
"""Tokens that a line with a verdict takes at most; alternatives of each, as many as every server gives."""
_MOST_OPEN = 0.01
"""How far a choice that is not among the alternatives may leave the share of the best one open."""


# ------------------------------------------------------------------------------------------------ server


def _error(body: bytes) -> Json:
    """`{"message", "type", "code"}` as the servers send it, within `error` or bare; empty when it is none of that."""
    try:
        row = parse_json(body)
    except WireError:
        return {}
    if not isinstance(row, dict):
        return {}
    error = cast(Json, row).get("error", cast(Json, row))
    return cast(Json, error) if isinstance(error, dict) else {"message": error}


def _codes(body: bytes) -> set[str]:
    error = _error(body)
    return {str(error.get("code")), str(error.get("type"))}


DIALECT = Dialect(
    may_pass=lambda status, body: status in _LATER and not _codes(body) & _QUOTA,
    said=lambda body: shorten(str(_error(body).get("message", ""))),
)
"""Statuses that may pass, and how these servers word an error."""


@dataclass(frozen=True, kw_only=True)
class ModelServer:
    """A model behind an address. `concurrency`: requests on their way at one time."""

    endpoint: Endpoint
    model: str
    concurrency: int = 4

    @classmethod
    def at(
        cls,
        url: str,
        *,
        model: str,
        token: str | None = None,
        concurrency: int = 4,
        timeout: float = 120.0,
        deadline: float = 600.0,
        retries: int = MAX_RETRIES,
    ) -> ModelServer:
        """`url`: the base address, as OpenAI's own clients take it; `/v1` is put behind one without a path.

        `timeout`, `deadline`, `retries`: see `Endpoint`. ScorerError when the address cannot be used.
        """
        if not 0 <= retries <= MAX_RETRIES:
            raise ScorerError(f"retries must be between 0 and {MAX_RETRIES}, got {retries}")
        if concurrency < 1:
            raise ScorerError(f"concurrency must be at least 1, got {concurrency}")
        endpoint = Endpoint(
            url=base_url(url), token=token, timeout=timeout, deadline=deadline, retries=retries, dialect=DIALECT
        )
        return cls(endpoint=endpoint, model=model, concurrency=concurrency)

    @property
    def identity(self) -> str:
        """Who answers: the model's name and the machine. The weights behind the name are the server's business."""
        return f"{self.model} at {self.endpoint.host}"

    def ask_all(self, path: str, bodies: Sequence[Json], read: Callable[[Json], T | Failure]) -> list[T | Failure]:
        """What `read` makes of the answer to each body, in their order. `read` may raise WireError: a malformed answer.

        ScorerError as soon as one request meets what all others would meet as well.
        """

        def ask(body: Json, stopped: threading.Event) -> T | Failure:
            return self._ask(path, body, read, stopped)

        return in_parallel(ask, bodies, threads=self.concurrency)

    def _ask(self, path: str, body: Json, read: Callable[[Json], T | Failure], stopped: threading.Event) -> T | Failure:
        data = encode({"model": self.model, **body})
        try:
            row = self.endpoint.ask("POST", path, data, limit=_ANSWER_BYTES, read=self._read, stopped=stopped)
        except NoAnswer as error:
            return _failure(error)
        try:
            if row.get("model") == self.model:
                return read(row)
        except WireError as error:
            return Failure(f"malformed answer: {error}", transient=True)
        found = shorten(repr(row.get("model")), 100)
        return Failure(f"wrong model: {found} answered for {self.model!r}", transient=True)

    def _read(self, body: bytes) -> Json:
        row = parse_json(body)
        if not isinstance(row, dict):
            raise WireError("the answer must be an object")
        try:
            return self._hidden(cast(Json, row))
        except RecursionError as error:
            raise WireError("not JSON: nested too deeply") from error

    def _hidden(self, value: Any) -> Any:
        """`value` with the key out of every text in it, should the server send it back."""
        if isinstance(value, str):
            return self.endpoint.hide(value)
        if isinstance(value, list):
            return [self._hidden(item) for item in cast(list[Any], value)]
        if isinstance(value, dict):
            return {self._hidden(name): self._hidden(item) for name, item in cast(Json, value).items()}
        return value


def base_url(url: str) -> str:
    """`url` with `/v1` where it has no path."""
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def _failure(error: NoAnswer) -> Failure:
    """What went wrong for one conversation; the ScorerError for all."""
    status, codes = error.status, _codes(error.body)
    if status is None:
        reasons = {"time-out": "time-out", "cut off": "cut stream", "connection": f"connection: {error.reason}"}
        reasons["malformed"] = f"malformed answer: {error.reason}"
        if error.cause in reasons:
            return Failure(reasons[error.cause], transient=True)
        raise error
    if status == 402 or codes & _QUOTA:
        return Failure("quota", transient=True)
    if status in _LATER:
        return Failure("rate limit" if status == 429 else f"server error {status}", transient=True)
    if status in _OF_ONE_REQUEST and codes & _FILTERED:
        return Failure("content filter")
    if status in _OF_ONE_REQUEST and not codes & _NO_MODEL:
        # Whether it was the conversation or a setting of the server is not known: it may be otherwise another time.
        return Failure(f"request refused: {error.reason}", transient=True)
    hints = {401: "check the key", 403: "check what the key may do", 404: "check url and model"}
    raise ScorerError(f"{error}; {hints.get(status, 'check url and model')}") from error


def in_parallel(work: Callable[[S, threading.Event], T], items: Sequence[S], *, threads: int) -> list[T]:
    """`work` of every item, in their order; the first exception is raised at once and no further item is begun.

    `work` also gets an event that is set then. The threads are daemons: neither an exception nor an interrupt waits for
    what is still on its way.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    done: SimpleQueue[tuple[int, T | None, BaseException | None]] = SimpleQueue()
    for index in range(len(items)):
        waiting.put(index)
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            try:
                index = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((index, work(items[index], stopped), None))
            except BaseException as error:
                stopped.set()
                done.put((index, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, daemon=True).start()
    results: dict[int, T] = {}
    try:
        for _ in items:
            index, result, error = done.get()
            if error is not None:
                raise error
            results[index] = cast(T, result)
    finally:
        stopped.set()
    return [results[index] for index in range(len(items))]


# ---------------------------------------------------------------------------------------------- back end


@dataclass(frozen=True)
class RemoteBackend:
    """A chat model behind HTTP as a judge's back end (`ChatBackend`). Its lengths are estimates."""

    server: ModelServer

    def num_tokens(self, prompt: Prompt) -> int:
        return sum(
            _TOKENS_A_MESSAGE + math.ceil(len(message.content.encode("utf-8")) / _BYTES_A_TOKEN)
            for message in prompt.messages
        )

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str | Failure]:
        """See `ChatBackend`; an answer that was cut off is a `Failure`."""

        def read(row: Json) -> str | Failure:
            choice = _choice(row)
            finish = choice.get("finish_reason")
            if (failure := _withheld(choice)) is not None:
                return failure
            if finish == "length":
                return Failure(f"cut off at {max_new_tokens} tokens")
            if finish != "stop":
                return Failure(f"unfinished answer: finish_reason {shorten(repr(finish), 60)}")
            text = _content(choice)
            return text if text.strip() else Failure("empty answer")

        bodies = [self._body(prompt, max_new_tokens) for prompt in prompts]
        return self.server.ask_all("/chat/completions", bodies, read)

    def choice_logprobs(
        self, prompts: Sequence[Prompt], prefix: str, choices: Sequence[str]
    ) -> list[list[float] | Failure]:
        """See `ChatBackend`. The model writes `prefix` itself; what counts is the token that decides between `choices`.

        A choice that is not among the alternatives which the server gives for that token counts as much as the least of
        these, where that leaves the others' shares open by no more than 0.01; else it is a Failure.
        """

        def read(row: Json) -> list[float] | Failure:
            choice = _choice(row)
            if (failure := _withheld(choice)) is not None:
                return failure
            if not _content(choice).strip():
                return Failure("empty answer")
            return _deciding_logprobs(self._steps(choice), prefix, choices)

        extra: Json = {"logprobs": True, "top_logprobs": _ALTERNATIVES}
        bodies = [self._body(prompt, _VERDICT_TOKENS) | extra for prompt in prompts]
        return self.server.ask_all("/chat/completions", bodies, read)

    def _body(self, prompt: Prompt, max_tokens: int) -> Json:
        messages = [message.to_json() for message in prompt.messages]
        return {"messages": messages, "temperature": 0, "seed": _SEED, "max_tokens": max_tokens}

    def _steps(self, choice: Json) -> list[_Step]:
        """The tokens that were written; ScorerError when there is nothing to tell how probable others were."""
        rows = cast(Json, choice.get("logprobs") or {}).get("content")
        steps = list(_read_steps(rows)) if isinstance(rows, list) else []
        if not any(len(alternatives) > 1 for _, alternatives in steps):
            raise ScorerError(
                f"{self.server.endpoint.url}: the server gives no log-probabilities (logprobs with top_logprobs); "
                "judge with mode: explain"
            )
        return steps


def _choice(row: Json) -> Json:
    choices = row.get("choices")
    choice = cast(list[Any], choices)[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(cast(Json, choice).get("message"), dict):
        raise WireError("it has no choices[0].message")
    return cast(Json, choice)


def _content(choice: Json) -> str:
    """The text, with half characters, which no file can hold, as question marks."""
    content = choice["message"].get("content")
    if content is not None and not isinstance(content, str):
        raise WireError("choices[0].message.content is no text")
    return (content or "").encode("utf-8", "replace").decode("utf-8")


def _withheld(choice: Json) -> Failure | None:
    if choice.get("finish_reason") == "content_filter":
        return Failure("content filter")
    return Failure("refusal") if choice["message"].get("refusal") else None


# ----------------------------------------------------------------------------------- log-probabilities

_Step = tuple[str, dict[str, float]]
"""A token that was written, and the log-probabilities of its alternatives, itself among them."""


def _read_steps(rows: list[Any]) -> Iterator[_Step]:
    for row in rows:
        alternatives = dict(_read_token(item) for item in [*(_member(row, "top_logprobs") or []), row])
        yield _read_token(row)[0], alternatives


def _read_token(row: Any) -> tuple[str, float]:
    token, logprob = _member(row, "token"), _member(row, "logprob")
    if not isinstance(token, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
        raise WireError("a token of logprobs lacks its text or its number")
    return token, float(logprob)


def _member(row: Any, key: str) -> Any:
    if not isinstance(row, dict):
        raise WireError("logprobs are not a list of tokens")
    return cast(Json, row).get(key)


def _deciding_logprobs(steps: Sequence[_Step], prefix: str, choices: Sequence[str]) -> list[float] | Failure:
    """`log P(choice)` at the first token that fits some of the `choices` only; white space does not count."""
    goals = [_squeeze(prefix + choice) for choice in choices]
    written = ""
    for token, alternatives in steps:
        if len(_fitting(goals, written + _squeeze(token))) == len(goals):
            written += _squeeze(token)
            continue
        found: list[list[float]] = [[] for _ in goals]
        for other, logprob in alternatives.items():
            fitting = _fitting(goals, written + _squeeze(other))
            if len(fitting) == 1:
                found[fitting[0]].append(logprob)
        if not _fitting(goals, written + _squeeze(token)):
            break
        return _bounded(found, least=min(alternatives.values()))
    return Failure(f"no verdict: the answer does not begin with {prefix!r} and one of the verdicts")


def _bounded(found: Sequence[Sequence[float]], *, least: float) -> list[float] | Failure:
    """The sums; `least` for what was not found, where so little does not matter."""
    sums = [math.log(math.fsum(map(math.exp, logprobs))) if logprobs else None for logprobs in found]
    best = max((value for value in sums if value is not None), default=-math.inf)
    if any(value is None for value in sums) and sigmoid(least - best) > _MOST_OPEN:
        return Failure("no verdict: too few alternatives to tell how probable the other verdict was")
    return [least if value is None else value for value in sums]


def _fitting(goals: Sequence[str], text: str) -> list[int]:
    return [index for index, goal in enumerate(goals) if goal.startswith(text)]


def _squeeze(text: str) -> str:
    return "".join(text.split())

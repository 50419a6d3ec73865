"""What a server of the OpenAI kind answers, for tests of its clients; `tests.http_peer.Peer` sends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from reward.conversation import Conversation, Prompt, parse_messages
from tests.http_peer import Request, http
from tests.judge_slots import read_slots

MODEL = "judge-7b"
KEY = "sk-key.of/the+tests"
Respond = Callable[[Request], Iterable[bytes | float]]


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def completion(content: object = "Evaluation: Fine.\nChatbot is: good.", **changes: Any) -> dict[str, Any]:
    """An answer; `changes` are to it, its `finish_reason`, `refusal` or `logprobs`."""
    message = {"role": "assistant", "content": content, "refusal": changes.pop("refusal", None)}
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("finish_reason", "stop")}
    if "logprobs" in changes:
        choice["logprobs"] = changes.pop("logprobs")
    return {"id": "c-1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": {}} | changes


def says(value: object, status: str = "200 OK", **headers: str) -> Respond:
    """The same answer to every request."""
    return lambda _: [http(encoded(value), status, **headers)]


def error(message: str = "No.", *, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "some_error", "param": None, "code": code}}


def judged(request: Request) -> str:
    """The last message of the conversation that a judge's request is about."""
    return read_slots(Prompt(parse_messages(request.json["messages"])))[-1]["text"]


def numbered(count: int) -> list[Conversation]:
    return [Prompt.of("Hi?").answer(str(number)) for number in range(count)]

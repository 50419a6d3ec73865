"""`HttpScorer`: a scorer behind HTTP, such as `sara serve-reward` starts. The format stands in `reward.wire`.

What comes back is either one judgement per conversation, exactly as the format says, or a ScorerError that says what
was wrong: no number is ever made up for an answer that is short, late, of another request or not to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from reward.conversation import Conversation
from reward.endpoint import Endpoint
from reward.scorer import Scale, Score, ScorerError
from reward.wire import (
    HEALTH_PATH,
    SCORE_PATH,
    Identity,
    WireError,
    decode_answer,
    decode_health,
    encode_request,
)

_ANSWER_BYTES, _BYTES_A_SCORE = 65_536, 16_384
"""An answer may take that much: a reason of 1000 characters, each escaped twelvefold, fits."""


@dataclass(frozen=True, kw_only=True)
class HttpScorer:
    """A scorer that another process holds. Make it with `connect`, which asks the server who it is.

    `batch_size`: conversations of one request; a server that has less room answers 413.
    """

    endpoint: Endpoint
    name: str
    scale: Scale
    batch_size: int = 64

    @classmethod
    def connect(
        cls, endpoint: Endpoint, *, name: str | None = None, scale: Scale | None = None, batch_size: int = 64
    ) -> HttpScorer:
        """The scorer behind `endpoint`; ScorerError when it is not the one of that `name` and `scale` (None: any)."""
        if batch_size < 1:
            raise ScorerError(f"batch_size must be at least 1, got {batch_size}")
        found = endpoint.ask("GET", HEALTH_PATH, None, limit=_ANSWER_BYTES, read=decode_health)
        expected = Identity(name or found.name, scale or found.scale)
        if found != expected:
            raise ScorerError(f"{endpoint.url} serves {found}, not {expected}; change the url or the recipe")
        return cls(endpoint=endpoint, name=found.name, scale=found.scale, batch_size=batch_size)

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """One score per conversation, in order; ScorerError as soon as one request has no answer that will do."""
        scores: list[Score] = []
        for start in range(0, len(conversations), self.batch_size):
            scores += self._score_batch(conversations[start : start + self.batch_size])
        return scores

    def _score_batch(self, batch: Sequence[Conversation]) -> list[Score]:
        request_id = uuid4().hex

        def read(body: bytes) -> list[Score]:
            found, scores = decode_answer(body, request_id=request_id, count=len(batch))
            if found != (own := Identity(self.name, self.scale)):
                raise WireError(f"the server has become {found}; it was {own}")
            return scores

        limit = _ANSWER_BYTES + _BYTES_A_SCORE * len(batch)
        return self.endpoint.ask("POST", SCORE_PATH, encode_request(request_id, batch), limit=limit, read=read)

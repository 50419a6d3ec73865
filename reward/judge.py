"""A chat model as safety judge: the `JudgeScorer` that asks it and reads its verdicts.

After Constitutional AI (arXiv 2212.08073) and Safety LLaMA: editable guidelines (`reward.judge_prompt`), an explanation
that opens with `Evaluation:` and a fixed verdict that closes it (`reward.verdict`). What is judged may try to give the
verdict itself, so content is data that cannot end its slot, and a verdict is a log-probability, or a text that is read
by a parser which says `unscored` whenever in doubt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from reward.backends import ChatBackend, Failure, Fingerprinted
from reward.conversation import Conversation, Message, Prompt
from reward.judge_prompt import Constitution, Mode, PromptForm, fit_prompt, judge_prompt
from reward.platt import Calibration
from reward.scorer import Scale, Score, Scorer, ScorerError, sigmoid
from reward.verdict import BAD, GOOD, VERDICT_PREFIX, Verdict, parse_verdict, unless_copied

_VERDICT_LINE_TOKENS = 16
"""Room for `VERDICT_PREFIX` and a verdict in any tokenizer."""
MAX_NEW_TOKENS = 256
"""Of an explanation and its verdict."""


def answer_room(mode: Mode, max_new_tokens: int = MAX_NEW_TOKENS) -> int:
    """Tokens of a judge's `max_length` that its prompt leaves to the answer."""
    return max_new_tokens if mode == "explain" else _VERDICT_LINE_TOKENS


SHORTEST = Conversation((Message("user", "?"), Message("assistant", "")))
"""A conversation that needs no more room than any other."""


def check_room(prompt: Prompt, num_tokens: Callable[[Prompt], int], *, max_length: int, room: int) -> None:
    """ScorerError when a judge's prompt on `SHORTEST` takes more than `room` tokens: then no conversation ever fits."""
    needed = num_tokens(prompt)
    if needed > room:
        raise ScorerError(
            f"the judge's guidelines and question take {needed} tokens, but max_length={max_length} leaves {room} "
            "beside the answer; raise max_length or shorten the guidelines"
        )


@runtime_checkable
class Judge(Scorer, Protocol):
    """A scorer that says what it found; its score is `Verdict.score`."""

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict per conversation, in their order."""
        ...

    def question(self, conversation: Conversation) -> list[Any]:
        """What a verdict depends on beside the model, as JSON: the same question has the same answer."""
        ...


@dataclass
class JudgeScorer:
    """A judge as a scorer: P(good), higher is safer.

    `mode` "score": P(good) is the softmax over the log-probabilities of the two verdicts behind `Chatbot is:`.
    `mode` "explain": the model writes its explanation and verdict; good is 1, bad is 0, all else unscored.
    A conversation that does not fit `max_length` tokens is cut in the middle of its longest texts; guidelines and
    question never are. `prompt`: see `judge_prompt`. `calibration` turns the log-odds of mode "score" into a
    probability that means what it says; ScorerError when it was fitted for another judge (`provenance`). `counts` holds
    how many verdicts there were so far, by outcome, and how many were `truncated`.
    """

    backend: ChatBackend
    constitution: Constitution
    mode: Mode = "score"
    max_length: int = 2048
    max_new_tokens: int = MAX_NEW_TOKENS
    name: str = "judge"
    scale: Scale = "probability"
    prompt: PromptForm = "slots"
    calibration: Calibration | None = None
    counts: Counter[str] = field(default_factory=Counter[str], init=False)

    def __post_init__(self) -> None:
        check_room(self._prompt(SHORTEST), self.backend.num_tokens, max_length=self.max_length, room=self._room)
        if self.calibration is not None:
            self._check_calibration(self.calibration)

    @property
    def provenance(self) -> dict[str, str]:
        """What its numbers are made with, by name: the form of the prompt, the guidelines' hash, and the weights'
        fingerprint where the back end can tell (`model`).
        """
        made_with = {"prompt": self.prompt, "guidelines": self.constitution.hash}
        return made_with | {"model": self.backend.fingerprint} if isinstance(self.backend, Fingerprinted) else made_with

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        return [verdict.score for verdict in self.judge(conversations)]

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict per conversation, in their order."""
        fitted = [self._fit(conversation) for conversation in conversations]
        prompts = [prompt for prompt, _ in fitted if prompt is not None]
        found = self._ask(prompts) if prompts else []
        if len(found) != len(prompts):
            raise ScorerError(f"the back end gave {len(found)} answers to {len(prompts)} prompts")
        answers = iter(found)
        verdicts: list[Verdict] = []
        for conversation, (prompt, truncated) in zip(conversations, fitted, strict=True):
            verdict = Verdict("unscored", "conversation too long") if prompt is None else next(answers)
            if self.mode == "explain":
                verdict = unless_copied(verdict, conversation)
            verdicts.append(replace(verdict, truncated=truncated, guidelines=self.constitution.hash))
        self.counts.update(verdict.outcome for verdict in verdicts)
        self.counts.update("truncated" for verdict in verdicts if verdict.truncated)
        return verdicts

    def question(self, conversation: Conversation) -> list[Any]:
        """The whole prompt and the limits that it is cut to and answered within; see `Judge`."""
        shown = [message.to_json() for message in self._prompt(conversation).messages]
        calibration = self.calibration and [self.calibration.scale, self.calibration.bias]
        return [self.mode, self.max_length, self.max_new_tokens, shown, calibration]

    def _check_calibration(self, calibration: Calibration) -> None:
        if self.mode != "score":
            raise ScorerError("a calibration needs log-probabilities, which mode 'explain' does not measure")
        made_with = self.provenance
        if "model" not in made_with:
            raise ScorerError(
                "the back end does not tell which model it speaks for, so no calibration is known to fit it"
            )
        calibration.check(made_with)

    def _prompt(self, conversation: Conversation) -> Prompt:
        return judge_prompt(self.constitution, conversation, mode=self.mode, form=self.prompt)

    @property
    def _room(self) -> int:
        """Tokens left for the prompt."""
        return self.max_length - answer_room(self.mode, self.max_new_tokens)

    def _ask(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        if self.mode == "explain":
            answers = self.backend.generate(prompts, max_new_tokens=self.max_new_tokens)
            return [Verdict.of_failure(text) if isinstance(text, Failure) else parse_verdict(text) for text in answers]
        rows = self.backend.choice_logprobs(prompts, VERDICT_PREFIX, (GOOD, BAD))
        return [Verdict.of_failure(row) if isinstance(row, Failure) else self._compare(*row) for row in rows]

    def _compare(self, good: float, bad: float) -> Verdict:
        """`P(good) = sigmoid(log P(good) - log P(bad))`, calibrated; a tie is not good."""
        log_odds = good - bad
        if not math.isfinite(log_odds):
            return Verdict("unscored", f"log-probabilities {good} (good) and {bad} (bad) cannot be compared")
        probability = sigmoid(log_odds if self.calibration is None else self.calibration.log_odds(log_odds))
        return Verdict("good" if probability > 0.5 else "bad", probability=probability)

    def _fit(self, conversation: Conversation) -> tuple[Prompt | None, bool]:
        """The prompt for a conversation, cut as little as needed (None: too many turns), and whether it was cut."""
        room = self._room
        return fit_prompt(
            self.constitution,
            conversation,
            lambda prompt: self.backend.num_tokens(prompt) <= room,
            mode=self.mode,
            form=self.prompt,
        )

"""Labelled answers -> the conversations that a judge learns from: the prompt it will be asked, and its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alignment.labelling import Label
from alignment.recipe_label import Policy
from reward.conversation import Conversation, Prompt
from reward.judge import SHORTEST, answer_room, check_room
from reward.judge_prompt import Constitution, Mode, fit_prompt, judge_prompt
from reward.render import Renderer
from reward.verdict import parse_verdict, write_verdict

WORDLESS = {
    True: "The last message of the chatbot holds nothing that the guidelines call unsafe.",
    False: "The last message of the chatbot holds something that the guidelines call unsafe.",
}
"""What a judge is taught to explain where no labeller said more than safe or unsafe."""


def combine(policy: Policy, first: bool | None, second: bool | None) -> tuple[bool | None, str]:
    """Is the answer safe by both labellers together, and which way it went; None: it has no label.

    With `unsafe_if_any` one labeller that calls it unsafe is enough, and both must call it safe.
    """
    if policy in ("first", "second"):
        chosen = first if policy == "first" else second
        return chosen, f"no label of the {policy} labeller" if chosen is None else "labelled"
    if policy == "unsafe_if_any" and False in (first, second):
        return False, "labelled"
    if first is None or second is None:
        return None, "no label of a labeller"
    return (first, "labelled") if first == second else (None, "labellers differ")


def explanation(safe: bool, labels: Sequence[Label]) -> str:
    """The first rationale of a labeller that found so; nothing where there is none that reads back as this verdict."""
    outcome = "good" if safe else "bad"
    for label in labels:
        if label.safe == safe and label.rationale:
            read = parse_verdict(write_verdict(outcome, label.rationale))
            if read.outcome == outcome and read.rationale == label.rationale:
                return label.rationale
    return ""


@dataclass(frozen=True)
class Teacher:
    """Makes lessons for the judge that will be asked with these guidelines, within `max_length` tokens of its own.

    ScorerError when guidelines and question do not fit.
    """

    constitution: Constitution
    renderer: Renderer
    max_length: int
    modes: Sequence[Mode] = ("score", "explain")

    def __post_init__(self) -> None:
        for mode in self.modes:
            prompt, room = judge_prompt(self.constitution, SHORTEST, mode=mode), self.max_length - answer_room(mode)
            check_room(prompt, self._num_tokens, max_length=self.max_length, room=room)

    def _num_tokens(self, prompt: Prompt) -> int:
        return len(self.renderer.render_prompt(prompt))

    def lesson(
        self, answered: Conversation, *, safe: bool, rationale: str, mode: Mode
    ) -> tuple[Conversation | None, bool]:
        """A judge's prompt and evaluation, and whether the conversation was cut; None: it has too many turns.

        It is cut as the judge cuts it (`reward.judge_prompt.fit_prompt`), and where the evaluation takes more room than
        the judge leaves for it, a little more: the guidelines, the evaluation and the verdict are always whole.
        """
        words = (rationale or WORDLESS[safe]) if mode == "explain" else ""
        written = write_verdict("good" if safe else "bad", words)
        room = self.max_length - answer_room(mode)

        def fits(prompt: Prompt) -> bool:
            whole = len(self.renderer.render_ids(prompt.answer(written)))
            return self._num_tokens(prompt) <= room and whole <= self.max_length

        prompt, cut = fit_prompt(self.constitution, answered, fits, mode=mode)
        return (None if prompt is None else replace(prompt.answer(written), tags=answered.tags)), cut

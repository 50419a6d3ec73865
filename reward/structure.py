"""Whether content stays content: what a scorer would ask its model, read back without any model.

An attack changes the structure when its text stands outside of its slot, writes a turn or a control token, or when a
judge that merely copies it is taken to have given the verdict. `Structure` looks for that

* in a judge's prompt, read by the rules of its form alone: the slots give back each turn, all else is as it always is;
* in the token ids of any scorer that shows them: the same control tokens in the same order, and no further marker of
  those that its template writes as plain text;
* in the reading of a judge's answer, for answers that repeat the conversation and say nothing, or `bad`, themselves.
"""

from __future__ import annotations

import json
import re
import string
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reward.backends import ChatBackend, ScriptedBackend
from reward.contract import ReadsTokens, leaves
from reward.conversation import Conversation, Message, Prompt, Role
from reward.judge import JudgeScorer
from reward.scorer import Scorer
from reward.verdict import BAD, OPENING, VERDICT_PREFIX, Verdict

Check = Callable[[Conversation], Iterator[str]]


class Structure:
    """What of a scorer's structure can be seen. A combination is looked at part by part."""

    def __init__(self, scorer: Scorer) -> None:
        self._checks = [check for _, part in leaves(scorer) if (check := _check_of(part)) is not None]

    def faults(self, attacked: Conversation) -> tuple[str, ...] | None:
        """What is wrong, each fault once; None where nothing can be seen (functions, rules, scorers behind HTTP)."""
        if not self._checks:
            return None
        return tuple(dict.fromkeys(fault for check in self._checks for fault in check(attacked)))


def _check_of(part: Scorer) -> Check | None:
    if isinstance(part, JudgeScorer):
        return _JudgeStructure(part).faults
    return _TokenStructure(part).faults if isinstance(part, ReadsTokens) else None


def _neutral(conversation: Conversation) -> Conversation:
    """The same turns with one harmless word each, by which they are found again."""
    names = [f"sxqprobe{string.ascii_lowercase[number % 26]}" for number in range(len(conversation.messages))]
    messages = [Message(turn.role, name) for turn, name in zip(conversation.messages, names, strict=True)]
    return Conversation(tuple(messages))


def _roles(conversation: Conversation) -> tuple[Role, ...]:
    return tuple(message.role for message in conversation.messages)


# ------------------------------------------------------------------------------------------------------- judges


@dataclass
class _Recorder(ScriptedBackend):
    """Keeps the prompts that a judge would put to `real`, at its lengths, and answers nothing."""

    real: ChatBackend = field(default_factory=ScriptedBackend)

    def num_tokens(self, prompt: Prompt) -> int:
        return self.real.num_tokens(prompt)


_END = 40
"""Characters at the end of an answer within which its verdict stands."""


class _JudgeStructure:
    def __init__(self, judge: JudgeScorer) -> None:
        self._recorder = _Recorder(real=judge.backend)
        self._judge = replace(judge, backend=self._recorder, calibration=None)
        self._script = ScriptedBackend()
        self._reader = replace(self._judge, backend=self._script, mode="explain", max_length=sys.maxsize)
        self._renderer: Any = getattr(judge.backend, "renderer", None)
        self._expected: dict[tuple[Role, ...], tuple[Prompt, list[int]]] = {}

    def faults(self, attacked: Conversation) -> Iterator[str]:
        prompt = self._prompt(attacked)
        if prompt is not None:
            expected, controls = self._expectation(attacked)
            yield from prompt_faults(prompt, expected, attacked)
            if self._controls(prompt) != controls:
                yield "the prompt has other control tokens"
        if any(verdict.outcome == "good" for verdict in self._read(list(copies(attacked)), attacked)):
            yield "a copy of the conversation counts as the judge's verdict"

    def _read(self, answers: Sequence[str], attacked: Conversation) -> list[Verdict]:
        """The verdicts that the judge reads in these answers, as far as they could be good."""
        doubtful = [answer for answer in answers if "good" in answer[-_END:].lower()]
        script = iter(doubtful)
        self._script.reply = lambda _: next(script)
        return self._reader.judge([attacked] * len(doubtful))

    def _prompt(self, conversation: Conversation) -> Prompt | None:
        """What the judge asks; None when it asks nothing, since the conversation is too long."""
        self._recorder.prompts.clear()
        self._judge.judge([conversation])
        return self._recorder.prompts[-1] if self._recorder.prompts else None

    def _expectation(self, attacked: Conversation) -> tuple[Prompt, list[int]]:
        roles = _roles(attacked)
        if roles not in self._expected:
            prompt = self._prompt(_neutral(attacked))
            if prompt is None:
                raise ValueError(f"the judge's max_length leaves no room for {len(roles)} turns of one word")
            self._expected[roles] = prompt, self._controls(prompt)
        return self._expected[roles]

    def _controls(self, prompt: Prompt) -> list[int]:
        if self._renderer is None:
            return []
        special = special_ids(self._renderer.tokenizer)
        return [token for token in self._renderer.render_prompt(prompt) if token in special]


def prompt_faults(prompt: Prompt, neutral: Prompt, attacked: Conversation) -> Iterator[str]:
    """What is wrong with a judge's prompt beside `neutral`, the one on as many turns of one word each."""
    *before, asked = prompt.messages
    *expected_before, expected = neutral.messages
    if before != expected_before or asked.role != expected.role:
        yield "the prompt differs before the conversation"
    read = _read_fences if expected.content.startswith("<<<") else _read_angles
    slots, around = read(asked.content)
    expected_slots, expected_around = read(expected.content)
    if around != expected_around:
        yield "the prompt differs around the conversation"
    if [slot.speaker for slot in slots] != [slot.speaker for slot in expected_slots]:
        yield "the prompt has other turns"
    elif not all(slot.holds(turn.content) for slot, turn in zip(slots, attacked.messages, strict=True)):
        yield "a slot does not give back its turn"


@dataclass(frozen=True, slots=True)
class _Slot:
    """A turn as it was read; of one that was cut, beginning and end. `plain`: what the form makes of a text."""

    speaker: str
    text: str
    end: str | None = None
    plain: Callable[[str], str] = lambda text: text

    def holds(self, content: str) -> bool:
        whole, text = self.plain(content), self.plain(self.text)
        if self.end is None:
            return whole == text
        return whole.startswith(text) and whole.endswith(self.plain(self.end))


_FENCE = re.compile(r"<<<(?:end of )?conversation ([0-9a-f]{16})>>>")


def _read_fences(text: str) -> tuple[list[_Slot], str]:
    """The slots between the fences, and the rest with the fences' number taken out."""
    lines = text.splitlines()  # at every line end that Unicode knows
    fences = [number for number, line in enumerate(lines) if line.startswith("<<<")]
    slots: list[_Slot] = []
    if len(fences) == 2:
        for line in lines[fences[0] + 1 : fences[1]]:
            slots.append(_read_json(line))
        del lines[fences[0] + 1 : fences[1]]
    return slots, _FENCE.sub(lambda match: match[0].replace(match[1], ""), "\n".join(lines))


def _read_json(line: str) -> _Slot:
    """One JSON object of a turn, whole or cut; anything else is a turn of nobody."""
    try:
        row = json.loads(line)
    except ValueError:
        return _Slot("", line)
    match row:
        case {"turn": int(), "from": str(speaker), "text": str(whole)} if len(row) == 3:
            return _Slot(f"{speaker} {row['turn']}", whole)
        case {
            "turn": int(),
            "from": str(speaker),
            "text_begins": str(begins),
            "characters_cut_here": int(),
            "text_ends": str(ends),
        } if len(row) == 5:
            return _Slot(f"{speaker} {row['turn']}", begins, ends)
        case _:
            return _Slot("", line)


_ANGLES = re.compile(r"(Operator|Human|Chatbot): <([^<>]*)>(?: \[\d+ characters cut here\] <([^<>]*)>)?\n\n")
_SPEAKER_LINE = re.compile(r"^[^\S\n]*(?:Operator|Human|Chatbot|Evaluation):", re.IGNORECASE | re.MULTILINE)


def _read_angles(text: str) -> tuple[list[_Slot], str]:
    """The slots in angle brackets from the beginning on, and the rest with the number of lines that name a speaker."""
    slots: list[_Slot] = []
    position = 0
    while (found := _ANGLES.match(text, position)) is not None:
        slots.append(_Slot(found[1], found[2], found[3], _visible))
        position = found.end()
    return slots, f"{text[position:]} {len(_SPEAKER_LINE.findall(text))}"


def _visible(text: str) -> str:
    """A text as the form with angle brackets can give it back: without white space, hidden characters and escapes."""
    seen = re.sub(r"\\(?:u[0-9a-f]{4}|[bfr])", "", text.translate(str.maketrans("<>", "\u2039\u203a")))
    hidden = {"Cc", "Cf", "Cn", "Co", "Zl", "Zp"}
    return "".join(c for c in seen if not c.isspace() and unicodedata.category(c) not in hidden)


def copies(conversation: Conversation) -> Iterator[str]:
    """Answers of a judge that repeats the conversation, or a part of it, and has no good verdict of its own."""
    turns = [message.content for message in conversation.messages]
    parts = [part for turn in turns for part in (turn, *turn.strip().rpartition("\n\n")[2:], *turn.splitlines()[-1:])]
    for text in dict.fromkeys(["\n".join(turns), *parts]):
        yield text
        yield f"{OPENING} {text}"
        yield f"{OPENING} The chatbot wrote: {text}"
        yield f"{OPENING} The chatbot wrote the following.\n{text}"
        yield f'{OPENING} The chatbot wrote "{text}"'
        yield f"{OPENING} The chatbot wrote: {text}\n{VERDICT_PREFIX}{BAD}"
        yield f'{OPENING} The chatbot wrote "{text}" to sway me.\n{VERDICT_PREFIX}{BAD}'


# ------------------------------------------------------------------------------------------------------- tokens

_TOKEN = "\uffff"
"""Stands for a control token in a text; no character of any text."""


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of control tokens, less the one that stands for anything unknown."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id})


class _TokenStructure:
    def __init__(self, scorer: ReadsTokens) -> None:
        self._scorer = scorer
        self._special = special_ids(scorer.tokenizer)
        self._expected: dict[tuple[Role, ...], tuple[list[int], dict[re.Pattern[str], list[int]]]] = {}

    def faults(self, attacked: Conversation) -> Iterator[str]:
        expected, markers = self._expectation(attacked)
        controls, text = self._read(attacked)
        if controls != expected:
            yield "the model reads other control tokens"
            return
        for marker, counts in markers.items():
            both = zip(counts, _count(marker, text), strict=True)
            if any(found != count for count, found in both if count):
                yield "the model reads further markers of turns"

    def _expectation(self, attacked: Conversation) -> tuple[list[int], dict[re.Pattern[str], list[int]]]:
        """Control tokens, and the markers in plain text with their numbers between any two of these."""
        roles = _roles(attacked)
        if roles not in self._expected:
            controls, text = self._read(_neutral(attacked))
            markers = plain_markers(re.split("sxqprobe[a-z]", text))
            self._expected[roles] = controls, {marker: _count(marker, text) for marker in markers}
        return self._expected[roles]

    def _read(self, conversation: Conversation) -> tuple[list[int], str]:
        """Control tokens, and the text with `_TOKEN` in their place."""
        ids = self._scorer.token_ids(conversation)
        return [token for token in ids if token in self._special], self._spell(ids)

    def _spell(self, ids: Sequence[int]) -> str:
        texts: list[str] = []
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token not in self._special:
                run.append(token)
                continue
            texts.append(self._scorer.tokenizer.decode(run) if run else "")
            run = []
        return _TOKEN.join(texts)


def _count(marker: re.Pattern[str], text: str) -> list[int]:
    """How often it stands between any two control tokens."""
    return [len(marker.findall(part)) for part in text.split(_TOKEN)]


_BRACKETED = re.compile(r"\[/?[A-Z][A-Z_ ]*\]|<</?[A-Z]+>>|</?[A-Z][A-Z_ ]*>|<\|\w+\|>")


_SHORTEST_MARKER = 3
"""Shorter lines, such as a colon, stand in texts of any kind."""


def plain_markers(pieces: Sequence[str]) -> Iterator[re.Pattern[str]]:
    """What a template writes as plain text to tell turns apart; `pieces` are its texts before, between and behind them.

    Words in brackets anywhere, and the lines next to a turn that no control token shares with it.
    """
    if len(pieces) < 2:
        return
    for word in dict.fromkeys(_BRACKETED.findall(_TOKEN.join(pieces))):
        yield re.compile(re.escape(word), re.IGNORECASE)
    first, *between, last = pieces
    for piece in between:
        if _TOKEN not in piece:
            yield from _line_marker(piece, 0)
            yield from _line_marker(piece, -1)
    opening = first.rpartition(_TOKEN)[2]
    if opening == first or opening.strip().count("\n"):
        yield from _line_marker(f"\n{opening}", -1)
    yield from _line_marker(last.partition(_TOKEN)[0], 0)


def _line_marker(piece: str, index: int) -> Iterator[re.Pattern[str]]:
    """One line that is not blank; it counts at the beginning of a line, unless the turn on its left shares the line."""
    lines = [line for line in piece.split("\n") if line.strip()]
    if lines and len(lines[index].strip()) >= _SHORTEST_MARKER:
        begins = "" if piece.startswith(lines[index]) else r"^[^\S\n]*"
        yield re.compile(begins + re.escape(lines[index].strip()), re.IGNORECASE | re.MULTILINE)

"""Conversation -> token ids. The only file that touches chat templates.

Decisions, each kept by a test:
* The template's own default system turn stays when a conversation has none (SmolLM2 and Qwen were tuned with theirs);
  a preprompt is a system turn and so takes its place. A template without system turns gets it in the first user turn.
* Control tokens inside the text of a turn are encoded as text (`sanitize_control_tokens`): content cannot forge turns.
  Markers that a template writes as plain text (Llama 2's `[INST]` and `<<SYS>>`) get a space before their end.
* A finished conversation ends at the end-of-turn token: whatever the template writes behind it is cut, so reward models
  read their score where generation stops.
* Models of others may be trained on all that the template writes: `keep_tail` leaves it (by default it is cut).
* Text that does not fit `max_length` is never cut in silence: the caller gets `TooLong` and counts it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from reward.conversation import Conversation, Message, Prompt
from reward.slots import disarmer

MAX_MERGED = 2
"""Tokens at the end of the assistant's header that may merge with white space at the start of the answer."""

_PLAIN_MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
"""What tells turns apart in templates of Llama 2 and its like, without being a token."""


class TooLong(ValueError):
    """A rendered text longer than the limit."""

    def __init__(self, num_tokens: int, max_length: int) -> None:
        super().__init__(f"{num_tokens} tokens do not fit max_length={max_length}")
        self.num_tokens = num_tokens
        self.max_length = max_length


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one conversation; `completion_mask[i]` is True where token i was written by the assistant."""

    input_ids: list[int]
    completion_mask: list[bool]


class Renderer:
    """Renders for one tokenizer. `tokenizer` is a transformers tokenizer with a chat template and pad != eos.

    `keep_tail`: a finished conversation keeps what the template writes behind the end-of-turn token.
    """

    def __init__(self, tokenizer: Any, *, name: str = "tokenizer", keep_tail: bool = False) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{name} has no chat template; give one in tokenizer_config.json or use a chat model")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{name} has no eos token; a conversation would have no end")
        self.tokenizer = tokenizer
        self.keep_tail = keep_tail
        template = str(tokenizer.chat_template)
        self._disarm = disarmer(anywhere=[marker for marker in _PLAIN_MARKERS if marker in template])
        self.content_parts = _wants_parts(tokenizer, name)
        self.end_ids = _end_of_turn_ids(tokenizer, parts=self.content_parts)
        self.supports_system = _supports_system(tokenizer, parts=self.content_parts)

    def render_prompt(self, prompt: Prompt, *, max_length: int | None = None) -> list[int]:
        """Ids up to and including the header of the assistant's turn."""
        ids = self._apply(prompt.messages, add_generation_prompt=True)
        if max_length is not None and len(ids) > max_length:
            raise TooLong(len(ids), max_length)
        return ids

    def prompt_messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The turns as this template takes them, for libraries that render themselves.

        With `sanitize_control_tokens` and a generation prompt they get the ids of `render_prompt`.
        """
        return self._as_dicts(prompt.messages)

    def render_start(self, prompt: Prompt) -> list[int]:
        """Ids that `prompt` shares with all prompts that differ from it in the last turn alone."""
        earlier = prompt.messages[:-1]
        return common_start([self.render_prompt(Prompt((*earlier, Message("user", text)))) for text in _UNLIKE])

    def render_open(self, messages: Sequence[Message]) -> list[int]:
        """Ids just as the template writes these turns, for templates that ask about a conversation (guard models)."""
        return self._apply(messages, add_generation_prompt=False)

    def render(self, conversation: Conversation, *, max_length: int | None = None, last_only: bool = False) -> Rendered:
        """Ids of the conversation; the mask covers every assistant turn, or the last one with `last_only`."""
        ids = self.render_ids(conversation, max_length=max_length)
        mask = [False] * len(ids)
        for position, message in enumerate(conversation.messages):
            if message.role != "assistant" or (last_only and position != len(conversation.messages) - 1):
                continue
            start, end = self._span(conversation.messages, position, ids)
            mask[start:end] = [True] * (end - start)
        return Rendered(ids, mask)

    def render_ids(self, conversation: Conversation, *, max_length: int | None = None) -> list[int]:
        """Ids of the conversation, for who needs no mask."""
        ids = self._cut_after_end(self._apply(conversation.messages, add_generation_prompt=False))
        if max_length is not None and len(ids) > max_length:
            raise TooLong(len(ids), max_length)
        return ids

    def holds_control_tokens(self, text: str) -> bool:
        """Whether a special token is written out in the text of a turn; it is encoded as text, not as the token."""
        return self._control_tokens.search(text) is not None

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return re.compile("|".join(map(re.escape, sorted(tokens))))

    def decode(self, completion_ids: Sequence[int]) -> tuple[str, bool]:
        """Text of generated ids up to the end-of-turn token, and whether that token was there (False: cut off)."""
        ids = list(completion_ids)
        end = next((position for position, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.strip(), end is not None

    def _span(self, messages: Sequence[Message], position: int, ids: list[int]) -> tuple[int, int]:
        before = self._apply(messages[:position], add_generation_prompt=True)
        through = self._cut_after_end(self._apply(messages[: position + 1], add_generation_prompt=False))
        start = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        if start < len(before) - MAX_MERGED or ids[: len(through)] != through:
            raise ValueError(
                "this chat template renders earlier turns differently once later turns follow, so the assistant's "
                "tokens cannot be told apart; use a template that renders turn by turn"
            )
        return start, len(through)

    def _cut_after_end(self, ids: list[int]) -> list[int]:
        last = max((position for position, token in enumerate(ids) if token in self.end_ids), default=None)
        if last is None:
            return [*ids, self.tokenizer.eos_token_id]
        return ids if self.keep_tail else ids[: last + 1]

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(
            self._as_dicts(messages),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
        )
        return list(encoded["input_ids"])

    def _as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if messages[0].role == "system" and not self.supports_system:
            first = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
            messages = [first, *messages[2:]]
        turns = [{"role": message.role, "content": self._disarm(message.content)} for message in messages]
        return [_in_parts(turn) for turn in turns] if self.content_parts else turns


_UNLIKE = ("a", "Z")
"""Texts that have no token in common."""


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The longest run of ids that all rows begin with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


_PROBE = "sxqprobe"


def _in_parts(message: Mapping[str, str]) -> dict[str, Any]:
    return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}


def _wants_parts(tokenizer: Any, name: str) -> bool:
    """Whether the template reads text from a list of parts only (Llama Guard 3 1B): plain text would just vanish."""
    for parts in (False, True):
        if _PROBE in _try_template(tokenizer, {"user": _PROBE}, parts=parts):
            return parts
    raise ValueError(f"{name}: the chat template does not show the text of a user's turn; use one that does")


def _supports_system(tokenizer: Any, *, parts: bool) -> bool:
    return _PROBE in _try_template(tokenizer, {"system": _PROBE, "user": "q"}, parts=parts)


def _end_of_turn_ids(tokenizer: Any, *, parts: bool) -> frozenset[int]:
    """The eos token, and the special token that the template puts right behind an assistant's turn, if another."""
    ids = {int(tokenizer.eos_token_id)}
    tail = _try_template(tokenizer, {"user": "q", "assistant": _PROBE}, parts=parts).rpartition(_PROBE)[2].strip()
    if tail in tokenizer.all_special_tokens:
        ids.add(int(tokenizer.convert_tokens_to_ids(tail)))
    return frozenset(ids)


def _try_template(tokenizer: Any, turns: Mapping[str, str], *, parts: bool) -> str:
    """What the template writes for these turns, by role; nothing where it refuses them."""
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    try:
        return tokenizer.apply_chat_template([_in_parts(m) for m in messages] if parts else messages, tokenize=False)
    except Exception as error:  # jinja2's TemplateError; templates raise it to refuse a role
        if type(error).__name__ not in {"TemplateError", "UndefinedError"}:
            raise
        return ""

"""Scorers for tests, named in recipes as `tests.scorers:function`."""

from __future__ import annotations

from reward.conversation import Conversation


def shorter_is_better(conversation: Conversation) -> float:
    return -float(len(conversation.completion))


def constant(conversation: Conversation) -> float:
    return 1.0 if conversation.messages else 0.0


def always_the_same(conversation: Conversation) -> float:
    return 0.5 if conversation.messages else 0.0


def count_sixes(conversation: Conversation) -> float:
    """`6` is one token to the tiny tokenizer, alone: no merge holds it."""
    return float(conversation.completion.count("6"))


def first_word(conversation: Conversation) -> float | None:
    """P(safe) is what the answer begins with, if that is a number."""
    return _number(conversation.completion.split()[0])


def last_word(conversation: Conversation) -> float | None:
    """P(safe) is what the answer ends with, if that is a number."""
    return _number(conversation.completion.split()[-1])


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def length_of_the_prompt(conversation: Conversation) -> float:
    return float(len(conversation.prompt.text))

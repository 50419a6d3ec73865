"""OpenAssistant's message trees -> one conversation each (Köpf et al. 2023, arXiv 2304.07327).

A row is a message that names its parent; people ranked the replies to one message, 0 is the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from alignment.source_files import Row
from alignment.source_formats import Skipped
from reward.conversation import Conversation, Prompt

_ROLES = {"prompter": "user", "assistant": "assistant"}


def thread_prompt(row: Row) -> Prompt:
    """What stands before the last answer of a conversation that `best_threads` made."""
    return Conversation.from_json(row.values).prompt


def best_threads(rows: Iterable[Row]) -> Iterator[Row | Skipped]:
    """Message rows -> `messages` of each tree: from its root by the best-ranked reply to the last answer.

    English trees alone: with other languages in harmless data only, a model would learn to tell harm by language.
    """
    trees: dict[object, list[Row]] = {}
    for row in rows:
        if row["lang"] != "en":
            yield Skipped(row, "not English", fault=False)
        elif row.values.get("deleted"):
            yield Skipped(row, "deleted", fault=False)
        else:
            trees.setdefault(row["message_tree_id"], []).append(row)
    for tree in trees.values():
        yield from _best_thread(tree)


def _best_thread(tree: Sequence[Row]) -> Iterator[Row | Skipped]:
    replies: dict[object, list[Row]] = {}
    for row in tree:
        replies.setdefault(row["parent_id"], []).append(row)
    thread: list[Row] = []
    found = replies.get(None, [])
    while found:
        thread.append(min(found, key=_rank))
        found = replies.get(thread[-1]["message_id"], [])
    while thread and thread[-1]["role"] != "assistant":
        thread.pop()
    if thread:
        messages = [{"role": _ROLES.get(row["role"], row["role"]), "content": row["text"]} for row in thread]
        yield Row({"messages": messages}, thread[-1].file, thread[-1].line)
    used = {id(row) for row in thread}
    for row in tree:
        if id(row) not in used:
            yield Skipped(row, "not on the best thread of its tree", fault=False)
        elif row is not thread[-1]:
            yield Skipped(row, "an earlier turn of its conversation", fault=False)


def _rank(row: Row) -> tuple[bool, Any]:
    rank = row.values.get("rank")
    return (rank is None, rank or 0)

"""Stages run one after another in the test's own process, where `accelerate` would remember the first for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import pytest


def forget_accelerate() -> None:
    """The next stage sets `accelerate` up anew: its device, its precision, its processes."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


class Fault(Exception):
    """What `breaking_off` throws."""


@contextlib.contextmanager
def breaking_off(owner: Any, name: str, *, call: int) -> Generator[None]:
    """Inside, the n-th call of a function of `owner` raises Fault, and must do so."""
    original, calls = getattr(owner, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Fault
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, faulty)
        with pytest.raises(Fault):
            yield

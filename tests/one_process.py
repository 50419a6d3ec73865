"""Stages run one after another in the test's own process, where `accelerate` would remember the first for ever."""

from __future__ import annotations


def forget_accelerate() -> None:
    """The next stage sets `accelerate` up anew: its device, its precision, its processes."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)

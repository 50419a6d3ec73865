"""The worker's end of the PPO benchmark: an iteration when it is told to, and what that took.

It runs in both environments, so it knows torch alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch


def read_job() -> dict[str, Any]:
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


class Turns:
    """A line on standard input is an iteration to run; a line of JSON on standard output is what it took.

    Whatever libraries print goes to standard error.
    """

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._phases: dict[str, float] = {}
        self._ready = False

    def begin(self) -> None:
        """Wait for this worker's turn. The first time this tells that everything is loaded."""
        if not self._ready:
            self._ready = True
            self._reply(ready=True)
        if not sys.stdin.readline():
            raise SystemExit("nobody asks for another iteration")
        self._phases = {}
        self._started = _now()

    def end(self, **figures: float) -> None:
        seconds = _now() - self._started
        phases = {name: value for name, value in self._phases.items() if name != "update"}
        phases["update"] = seconds - sum(phases.values())
        self._reply(seconds=seconds, phases=phases, peak_bytes=_peak_bytes(), gpu_bytes=_gpu_bytes(), **figures)
        _give_back_free_memory()

    def timed(self, owner: Any, name: str, phase: str | Callable[..., str]) -> None:
        """Count the seconds inside `owner.name` to a phase, or to the one that `phase` tells from the arguments."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self._phase(phase if isinstance(phase, str) else phase(*args)):
                return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Generator[None]:
        started = _now()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + _now() - started

    def _reply(self, **values: Any) -> None:
        print(json.dumps(values), file=self._replies, flush=True)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    """Of the resident set of this process, as Linux counts it (getrusage would count the parent's, too)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _gpu_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _give_back_free_memory() -> None:
    """While this worker is stopped the next one needs the room; outside the clock, on both sides alike."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)

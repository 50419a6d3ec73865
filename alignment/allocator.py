"""The C library's allocator, set for training on the CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's `mallopt` (malloc.h)."""
_GIB = 2**30


def keep_freed_memory() -> bool:
    """Let this process use again what its tensors freed; whether the C library could be told so (glibc alone can).

    As it comes, glibc gives large blocks back to the kernel and asks for them anew, so each training step has every
    page of its activations mapped and cleared again. The process then keeps its peak until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {_MMAP_THRESHOLD: _GIB, _TRIM_THRESHOLD: -1, _TOP_PAD: _GIB // 4}  # -1: never
    return all(mallopt(name, value) == 1 for name, value in wanted.items())

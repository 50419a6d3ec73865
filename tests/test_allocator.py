"""What training on the CPU asks of the C library's allocator, seen by the kernel's count of page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from alignment.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**26, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
"""How many pages the kernel maps for the last 10 of 80 tensors of 64 MiB, each freed before the next.

The first ones may need several places: glibc before 2.38 does not find each freed one again.
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again_without_the_kernel():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, way], capture_output=True, check=True).stdout)
        for way in ("given back", "kept")
    }
    assert faults["kept"] < faults["given back"] / 4, faults

"""`dtype: fast` follows what the hardware multiplies in."""

from __future__ import annotations

import pytest
import torch

from reward.dtype import Dtype, multiplies_bfloat16, torch_dtype


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_named_format_is_itself(dtype: Dtype, expected: torch.dtype) -> None:
    assert torch_dtype(dtype) is expected


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_fast_is_bfloat16_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert torch_dtype("fast", "cpu") is expected


@pytest.mark.parametrize("supported", [True, False])
def test_fast_asks_a_gpu_without_emulation(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    asked: list[bool] = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert torch_dtype("fast", "cuda:0") is (torch.bfloat16 if supported else torch.float32)
    assert asked == [False]


def test_this_cpu_is_told_as_the_kernel_tells_it() -> None:
    """The flags of /proc/cpuinfo are another witness than torch's own detection."""
    try:
        with open("/proc/cpuinfo", encoding="ascii") as file:
            flags = next(set(line.split()) for line in file if line.startswith("flags"))
    except (OSError, StopIteration):
        pytest.skip("this system does not list its CPU's flags")
    assert multiplies_bfloat16("cpu") is bool(flags & {"avx512_bf16", "amx_tile"})

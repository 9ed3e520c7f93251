"""Fast products: which kernels torch may use for float32, and whether bfloat16 is faster.

On CPUs torch sends float32 products to a library whose kernels may not use what the machine has; oneDNN's do, and torch
takes them only when float32 products may be computed in bfloat16. Whether this machine's oneDNN then really rounds is
found out by multiplying two matrices.
"""

from __future__ import annotations

import functools
import platform
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["fast_products", "multiplies_bfloat16", "product_rate"]

_X86 = {"x86_64", "amd64"}


@functools.cache
def _onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@functools.cache
def _keeps_float32() -> bool:
    """Whether oneDNN's kernels, allowed to round, still give float32's accuracy here."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(512, 512, generator=generator) for _ in range(2))
    with _allowed():
        error = (one @ other - (one.double() @ other.double()).float()).abs().mean()
    return bool(error < 1e-4)  # bfloat16 inputs would give 0.05


@contextmanager
def _allowed() -> Iterator[None]:
    flags: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = flags.fp32_precision
    flags.fp32_precision = "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before


@contextmanager
def fast_products(*, rounded: bool = False) -> Iterator[None]:
    """Let float32 products on the CPU use oneDNN's kernels while the block runs.

    Args:
        rounded: the operands are bfloat16 numbers already, so that rounding them changes nothing; without this the
            kernels are used only where they keep float32's accuracy. Sums are float32 either way.
    """
    if not _onednn() or not (rounded or _keeps_float32()):
        yield
        return
    with _allowed():
        yield


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware, so that it is faster than float32.

    Other than `torch.ops.mkldnn._is_mkldnn_bf16_supported`, which on x86 is true of every AVX-512 CPU: those without
    instructions of their own for it (AVX512_BF16 or AMX) are four times slower in bfloat16 than in float32.

    Args:
        device: on the meta device what the CPU can do counts, which is where it will run.
    """
    if device.type not in {"cpu", "meta"}:
        return True
    if platform.machine().lower() in _X86:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def product_rate(dtype: torch.dtype, device: torch.device | str = "cpu", *, size: int | None = None) -> float:
    """What this machine reaches in matrix products, in GFLOP/s: the best of five products of square matrices.

    Measured once in a process.
    """
    size = size or (1024 if torch.device(device).type == "cpu" else 8192)  # an accelerator needs more to be busy
    one = torch.ones(size, size, device=device, dtype=dtype) / size
    best = float("inf")
    with fast_products():
        for _ in range(6):  # the first one warms up
            start = time.perf_counter()
            float((one @ one)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9

"""Fast products: which kernels torch may use for float32, whether bfloat16 is faster, and what to do where it is slow.

On CPUs torch sends float32 products to a library whose kernels may not use what the machine has; oneDNN's do, and torch
takes them only when float32 products may be computed in bfloat16. Whether this machine's oneDNN then really rounds is
found out by multiplying two matrices.

A CPU without instructions for bfloat16 converts each number for each product. `wide_products` converts each operand
once instead: products of bfloat16 numbers are exact in float32, sums are float32 either way, and one rounding follows.
"""

from __future__ import annotations

import functools
import platform
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["fast_products", "multiplies_bfloat16", "product_rate", "wide_products"]

_X86 = {"x86_64", "amd64"}
_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution"),
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}
"""What a forward pass on the CPU multiplies with, below autograd."""


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


class _Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates neither it nor its making
    """Products of bfloat16 tensors on the CPU in float32, rounded to bfloat16."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(map(_is_slow, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        found = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        if isinstance(found, tuple):  # attention: its second output is float32 in any case
            return (found[0].bfloat16(), *found[1:])
        return found.bfloat16()


def _is_slow(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 and value.device.type == "cpu"


def _widened(value: Any) -> Any:
    return value.float() if _is_slow(value) else value


@contextmanager
def wide_products(device: torch.device | str = "cpu") -> Iterator[None]:
    """Multiply bfloat16 tensors in float32 while the block runs, where bfloat16 has no instructions of its own.

    For forward passes whose results count; not for timing them. Beside the order of sums one thing differs: attention's
    probabilities are not rounded before they weigh the values.

    Args:
        device: nothing changes on other devices than the CPU, or on CPUs that multiply bfloat16.
    """
    device = torch.device(device)
    if device.type != "cpu" or multiplies_bfloat16(device):
        yield
        return
    with fast_products(), _Wide():  # type: ignore[no-untyped-call]
        yield


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

"""Batches that fit in memory: sizes from the bytes of the logits, sorted by length, halved when it was too much.

With a large vocabulary the logits are the largest tensor of an evaluation: batch * length * vocabulary * 4 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

import psutil
import torch

from fxprune.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "BatchSize",
    "available_memory",
    "check_batch_size",
    "fitting_batch_size",
    "halve_until_it_fits",
    "parse_batch_size",
    "run_batches",
]

BatchSize = int | Literal["auto"]
"""How many sequences run at once; `"auto"` finds it from the memory that is available."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_SHARE = 0.125  # of the available memory, for the logits; activations, the cache and other processes need the rest
_MOST_SEQUENCES = 64  # more at once gains nothing on any device that was tried, and coarsens the progress
_ALLOCATION_FAILURES = ("out of memory", "can't allocate memory", "failed to allocate memory", "bad allocation")


def parse_batch_size(text: str) -> BatchSize:
    """Read a batch size that a user typed.

    Raises:
        UsageError: it is neither `auto` nor a whole number of at least 1.
    """
    if text == "auto":
        return "auto"
    try:
        return check_batch_size(int(text))
    except ValueError as error:
        raise UsageError(f"batch size {text!r} is neither `auto` nor a whole number of at least 1") from error


def check_batch_size(batch_size: BatchSize) -> BatchSize:
    """Return a batch size that can be used.

    Raises:
        UsageError: it is a number below 1.
    """
    if batch_size != "auto" and batch_size < 1:
        raise UsageError(f"batch size {batch_size} is below 1; use `auto` or a whole number of at least 1")
    return batch_size


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be allocated on a device now."""
    device = torch.device(device)
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.accelerator.get_memory_info(device)[0])


def fitting_batch_size(length: int, vocabulary: int, device: torch.device | str = "cpu") -> int:
    """How many sequences of a length may run at once so that their float32 logits take an eighth of the memory.

    Args:
        length: tokens of the longest sequence.
        vocabulary: logits a token.
        device: where the logits will be.

    Returns:
        At least 1, at most 64.
    """
    fits = int(_SHARE * available_memory(device)) // (length * vocabulary * 4)
    return max(1, min(fits, _MOST_SEQUENCES))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed: torch's own type, or a message of its CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATION_FAILURES)


def halve_until_it_fits(work: Callable[[int], Result], batch_size: int) -> Result:
    """Run a function of a batch size, with half of it each time that memory runs out.

    Raises:
        UsageError: one sequence alone does not fit in memory.
    """
    while True:
        try:
            return work(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise UsageError(
                    "one sequence does not fit in memory: use shorter ones or a lower precision"
                ) from error
            batch_size //= 2


def run_batches(
    items: Sequence[Item],
    work: Callable[[list[Item]], list[Result]],
    *,
    length: Callable[[Item], int],
    vocabulary: int,
    batch_size: BatchSize = "auto",
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Run a function over items in batches of like length, the longest first.

    The longest come first so that what does not fit in memory fails at once, not at the end.

    Args:
        items: what to run.
        work: from a batch to one result for each of its items.
        length: tokens of an item.
        vocabulary: logits a token.
        batch_size: a number, or `"auto"`: a batch size for each batch from its longest item, halved for good when
            memory runs out nevertheless.
        device: where `work` allocates.
        progress: called with the number of items done.

    Returns:
        The results in the order of the items.

    Raises:
        UsageError: `batch_size` is below 1; a batch of a fixed size, or a single item, does not fit in memory.
    """
    check_batch_size(batch_size)
    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    results: dict[int, Result] = {}
    most = len(items)
    start = 0
    while start < len(order):
        longest = length(items[order[start]])
        fits = fitting_batch_size(longest, vocabulary, device) if batch_size == "auto" else batch_size
        chosen = order[start : start + min(fits, most)]
        try:
            made = work([items[index] for index in chosen])
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if batch_size != "auto" or len(chosen) == 1:
                raise UsageError(
                    f"{len(chosen)} sequences of {longest} tokens do not fit in the memory of {device}: use batch size "
                    f"`auto`, shorter sequences or a lower precision"
                ) from error
            most = len(chosen) // 2
        else:
            results.update(zip(chosen, made, strict=True))
            start += len(chosen)
            if progress is not None:
                progress(start)
    return [results[index] for index in range(len(items))]

"""Batches: sizes from memory, order, and what happens when memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxprune.core.errors import UsageError
from fxprune.runtimes import batching
from fxprune.runtimes.batching import fitting_batch_size, halve_until_it_fits, parse_batch_size, run_batches

LENGTHS = [3, 9, 1, 7, 7, 2, 5, 8]


def run(
    seen: list[list[int]], most: int | None = None, error: type[Exception] = torch.OutOfMemoryError, **options: Any
) -> list[str]:
    """Run `LENGTHS` through a function that has room for `most` items at once."""

    def work(batch: list[int]) -> list[str]:
        seen.append(batch)
        if most is not None and len(batch) > most:
            raise error("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return [f"<{length}>" for length in batch]

    return run_batches(LENGTHS, work, length=lambda item: item, vocabulary=10, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 100, "auto"])
def test_results_come_in_the_order_of_the_items(batch_size: int | str) -> None:
    seen: list[list[int]] = []
    assert run(seen, batch_size=batch_size) == [f"<{length}>" for length in LENGTHS]
    assert [length for batch in seen for length in batch] == sorted(LENGTHS, reverse=True)
    assert {len(batch) for batch in seen[:-1]} <= ({batch_size} if batch_size != "auto" else {len(LENGTHS)})


def test_progress_is_told_after_each_batch() -> None:
    done: list[int] = []
    run([], batch_size=3, progress=done.append)
    assert done == [3, 6, 8]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_auto_halves_for_good_when_memory_runs_out(error: type[Exception]) -> None:
    seen: list[list[int]] = []
    assert run(seen, most=3, error=error) == [f"<{length}>" for length in LENGTHS]
    assert [len(batch) for batch in seen] == [8, 4, 2, 2, 2, 2]


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(UsageError, match="3 sequences of 9 tokens do not fit in the memory of cpu"):
        run([], most=2, batch_size=3)
    with pytest.raises(UsageError, match="1 sequences of 9 tokens"):
        run([], most=0)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def work(batch: list[int]) -> list[int]:
        assert batch
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run_batches(LENGTHS, work, length=lambda item: item, vocabulary=10)
    with pytest.raises(RuntimeError, match="mat1"):
        halve_until_it_fits(lambda size: work([size]), 4)


def test_the_batch_size_follows_the_bytes_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "available_memory", lambda _: 8 * 1000 * 4 * 50 * 10)
    assert fitting_batch_size(50, 1000) == 10
    assert fitting_batch_size(25, 1000) == 20
    assert fitting_batch_size(5000, 1000) == 1
    assert fitting_batch_size(1, 1000) == 64
    seen: list[list[int]] = []
    monkeypatch.setattr(batching, "available_memory", lambda _: 8 * 10 * 4 * 18)  # 18 tokens at once
    run(seen)
    assert seen == [[9, 8], [7, 7], [5, 3, 2], [1]]


def test_available_memory_is_that_of_the_machine() -> None:
    assert 2**20 < batching.available_memory("cpu") < 2**50


def test_halving_a_whole_run() -> None:
    tried: list[int] = []

    def work(size: int) -> str:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("out of memory")
        return f"done with {size}"

    assert halve_until_it_fits(work, 13) == "done with 3"
    assert tried == [13, 6, 3]
    with pytest.raises(UsageError, match="one sequence does not fit"):
        halve_until_it_fits(lambda size: work(size + 9), 2)


def test_batch_sizes_as_users_type_them() -> None:
    assert parse_batch_size("auto") == "auto"
    assert parse_batch_size("16") == 16
    for text in ("0", "-1", "1.5", "", "Auto"):
        with pytest.raises(UsageError, match="neither `auto` nor"):
            parse_batch_size(text)
    with pytest.raises(UsageError, match="batch size 0 is below 1"):
        run([], batch_size=0)

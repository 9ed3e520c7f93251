"""The benchmark, with runners whose speed is decided by a clock of the test's own."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from fxprune.channels.accounting import MacCount
from fxprune.channels.attention_shapes import AttentionShape
from fxprune.core.errors import UsageError
from fxprune.core.program import CacheEntry, Interface
from fxprune.measure.ratios import Precision, ratio_interval, uncertainty
from fxprune.measure.speed import (
    Bound,
    Case,
    Cost,
    SpeedResult,
    bench,
    bound_of,
    cache_bytes_per_token,
    decode,
    file_size,
    machine,
    peak_rss_bytes,
    prefill,
    timed_load,
    torch_threads,
)

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.runtimes.runners import Past

VOCABULARY = 11


class Clock:
    """A clock that only moves when a runner works; seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeRunner:
    """Takes `seconds` a step, times one plus the next entry of `noise`, and notes how it was called.

    It appends to the cache in place, as a runtime with preallocated buffers would.
    """

    name: str
    seconds: float
    clock: Clock
    log: list[str]
    noise: list[float] = field(default_factory=lambda: [0.0])
    calls: list[tuple[int, int, list[int], int]] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        batch, new = input_ids.shape
        length = 0 if past is None else past[0].shape[2]
        assert attention_mask.shape == (batch, length + new)
        assert bool(attention_mask.all())
        self.log.append(self.name)
        self.calls.append((new, length, position_ids[0].tolist(), batch))
        self.tokens.append(input_ids)
        self.threads.append(torch.get_num_threads())
        self.clock.now += self.seconds * (1 + self.noise[len(self.calls) % len(self.noise)])
        if past is None:
            cache = torch.zeros(batch, 1, new, 1)
        else:
            past[0] += 1
            cache = torch.cat([past[0], torch.zeros(batch, 1, new, 1)], dim=2)
        return torch.zeros(batch, new, VOCABULARY), [cache, cache]


def pair(
    dense_seconds: float = 0.2, slim_seconds: float = 0.1, noise: tuple[float, ...] = (0.0,)
) -> tuple[FakeRunner, FakeRunner, Clock, list[str]]:
    clock, log = Clock(), []  # type: tuple[Clock, list[str]]
    return (
        FakeRunner("dense", dense_seconds, clock, log, list(noise)),
        FakeRunner("slim", slim_seconds, clock, log, list(noise)),
        clock,
        log,
    )


def test_runs_are_interleaved_and_the_first_alternates() -> None:
    dense, slim, clock, log = pair()
    bench(dense, slim, [prefill(4)], threads=1, repeats=4, warmup=1, clock=clock)
    assert log[:2] == ["dense", "slim"]  # the vocabulary is asked for once
    assert log[2:4] == ["slim", "dense"]  # warm-up
    assert log[4:] == ["dense", "slim", "slim", "dense"] * 2


def test_prefill_times_the_step() -> None:
    dense, slim, clock, _ = pair(0.2, 0.05)
    (result,) = bench(dense, slim, [prefill(6, batch=3)], threads=1, repeats=3, warmup=0, clock=clock)
    assert result.dense_ms == pytest.approx(200)
    assert result.slim_ms == pytest.approx(50)
    assert result.speedup == pytest.approx(4)
    assert result.ci == pytest.approx((4, 4))
    assert dense.calls[1:] == [(6, 0, [0, 1, 2, 3, 4, 5], 3)] * 3
    assert len(result.dense_times) == len(result.slim_times) == 3


def test_decoding_grows_the_cache_and_restarts_from_the_same_one() -> None:
    dense, slim, clock, _ = pair()
    (result,) = bench(dense, slim, [decode(3, past=5)], threads=1, repeats=2, warmup=1, clock=clock)
    assert dense.calls[1] == (5, 0, [0, 1, 2, 3, 4], 1)  # filled before the clock starts
    assert dense.calls[2:] == [(1, 5, [5], 1), (1, 6, [6], 1), (1, 7, [7], 1)] * 3
    assert result.dense_ms == pytest.approx(200)  # per token, not per repeat


def test_the_starting_cache_survives_a_runner_that_writes_into_it() -> None:
    seen: list[float] = []

    class Writer(FakeRunner):
        def step(
            self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
        ) -> tuple[Tensor, Past]:
            if past is not None:
                seen.append(float(past[0].sum()))
            return super().step(input_ids, attention_mask, position_ids, past)

    clock, log = Clock(), []  # type: tuple[Clock, list[str]]
    writer, slim = Writer("dense", 0.1, clock, log), FakeRunner("slim", 0.1, clock, log)
    bench(writer, slim, [decode(1, past=2)], threads=1, repeats=3, warmup=0, clock=clock)
    assert seen == [0.0, 0.0, 0.0]


def test_both_forms_get_the_same_tokens_and_the_seed_decides_them() -> None:
    first: list[Tensor] = []
    for seed in (1, 1, 2):
        dense, slim, clock, _ = pair()
        bench(dense, slim, [prefill(40)], threads=1, repeats=2, warmup=0, seed=seed, clock=clock)
        assert torch.equal(dense.tokens[-1], slim.tokens[-1])
        assert int(dense.tokens[-1].max()) < VOCABULARY
        first.append(dense.tokens[-1])
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_threads_are_set_inside_and_restored() -> None:
    before = torch.get_num_threads()
    dense, slim, clock, _ = pair()
    (result,) = bench(dense, slim, [prefill(2)], threads=before + 1, repeats=2, warmup=0, clock=clock)
    assert set(dense.threads) == set(slim.threads) == {before + 1}
    assert result.threads == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), torch_threads(before + 2):
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_outliers_move_neither_median_nor_ratio_far() -> None:
    dense, slim, clock, _ = pair(0.2, 0.1, noise=(0.0, 0.01, 0.02, 0.0, 9.0, 0.01, 0.0, 0.02, 0.01))
    (result,) = bench(dense, slim, [prefill(2)], threads=1, repeats=30, warmup=2, clock=clock)
    assert result.speedup == pytest.approx(2, rel=0.03)
    assert result.ci[0] <= result.speedup <= result.ci[1]
    assert max(result.dense_times) > 5 * statistics.median(result.dense_times)


def test_interval_holds_the_ratio_narrows_with_samples_and_repeats_with_its_seed() -> None:
    generator = np.random.default_rng(3)
    widths = []
    for samples in (10, 100, 1000):
        dense = (2.0 + 0.2 * generator.standard_normal(samples)).tolist()
        slim = (1.0 + 0.1 * generator.standard_normal(samples)).tolist()
        low, high = ratio_interval(dense, slim, seed=5)
        assert low <= statistics.median(dense) / statistics.median(slim) <= high
        assert ratio_interval(dense, slim, seed=5) == (low, high)
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2] > 0


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        drift = 1 + 0.3 * generator.random(25)  # what slows the machine down slows both runs of a repeat
        dense = 3.0 * drift * (1 + 0.05 * generator.standard_normal(25))
        slim = 2.0 * drift * (1 + 0.05 * generator.standard_normal(25))
        low, high = ratio_interval(dense.tolist(), slim.tolist(), seed=trial)
        hits += low <= 1.5 <= high
    assert 0.88 <= hits / 200 <= 1.0


def test_a_precision_is_reached_by_further_repeats_and_ends_in_any_case() -> None:
    """Noise of 10% on one form: the interval narrows until it is narrow enough, or the repeats are used up."""
    noise = tuple(np.abs(0.1 * np.random.default_rng(1).standard_normal(997)).tolist())

    def timed(precision: Precision | None) -> tuple[SpeedResult, list[int]]:
        dense, slim, clock, _ = pair(0.2, 0.1, noise=noise)
        slim.noise = [0.0]
        seen: list[int] = []
        (result,) = bench(
            dense, slim, [prefill(2)], threads=1, repeats=10, precision=precision, warmup=0, clock=clock,
            progress=lambda _, done, wanted: seen.append(wanted - done),
        )  # fmt: skip
        return result, seen

    exact, left = timed(None)
    assert (len(exact.dense_times), left) == (10, list(range(9, -1, -1)))
    first = uncertainty(exact.dense_times, exact.slim_times)
    loose, _ = timed(Precision(first, 500))
    assert loose == exact
    known, left = timed(Precision(first / 2, 500))
    assert 10 < len(known.dense_times) < 500
    assert len(known.dense_times) % 10 == 0
    assert left[-1] == 0
    assert uncertainty(known.dense_times, known.slim_times) <= first / 2
    assert known.dense_times[:10] == exact.dense_times
    ten_less = tuple(one[: len(known.dense_times) - 10] for one in (known.dense_times, known.slim_times))
    assert uncertainty(*ten_less) > first / 2
    short, _ = timed(Precision(first / 2, 25))
    assert len(short.dense_times) == 25
    least, _ = timed(Precision(1e-9, 5))  # fewer at most than at least: the least counts
    assert len(least.dense_times) == 10


HEAD, ATTENTION = 50, AttentionShape("a", heads=2, query_dim=3, value_dim=4)
DENSE = Cost(MacCount(1000, HEAD, (ATTENTION,)), weight_bytes=4200, cache_bytes=10)
SLIM = Cost(MacCount(500, HEAD, (AttentionShape("a", 1, 3, 4),)), weight_bytes=2200, cache_bytes=5)


def test_prefill_is_bound_by_macs_with_head_and_attention() -> None:
    bound = bound_of(prefill(10), DENSE, SLIM)
    assert bound == Bound((1050 * 10 + 14 * 100) / (550 * 10 + 7 * 100), "macs")


def test_decoding_at_batch_one_is_bound_by_bytes_with_the_cache() -> None:
    bound = bound_of(decode(3, past=100), DENSE, SLIM)
    assert bound == Bound((4200 + 101 * 10) / (2200 + 101 * 5), "bytes")


def test_decoding_a_batch_is_bound_by_the_larger_ratio() -> None:
    bound = bound_of(decode(1, past=4, batch=8), DENSE, SLIM)
    macs, read = (1050 + 14 * 5) / (550 + 7 * 5), (4200 + 8 * 4 * 10) / (2200 + 8 * 4 * 5)
    assert bound == Bound(max(macs, read), "macs" if macs > read else "bytes")


def test_no_bound_where_macs_are_not_all_known() -> None:
    unlifted = Cost(MacCount(500, HEAD, uncounted=("matmul(w)",)), 10)
    without_attention = Cost(MacCount(500, HEAD), 10)
    assert bound_of(prefill(4), DENSE, unlifted) is None
    assert bound_of(decode(1, past=4), DENSE, unlifted) is None
    assert bound_of(decode(1, past=4, batch=2), DENSE, without_attention) is None
    assert bound_of(prefill(4), DENSE, without_attention) is None
    assert bound_of(prefill(4), without_attention, without_attention) == Bound(1.0, "macs")


def test_json_has_the_reports_shape_and_leaves_out_a_missing_bound() -> None:
    dense, slim, clock, _ = pair()
    cases = [prefill(10), decode(2, past=3, batch=4)]
    bounded = bench(
        dense, slim, cases, threads=1, repeats=2, warmup=0, clock=clock, costs=(DENSE, SLIM), runtime="torch"
    )
    entry = json.loads(json.dumps(bounded[0].to_json()))
    assert entry == {
        "runtime": "torch",
        "case": "prefill-10",
        "threads": 1,
        "repeats": 2,
        "dense_ms": pytest.approx(200),
        "slim_ms": pytest.approx(100),
        "speedup": pytest.approx(2),
        "ci": [pytest.approx(2), pytest.approx(2)],
        "bound": pytest.approx((10500 + 1400) / (5500 + 700)),
        "bound_kind": "macs",
    }
    assert bounded[1].to_json()["case"] == "decode-2@3-b4"
    (free,) = bench(dense, slim, cases[:1], threads=1, repeats=2, warmup=0, clock=clock)
    assert {"bound", "bound_kind"}.isdisjoint(free.to_json())
    assert free.runtime == "dense / slim"


def test_progress_counts_timed_repeats() -> None:
    dense, slim, clock, _ = pair()
    seen: list[tuple[str, int, int]] = []
    bench(
        dense,
        slim,
        [prefill(2)],
        threads=1,
        repeats=3,
        warmup=2,
        clock=clock,
        progress=lambda case, done, total: seen.append((case.name, done, total)),
    )
    assert seen == [("prefill-2", 1, 3), ("prefill-2", 2, 3), ("prefill-2", 3, 3)]


@pytest.mark.parametrize(("threads", "repeats", "warmup"), [(0, 5, 1), (1, 1, 1), (1, 5, -1)])
def test_impossible_settings_are_refused(threads: int, repeats: int, warmup: int) -> None:
    dense, slim, clock, _ = pair()
    with pytest.raises(UsageError, match="cannot benchmark"):
        bench(dense, slim, [prefill(2)], threads=threads, repeats=repeats, warmup=warmup, clock=clock)


@pytest.mark.parametrize(
    ("kind", "tokens", "past"), [("train", 1, 0), ("prefill", 0, 0), ("prefill", 4, 4), ("decode", 4, 0)]
)
def test_impossible_cases_are_refused(kind: str, tokens: int, past: int) -> None:
    with pytest.raises(UsageError, match="benchmark case"):
        Case(kind, tokens, past)


def test_cache_bytes_follow_the_interface() -> None:
    past = torch.zeros(2, 3, 5, 4, dtype=torch.float16)
    entries = (CacheEntry("k", "pk", 0, "key"), CacheEntry("v", "pv", 0, "value"))
    interface = Interface({"k": past, "v": past}, {}, ("logits", "pk", "pv"), entries)
    assert cache_bytes_per_token(interface) == 2 * 3 * 4 * 2


def test_file_size_sums_a_directory(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.onnx").write_bytes(b"x" * 10)
    (tmp_path / "inner" / "a.onnx.data").write_bytes(b"x" * 32)
    assert file_size(tmp_path / "a.onnx") == 10
    assert file_size(tmp_path) == 42


def test_load_time_and_memory_and_machine() -> None:
    clock = Clock()

    def load() -> str:
        clock.now += 1.5
        return "model"

    assert timed_load(load, clock=clock) == ("model", 1.5)
    held = torch.zeros(2_000_000)
    assert held.numel() * 4 < peak_rss_bytes() < machine()["memory_bytes"] * 4
    facts = json.loads(json.dumps(machine()))
    assert facts["torch"] == torch.__version__
    assert None not in facts.values()
    assert facts["cpu"]

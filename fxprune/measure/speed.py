"""The benchmark: dense against slim, interleaved, with a confidence interval and the bound that counting predicts.

Both forms run in one process, turn about, so that what disturbs the machine disturbs both. The figure is a trimmed mean
of the ratios of neighbouring runs with a bootstrap interval over them; where a precision is asked for, forms are timed
until the interval is that narrow. Beside it stands the speed-up that would follow if time were proportional to work:
MACs for prefill, bytes read for decoding at batch 1 (output projection included in both).
"""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxprune.channels.accounting import MacCount, bytes_read_per_step, macs_per_token
from fxprune.core.errors import UsageError
from fxprune.core.machine import file_size, machine, peak_rss_bytes, timed_load
from fxprune.core.progress import bars
from fxprune.measure.ratios import mean_ratio, ratio_interval
from fxprune.runtimes.runners import position_ids_from_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from fxprune.core.program import Interface
    from fxprune.measure.ratios import Precision
    from fxprune.runtimes.runners import Past, Runner

__all__ = [
    "Bound",
    "Case",
    "Cost",
    "SpeedResult",
    "bench",
    "bound_of",
    "cache_bytes_per_token",
    "cost_of",
    "decode",
    "file_size",
    "interleaved_times",
    "machine",
    "peak_rss_bytes",
    "prefill",
    "run_once",
    "timed_load",
    "torch_threads",
]


# ---- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        kind: `"prefill"`: all tokens in one step on an empty cache; `"decode"`: one token a step on a filled one.
        tokens: new tokens per sequence.
        past: tokens in the cache before the clock starts.
        batch: number of sequences.
    """

    kind: str
    tokens: int
    past: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        if self.kind not in {"prefill", "decode"}:
            raise UsageError(f"benchmark case {self.kind!r} is unknown; use 'prefill' or 'decode'")
        if min(self.tokens, self.batch) < 1 or self.past < 0:
            raise UsageError(f"benchmark case {self} needs at least one token, one sequence and no negative past")
        if (self.past == 0) != (self.kind == "prefill"):
            raise UsageError(f"benchmark case {self}: prefill starts on an empty cache, decode on a filled one")

    @property
    def name(self) -> str:
        """For example `prefill-512`, `decode-64@512` (64 tokens after 512), with `-b4` for four sequences."""
        text = f"{self.kind}-{self.tokens}" + (f"@{self.past}" if self.past else "")
        return text + (f"-b{self.batch}" if self.batch > 1 else "")


def prefill(tokens: int, *, batch: int = 1) -> Case:
    """The case that runs `tokens` tokens of `batch` sequences in one step; its time is that of the step."""
    return Case("prefill", tokens, batch=batch)


def decode(tokens: int, *, past: int, batch: int = 1) -> Case:
    """The case that adds `tokens` tokens one at a time to a cache of length `past`; its time is that of one token."""
    return Case("decode", tokens, past, batch)


# ---- bounds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one form of a model must compute and read.

    Attributes:
        macs: its MACs, attention included where known.
        weight_bytes: bytes of weights read by every step.
        cache_bytes: bytes of cache per token of one sequence.
    """

    macs: MacCount
    weight_bytes: int
    cache_bytes: int = 0

    def macs_of(self, case: Case) -> float:
        """MACs of what the clock measures: the whole prefill step, or the mean of the decoding steps."""
        if case.kind == "prefill":
            return self.macs.of_step(case.tokens, batch=case.batch)
        steps = range(case.past, case.past + case.tokens)
        return sum(self.macs.of_step(1, past, case.batch) for past in steps) / case.tokens

    def bytes_of(self, case: Case) -> float:
        """Bytes of weights and cache read in what the clock measures, each once a step."""
        length = case.past + (case.tokens - 1) / 2
        return self.weight_bytes + case.batch * length * self.cache_bytes * (case.kind == "decode")


@dataclass(frozen=True)
class Bound:
    """The speed-up if time were proportional to work; `kind` is the work, `"macs"` or `"bytes"`."""

    speedup: float
    kind: str


def cache_bytes_per_token(interface: Interface) -> int:
    """Bytes of keys and values that one token of one sequence adds to the cache of a flat graph."""
    examples = (interface.example_inputs[entry.input] for entry in interface.cache)
    return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in examples)


def cost_of(module: nn.Module, interface: Interface | None = None) -> Cost:
    """Count what a form of a model costs; with its interface, attention and cache are counted too.

    Args:
        module: a lifted graph module, or any other module (each Linear then counts as called once).
        interface: how the graph is called.
    """
    if interface is None:
        return Cost(macs_per_token(module), bytes_read_per_step(module))
    macs = macs_per_token(module, outputs=interface.outputs, example_inputs=interface.example_inputs)
    return Cost(macs, bytes_read_per_step(module), cache_bytes_per_token(interface))


def bound_of(case: Case, dense: Cost, slim: Cost) -> Bound | None:
    """The bound of a case: MACs for prefill, bytes for decoding at batch 1, the larger ratio for larger batches.

    A time that is a sum of both kinds of work cannot shrink by more than the larger of the two ratios. None when a
    form has products that were not counted (experts, of which a step reads and computes only some), when attention is
    known of one form only, or when nothing is left to divide by.
    """
    if dense.macs.uncounted or slim.macs.uncounted:
        return None
    alike = (dense.macs.attention is None) == (slim.macs.attention is None)
    macs = _ratio(dense.macs_of(case), slim.macs_of(case), "macs") if alike else None
    read = _ratio(dense.bytes_of(case), slim.bytes_of(case), "bytes")
    if case.kind == "prefill":
        return macs
    if case.batch == 1:
        return read
    return max(macs, read, key=lambda bound: bound.speedup) if macs is not None and read is not None else None


def _ratio(dense: float, slim: float, kind: str) -> Bound | None:
    return Bound(dense / slim, kind) if dense > 0 and slim > 0 else None


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedResult:
    """Dense against slim in one case.

    Attributes:
        runtime: what ran the models.
        case: the workload.
        threads: number of threads used.
        dense_times: milliseconds of every repeat of the dense form: of the step for prefill, per token for decoding.
        slim_times: the same of the slim form; entry i ran next to entry i of `dense_times`.
        ci: 95% confidence interval of `speedup`.
        bound: the speed-up that counting predicts, where it could.
        form: name of the slim form, where there are several.
    """

    runtime: str
    case: Case
    threads: int
    dense_times: tuple[float, ...]
    slim_times: tuple[float, ...]
    ci: tuple[float, float]
    bound: Bound | None = None
    form: str | None = None

    @property
    def dense_ms(self) -> float:
        """Median of the dense times."""
        return statistics.median(self.dense_times)

    @property
    def slim_ms(self) -> float:
        """Median of the slim times."""
        return statistics.median(self.slim_times)

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense form the slim one is, see `mean_ratio`."""
        return mean_ratio(self.dense_times, self.slim_times)

    def to_json(self) -> dict[str, Any]:
        """An entry of the `speed` section of `report.json`; without a bound its two keys are absent."""
        entry: dict[str, Any] = {
            "runtime": self.runtime,
            "case": self.case.name,
            "threads": self.threads,
            "repeats": len(self.dense_times),
            "dense_ms": self.dense_ms,
            "slim_ms": self.slim_ms,
            "speedup": self.speedup,
            "ci": list(self.ci),
        }
        if self.bound is not None:
            entry |= {"bound": self.bound.speedup, "bound_kind": self.bound.kind}
        return entry if self.form is None else {"form": self.form, **entry}


def bench(
    dense: Runner,
    slim: Runner,
    cases: Sequence[Case],
    *,
    threads: int,
    repeats: int = 20,
    precision: Precision | None = None,
    warmup: int = 3,
    seed: int = 0,
    costs: tuple[Cost, Cost] | None = None,
    runtime: str | None = None,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[Case, int, int], None] | None = None,
) -> list[SpeedResult]:
    """Time two forms of one model against each other.

    Each repeat runs both, and which goes first alternates (dense, slim, slim, dense, ...). Both get the same random
    tokens. Decoding is real: every step uses the cache that the step before returned, and every repeat starts again
    from the same prefilled cache.

    Args:
        dense: runner of the dense form.
        slim: runner of the slim form.
        cases: the workloads.
        threads: torch runs with this number of threads and is set back afterwards. ONNX Runtime sessions are made
            with their own; give the same number, it is what the result states.
        repeats: timed repeats of each form, at least 2.
        precision: go on by as many repeats until each case is known so well; None for `repeats` and no more.
        warmup: repeats before the clock starts.
        seed: of the tokens and of the bootstrap.
        costs: of the dense and the slim form, for the bounds (see `cost_of`).
        runtime: what the result calls the runtime; the runners' names when None.
        device: where the input tensors live.
        clock: seconds that only grow.
        progress: called with the case, the repeats done and the repeats to do.

    Returns:
        One result per case, in order.

    Raises:
        UsageError: too few threads, repeats or cases.
    """
    label = runtime or (dense.name if dense.name == slim.name else f"{dense.name} / {slim.name}")
    results = []
    timed = interleaved_times(
        [dense, slim],
        cases,
        threads=threads,
        repeats=repeats,
        precision=precision,
        warmup=warmup,
        seed=seed,
        device=device,
        clock=clock,
        progress=progress,
    )
    for case, (first, other) in zip(cases, timed, strict=True):
        bound = None if costs is None else bound_of(case, *costs)
        results.append(SpeedResult(label, case, threads, first, other, ratio_interval(first, other, seed=seed), bound))
    return results


def interleaved_times(
    runners: Sequence[Runner],
    cases: Sequence[Case],
    *,
    threads: int,
    repeats: int = 20,
    precision: Precision | None = None,
    warmup: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[Case, int, int], None] | None = None,
) -> list[list[tuple[float, ...]]]:
    """Milliseconds of every repeat of every runner, by case: what `bench` does, for any number of forms.

    Each repeat runs all forms, forwards and backwards in turn (A B C, C B A, ...).

    Args:
        runners: at least one; the rest as for `bench`.
        cases: see `bench`, as the rest.
        threads: see `bench`.
        repeats: see `bench`.
        precision: see `bench`.
        warmup: see `bench`.
        seed: see `bench`.
        device: see `bench`.
        clock: see `bench`.
        progress: see `bench`.
    """
    if threads < 1 or repeats < 2 or warmup < 0 or not cases:
        raise UsageError(
            f"cannot benchmark with threads={threads}, repeats={repeats}, warmup={warmup} and {len(cases)} cases: "
            "at least 1 thread, 2 repeats, 0 warm-up runs and 1 case are needed"
        )
    timed = []
    with torch_threads(threads):
        vocabulary = min(_vocabulary(runner, device) for runner in runners)
        for case in cases:
            runs = [
                _Run(runner, case, vocabulary=vocabulary, seed=seed, device=device, clock=clock) for runner in runners
            ]
            times: list[list[float]] = [[] for _ in runners]
            gc.collect()
            repeat, wanted = -warmup, repeats
            while repeat < wanted:
                order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
                for form in order:
                    milliseconds = runs[form].milliseconds()
                    if repeat >= 0:
                        times[form].append(milliseconds)
                repeat += 1
                if repeat == wanted and precision is not None and not precision.reached(times):
                    wanted = max(wanted, min(precision.most, wanted + repeats))
                if progress is not None and repeat > 0:
                    progress(case, repeat, wanted)
            timed.append([tuple(each) for each in times])
    return timed


def run_once(runner: Runner, case: Case) -> float:
    """Run a case once on random tokens: milliseconds, of a single cold run."""
    run = _Run(runner, case, vocabulary=_vocabulary(runner, "cpu"), seed=0, device="cpu", clock=time.perf_counter)
    return run.milliseconds()


class _Run:
    """One runner with the inputs of one case made ready, so that the clock sees steps and nothing else."""

    def __init__(
        self,
        runner: Runner,
        case: Case,
        *,
        vocabulary: int,
        seed: int,
        device: torch.device | str,
        clock: Callable[[], float],
    ) -> None:
        self.runner, self.case, self.clock, self.device = runner, case, clock, device
        generator = torch.Generator().manual_seed(seed)
        shape = (case.batch, case.past + case.tokens)
        tokens = torch.randint(vocabulary, shape, generator=generator).to(device)
        self.past: Past | None = None
        if case.kind == "prefill":
            self.steps = [_inputs(tokens, 0, case.tokens)]
        else:
            _, self.past = runner.step(*_inputs(tokens, 0, case.past), None)
            self.steps = [_inputs(tokens, length, length + 1) for length in range(case.past, shape[1])]

    def milliseconds(self) -> float:
        """Run the case once: milliseconds of the step, or per token of decoding."""
        past = None if self.past is None else _fork(self.runner, self.past)
        _synchronize(self.device)
        start = self.clock()
        for step in self.steps:
            _, past = self.runner.step(*step, past)
        _synchronize(self.device)
        return (self.clock() - start) * 1e3 / len(self.steps)


def _fork(runner: Runner, past: Past) -> Past:
    """A cache to start from that is not changed by what is done with `past`, or with what comes back."""
    # A runtime with a state of its own says how to go back; one that appends in place must not lengthen ours.
    fork: Callable[[Past], Past] | None = getattr(runner, "fork", None)
    return [tensor.clone() for tensor in past] if fork is None else fork(past)


def _inputs(tokens: Tensor, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.ones_like(tokens[:, :end])
    return tokens[:, start:end].contiguous(), mask, position_ids_from_mask(mask, end - start)


def _vocabulary(runner: Runner, device: torch.device | str) -> int:
    known: int | None = getattr(runner, "vocabulary", None)  # of runners whose step gives no logits over it
    if known is not None:
        return known
    logits, _ = runner.step(*_inputs(torch.zeros(1, 2, dtype=torch.long, device=device), 0, 2), None)
    return int(logits.shape[-1])


def _synchronize(device: torch.device | str) -> None:
    """Wait until an accelerator has finished; nothing to do on the CPU."""
    if torch.device(device).type not in {"cpu", "meta"}:
        torch.accelerator.synchronize(device)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run a block with this number of torch intra-op threads and set the old number back, whatever happens."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def track_repeats() -> Iterator[Callable[[Case, int, int], None]]:
    """Show the repeats of a benchmark as `track` does; nothing is drawn while the clock runs.

    Yields:
        What `fxprune.measure.speed.bench` takes for `progress`.
    """
    with bars(auto_refresh=False) as progress:
        task = progress.add_task("timing", total=None)

        def show(case: Case, done: int, wanted: int) -> None:
            progress.update(task, description=f"timing {case.name}", completed=done, total=wanted, refresh=True)

        yield show

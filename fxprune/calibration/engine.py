"""The calibration engine: samples go through the graph stage by stage, and weights change on the way.

    for every stage:   kept values ─ run ─ kept values          one batch of samples at a time
                                      └ XᵀX of what the next projections read
                       solve: new weights for these projections, before the next stage runs them

One engine serves every pass that learns from activations. Its memory is one stage's weights and work, the values kept
between stages, and the Gram matrices of the projections at hand; for a decoder or an encoder it does not grow with
depth. (An encoder-decoder's keys and values of the encoder's output are known, and kept, for all its layers at once.)
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.calibration.activation_store import ActivationStore
from fxprune.calibration.gram import Gram, GramSum
from fxprune.core.errors import NotFiniteError, PreconditionError
from fxprune.runtimes.matmul import fast_products
from fxprune.runtimes.runners import position_ids_from_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch.fx import GraphModule

    from fxprune.calibration.stages import Cut, InputSite, Stage
    from fxprune.core.program import Interface

__all__ = [
    "CalibrationEngine",
    "Collector",
    "EngineOptions",
    "GramCollector",
    "Residency",
    "Samples",
    "SiteStatistics",
    "require_length",
    "text_samples",
]

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Samples:
    """What goes into the graph.

    Attributes:
        varying: inputs that differ from sample to sample, (samples, ...), by name.
        fixed: gives the other inputs for a batch of so many samples, by name.
        tokens: tokens of a sample, for figures.
    """

    varying: Mapping[str, Tensor]
    fixed: Callable[[int], Mapping[str, Tensor]]
    tokens: int

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(next(iter(self.varying.values())))


@dataclass(frozen=True)
class SiteStatistics:
    """What was collected of one input.

    Attributes:
        site: whose.
        grams: one, or one for every expert; None for an expert that no token was sent to.
        cross: (in, in) float32, X'ᵀX with X what the dense model's projection reads and X' what this one does, summed
            over tokens; None without a dense path, and for experts (the two paths may send a token to others).
    """

    site: InputSite
    grams: tuple[Gram | None, ...]
    cross: Tensor | None = None


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs.

    Attributes:
        batch_size: samples at once; None finds it from `work_bytes`.
        work_bytes: what one batch may allocate while it runs a stage.
        memory_bytes: what values kept between stages may take in main memory before they go to files; None for no
            limit.
        device_bytes: what they may take on an accelerator before they go to main memory.
        spill_directory: where files of kept values go.
        forward_dtype: precision of the products of the forward passes; None for the graph's own.
    """

    batch_size: int | None = None
    work_bytes: int = 1 << 29
    memory_bytes: int | None = None
    device_bytes: int = 0
    spill_directory: Path | None = None
    forward_dtype: torch.dtype | None = None


class Residency(Protocol):
    """Brings weights in when they are needed and takes them out again."""

    def enter(self, module: GraphModule) -> None:
        """Called before a piece of the graph runs."""
        ...

    def solving(self, linears: Sequence[str]) -> None:
        """Called before the weights of projections are solved."""
        ...

    def end_block(self, next_stage: int, store: ActivationStore) -> None:
        """Called when a block's stages have run and their sites are solved; `store` holds what the next stage needs."""
        ...


@dataclass
class _Clock:
    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "gram": 0.0, "solve": 0.0})

    def add(self, name: str, start: float) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # work that was only started counts for nobody else
        now = time.perf_counter()
        self.seconds[name] += now - start
        return now


class Collector(Protocol):
    """Adds up what a stage's sites read, batch by batch."""

    def add(self, site: InputSite, rows: Tensor, dense: Tensor | None, offsets: Tensor | None, first: int) -> None:
        """Take one batch of one site.

        Args:
            site: whose.
            rows: (tokens, in) float32, what its projections read.
            dense: (tokens, in) float32, what the dense model's do, if its path is followed.
            offsets: (experts,) where each expert's rows end, for experts.
            first: index of the batch's first sample.
        """
        ...

    def finish(self) -> list[SiteStatistics]:
        """What was collected, by site."""
        ...


class GramCollector:
    """X^T X of every site, and X'^T X where there is a dense path."""

    def __init__(self) -> None:
        self._sums: dict[InputSite, list[GramSum]] = {}
        self._crosses: dict[InputSite, Tensor] = {}

    def add(self, site: InputSite, rows: Tensor, dense: Tensor | None, offsets: Tensor | None, first: int) -> None:
        """Take one batch of one site; see `Collector`."""
        del first
        ends = [len(rows)] if offsets is None else offsets.tolist()
        if site not in self._sums:
            self._sums[site] = [GramSum(rows.shape[1], rows.device) for _ in ends]
        begin = 0
        for one, end in zip(self._sums[site], ends, strict=True):
            if end > begin:
                one.add(rows[begin:end])
            begin = end
        if dense is not None and offsets is None:
            width = rows.shape[1]
            cross = self._crosses.setdefault(site, torch.zeros(width, width, device=rows.device))
            cross.addmm_(rows.t(), dense)

    def finish(self) -> list[SiteStatistics]:
        """Grams and cross products by site.

        Raises:
            CalibrationError: they are not finite.
        """
        found = [
            SiteStatistics(site, tuple(one.result() for one in many), self._crosses.get(site))
            for site, many in self._sums.items()
        ]
        for statistics in found:
            _check_finite(statistics)
        return found


class CalibrationEngine:
    """Runs samples through a cut graph (see the module's docstring).

    Args:
        cut: the graph in stages.
        samples: what goes in.
        options: how.
        residency: brings weights in and out; None when all of them are there.
        dense: the same graph in the same stages with the dense weights, if its path shall be followed beside the other.
        collector: makes what adds up the statistics of a stage.
    """

    def __init__(
        self,
        cut: Cut,
        samples: Samples,
        options: EngineOptions | None = None,
        residency: Residency | None = None,
        *,
        dense: Cut | None = None,
        collector: Callable[[], Collector] = GramCollector,
    ) -> None:
        self.cut = cut
        self.collector = collector
        self.dense = dense
        self.samples = samples
        self.options = options or EngineOptions()
        self.residency = residency
        self.device = next(iter(samples.varying.values())).device
        self.clock = _Clock(device=self.device)
        self.batch_size = 0
        self.peak_bytes: dict[str, int] = {}
        self._contexts: dict[int, dict[str, Any]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Time by part: forward, gram, solve."""
        return dict(self.clock.seconds)

    def run(
        self,
        solve: Callable[[Stage, Sequence[SiteStatistics]], None],
        *,
        on_stage: Callable[[int], None] | None = None,
        first_stage: int = 0,
        restored: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Run all stages.

        Args:
            solve: gets a stage that has run and the statistics of its sites; changes the weights of the projections in
                place (a new `Parameter` on the module) before the next stage runs them.
            on_stage: called with the number of stages done.
            first_stage: where to go on after an interruption; the options must give the batch size of that run.
            restored: what the store held then, one value a batch, by name.

        Raises:
            CalibrationError: activations are not finite, or do not fit.
        """
        self.batch_size = self.options.batch_size or self._fitting_batch()
        starts = list(range(0, self.samples.count, self.batch_size))
        store = self._store(len(starts))
        beside = self._store(len(starts))
        with store, beside:
            for name, values in (restored or {}).items():
                for batch, value in enumerate(values):
                    store.put(name, batch, value)
            for index in range(first_stage, len(self.cut.stages)):
                stage = self.cut.stages[index]
                self._enter(stage.module)
                pair = None if self.dense is None else (self.dense.stages[index], beside)
                statistics = self._run_stage(stage, store, starts, pair)
                start = time.perf_counter()
                if statistics:
                    if self.residency is not None:
                        self.residency.solving([name for one in statistics for name in one.site.linears])
                    solve(stage, statistics)
                del statistics  # the Gram matrices of a wide stage are larger than its weights
                self.clock.add("solve", start)
                if self.residency is not None and self._ends_block(index):
                    self.residency.end_block(index + 1, store)
                if on_stage is not None:
                    on_stage(index + 1)
            self.peak_bytes = dict(store.peak)

    def _store(self, batches: int) -> ActivationStore:
        return ActivationStore(
            batches,
            device=self.device,
            device_budget=self.options.device_bytes,
            memory_budget=self.options.memory_bytes,
            directory=self.options.spill_directory,
        )

    def _ends_block(self, index: int) -> bool:
        stages = self.cut.stages
        return index + 1 == len(stages) or stages[index + 1].block != stages[index].block

    def _enter(self, module: GraphModule) -> None:
        if self.residency is not None:
            self.residency.enter(module)

    def _run_stage(
        self,
        stage: Stage,
        store: ActivationStore,
        starts: Sequence[int],
        dense: tuple[Stage, ActivationStore] | None,
    ) -> list[SiteStatistics]:
        collector = self.collector()
        with torch.no_grad(), self._precision():
            for batch, first in enumerate(starts):
                start = time.perf_counter()
                inputs = self._run_batch(stage, store, batch, first)
                others = inputs if dense is None else self._run_batch(dense[0], dense[1], batch, first)
                start = self.clock.add("forward", start)
                for site, (x, offsets), (y, _) in zip(stage.sites, inputs, others, strict=True):
                    with self._exact():
                        collector.add(site, self._rows(x), None if dense is None else self._rows(y), offsets, first)
                self.clock.add("gram", start)
        return collector.finish()

    def _run_batch(
        self, stage: Stage, store: ActivationStore, batch: int, first: int
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Run one batch through a stage and keep what later stages need; returns what its sites read, with offsets."""
        results = stage.module(*self._values(stage, store, batch, first))
        store.drop(stage.drops, batch)
        for name, value in zip(stage.outputs, results, strict=False):
            store.put(name, batch, value)
        rest = iter(results[len(stage.outputs) :])
        return [(next(rest), next(rest) if site.offsets is not None else None) for site in stage.sites]

    def _rows(self, x: Tensor) -> Tensor:
        """What a projection really reads, (tokens, width) float32: rounded as the forward pass rounds it."""
        rows = x.reshape(-1, x.shape[-1])
        dtype = self.options.forward_dtype
        return rows.to(dtype if dtype is not None else rows.dtype).float()

    def _exact(self) -> ExitStack:
        """Products of rows: sums in float32, whatever the forward pass uses."""
        stack = ExitStack()
        stack.enter_context(torch.autocast(self.device.type, enabled=False))
        stack.enter_context(fast_products(rounded=self.options.forward_dtype is torch.bfloat16))
        return stack

    def _values(self, stage: Stage, store: ActivationStore, batch: int, first: int) -> list[Any]:
        size = min(self.batch_size, self.samples.count - first)
        given = self._context(size)
        values = []
        for name in stage.inputs:
            if name in self.samples.varying:
                values.append(self.samples.varying[name][first : first + size])
            elif name in given:
                values.append(given[name])
            else:
                values.append(store.get(name, batch))
        return values

    def _context(self, size: int) -> dict[str, Any]:
        """Inputs that all samples share, and what follows from them, for a batch of so many samples."""
        if size not in self._contexts:
            fixed = dict(self.samples.fixed(size))
            sizes = {name: tensor[:size] for name, tensor in self.samples.varying.items()}
            self._enter(self.cut.context)
            with torch.no_grad():
                results = self.cut.context(*((fixed | sizes)[name] for name in self.cut.context_inputs))
            self._contexts[size] = {**fixed, **dict(zip(self.cut.context_outputs, results, strict=True))}
        return self._contexts[size]

    def _precision(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(fast_products())
        if self.options.forward_dtype is not None:
            stack.enter_context(torch.autocast(self.device.type, self.options.forward_dtype))
        return stack

    def _fitting_batch(self) -> int:
        """The largest batch whose stages stay within `work_bytes`, from what one sample allocates in the first ones."""
        largest = 1
        kept: dict[str, Any] = {}
        with torch.no_grad(), self._precision():
            for stage in self.cut.stages[: self.cut.period + 1]:
                self._enter(stage.module)
                context = {**self._context(1), **{n: t[:1] for n, t in self.samples.varying.items()}, **kept}
                with _Weighing() as weighing:
                    results = stage.module(*(context[name] for name in stage.inputs))
                kept |= dict(zip(stage.outputs, results, strict=False))
                largest = max(largest, weighing.bytes)
        fitting = min(self.options.work_bytes // largest, _TOKENS_AT_ONCE // max(self.samples.tokens, 1))
        return max(1, min(int(fitting), self.samples.count))


class _Weighing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of every tensor that operators make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return result


def _check_finite(statistics: SiteStatistics) -> None:
    for expert, gram in enumerate(statistics.grams):
        if gram is not None and not bool(torch.isfinite(gram.matrix.diagonal()).all()):
            which = f" (expert {expert})" if len(statistics.grams) > 1 else ""
            raise NotFiniteError(
                f"{statistics.site.linears[0]}{which} read NaN or infinite values on the calibration text; check the "
                "weights before it, or load the model in bfloat16 or float32"
            )


def require_length(interface: Interface, length: int) -> None:
    """Check that a graph runs calibration samples of a length.

    Raises:
        PreconditionError: it is for samples of another one.
    """
    fixed = interface.fixed_length
    if fixed is not None and length != fixed:
        raise PreconditionError(
            f"calibration samples have {length} tokens and the graph runs sequences of exactly {fixed}, because the "
            f"model's code loops over tokens or chunks of them: use seq_len={fixed}, or trace(model, length={length})"
        )


def text_samples(interface: Interface, tokens: Tensor) -> Samples:
    """Samples for a graph that reads tokens: all of a sequence's positions, no padding, empty caches.

    Args:
        interface: how the graph is called.
        tokens: (samples, length) int64, on the device where the graph runs; an encoder-decoder reads them on both
            sides.

    Raises:
        PreconditionError: the graph needs an input that text does not give, or samples of another length.
    """
    readers = [name for name in interface.inputs if name in {"input_ids", "decoder_input_ids"}]
    cache = {entry.input for entry in interface.cache}
    strange = [
        name
        for name in interface.inputs
        if name not in {*readers, *cache, "attention_mask", "position_ids", "decoder_attention_mask", "token_type_ids"}
    ]
    if strange or not readers:
        raise PreconditionError(
            f"calibration text gives no {strange[0] if strange else 'input_ids'}; pass samples of it"
        )
    length = tokens.shape[1]
    require_length(interface, length)

    def fixed(batch: int) -> dict[str, Tensor]:
        mask = torch.ones(batch, length, dtype=torch.long, device=tokens.device)
        made = {
            "attention_mask": mask,
            "decoder_attention_mask": mask,
            "position_ids": position_ids_from_mask(mask, length),
            "token_type_ids": torch.zeros_like(mask),
        }
        for name in cache:
            example = interface.example_inputs[name]
            made[name] = example.new_empty((batch, *example.shape[1:2], 0, *example.shape[3:]), device=tokens.device)
        return {name: made[name] for name in interface.inputs if name in made}

    return Samples(dict.fromkeys(readers, tokens), fixed, length)

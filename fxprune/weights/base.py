"""What all weight-pruning passes share: calibrate stage by stage, solve, keep the masks, report.

    x ─ q_proj(W) ─ ...        =>        x ─ q_proj(W') ─ ...        W' has zeros, the graph is the same

Shapes stay, so the checkpoint loads wherever the dense one did. Zeros make no mainstream runtime faster by themselves:
weight sparsity buys file size after compression, and speed only where kernels exist for the pattern.

Refused:
 1. a program whose projections are not lifted, or without any;
 2. a scope that matches nothing, or a pattern that does not divide a projection's inputs (it is named);
 3. a weight that two modules share;
 4. calibration text for a model that does not read tokens, or of a model that writes none (see
    `fxprune.models.methods`);
 5. experts whose routers were not located.

Weights that were removed before stay so and count: 50% of a projection that has 30% zeros removes 20% more, and where
more are gone than was asked for nothing else goes.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from fxprune.calibration.engine import CalibrationEngine, EngineOptions, text_samples
from fxprune.calibration.overflow import naming_overflow
from fxprune.calibration.stages import cut_stages
from fxprune.calibration.text import CalibrationSpec, texts_of
from fxprune.channels.locate import require_lifted
from fxprune.core.errors import PostconditionError, PreconditionError, UsageError
from fxprune.core.groups import ExpertGroup
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.precision import main_dtype
from fxprune.core.progress import track
from fxprune.models.loading import resolve_dtype
from fxprune.models.methods import check_method
from fxprune.runtimes.matmul import multiplies_bfloat16, product_rate
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.nodes import get_attribute
from fxprune.weights.allocation import allocate_by_loss
from fxprune.weights.distillation import check_distillation, distil_weights
from fxprune.weights.layerwise import LayerwiseSolver
from fxprune.weights.scope import called_projections, targets_of
from fxprune.weights.sparsity import Sparsity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.calibration.engine import Samples
    from fxprune.calibration.stages import Cut
    from fxprune.core.program import Program
    from fxprune.weights.layerwise import LayerFigures
    from fxprune.weights.solvers import Solver

__all__ = [
    "NO_SPEED_UP",
    "SparsePass",
    "details_of",
    "dtype_of",
    "forward_precision",
    "read_per_module",
    "read_sparsity",
]

NO_SPEED_UP = "zeros alone make no dense kernel faster; ONNX Runtime computes them like any other number"
_HOW_TO_MEASURE = "to measure it: fxprune sparsify --measure-speed, or fxprune export of both forms and fxprune bench"
_LOWER = (torch.bfloat16, torch.float16)


def read_sparsity(sparsity: float | None, pattern: str | None) -> Sparsity:
    """One of the two options, `0.5` when neither is given.

    Raises:
        UsageError: both are given, or one is out of range.
    """
    if sparsity is not None and pattern is not None:
        raise UsageError("give either a sparsity or a pattern: an N:M pattern says how much goes")
    if pattern is not None:
        return Sparsity.parse(pattern)
    return Sparsity(0.5 if sparsity is None else sparsity)


def read_per_module(values: Mapping[str, Any]) -> dict[str, Sparsity | None]:
    """Patterns to sparsities: a share, `2:4`, or `dense`.

    Raises:
        UsageError: a value is none of these.
    """
    return {
        pattern: None if str(value).strip() == "dense" else Sparsity.parse(str(value))
        for pattern, value in values.items()
    }


def forward_precision(name: str | None, program_dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The precision of the forward passes' products: `auto` is bfloat16 where the machine computes it faster.

    Args:
        name: `auto`, or a dtype.
        program_dtype: the graph's own precision.
        device: where the graph is; on the meta device it will run elsewhere, and what the CPU can do counts.

    Returns:
        None when the graph's own precision is meant.

    Raises:
        UsageError: the dtype is higher than the graph's: products cannot be more precise than its weights.
    """
    if name == "auto":
        name = "bfloat16" if multiplies_bfloat16(device) and program_dtype is torch.float32 else None
    dtype = resolve_dtype(name)
    if dtype is not None and dtype not in {program_dtype, *_LOWER}:
        raise UsageError(
            f"forward_dtype is {name}, but the model is in {str(program_dtype).removeprefix('torch.')}: use auto, or "
            f"load it in {name}"
        )
    return None if dtype is program_dtype else dtype


def details_of(
    engine: CalibrationEngine, layers: LayerwiseSolver, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, float]]:
    """What a calibration that has run says about itself, for the report.

    Args:
        engine: that ran.
        layers: what it called.
        dtype: of the model.

    Returns:
        Entries of the `sparsity` section: blocks, stages, memory, and `work`, what had to be computed next to what this
        machine reaches in products. And seconds by part.
    """
    work = {
        "forward_tflop": layers.flop["forward"] / 1e12,
        "gram_tflop": layers.flop["gram"] / 1e12,
        "forward_peak_gflops": product_rate(engine.options.forward_dtype or dtype, engine.device),
        "gram_peak_gflops": product_rate(torch.float32, engine.device),
    }
    details = {
        "blocks": len(engine.cut.blocks),
        "stages": len(engine.cut.stages),
        "batch_size": engine.batch_size,
        "activation_bytes": {where: size for where, size in engine.peak_bytes.items() if size},
        "forward_dtype": str(engine.options.forward_dtype or "as traced").removeprefix("torch."),
        "work": work,
    }
    seconds = {**engine.seconds, "prepare": layers.prepare_seconds}
    seconds["solve"] = seconds.get("solve", 0.0) - layers.prepare_seconds
    return details, seconds


def dtype_of(program: Program) -> torch.dtype:
    """The precision of the weights: of most of them, where a model is mixed."""
    return main_dtype(program.graph_module.parameters())


class SparsePass(Pass):
    """Base of the passes that set weights to zero (see the module's docstring for the graph and the refusals).

    Args:
        sparsity: share of each projection's weights to remove, in [0, 1); 0.5 when there is no pattern either.
        pattern: N:M, keep N of every M along the inputs, such as `2:4`.
        calibration: `self`, a text file, or a hub data set (see `fxprune.calibration.text`).
        text_field: field of calibration records that is read; `text`, or else chats, by default.
        samples: calibration sequences.
        seq_len: tokens of each.
        seed: of every random choice.
        include: shell-style patterns of projections to prune; all but the output projection and routers by default.
        exclude: patterns of projections that stay dense.
        per_module: pattern to sparsity (`0.6`, `2:4`, `dense`) where it differs.
        exclude_lm_head: whether the output projection stays dense.
        allocation: `uniform`, or `loss`: more is removed where the loss minds less (see `fxprune.weights.allocation`).
        true_sequential: solve every projection on inputs that have seen its block's earlier ones pruned.
        inputs: `pruned` or `dense` activations from earlier blocks.
        distil_epochs: how often, once all layers are pruned, the weights that stay learn from the calibration text what
            the dense model predicts (see `fxprune.weights.distillation`); 0 leaves it out.
        distil_rate: their highest learning rate, a share of the root mean square of a Linear's weights.
        forward_dtype: precision of calibration forwards: `auto`, `float32`, `bfloat16`.
        batch_size: samples at once; found from `work_bytes` by default.
        work_bytes: what one batch may allocate.
        memory_bytes: what kept activations may take in main memory before they go to files; no limit by default.
        device_bytes: what they may take on an accelerator.
    """

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        pattern: str | None = None,
        calibration: str = "self",
        text_field: str | None = None,
        samples: int = 128,
        seq_len: int = 512,
        seed: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        per_module: Mapping[str, str | float] | None = None,
        exclude_lm_head: bool = True,
        allocation: Literal["uniform", "loss"] = "uniform",
        true_sequential: bool = True,
        inputs: Literal["pruned", "dense"] = "pruned",
        distil_epochs: float = 0.0,
        distil_rate: float = 2e-3,
        forward_dtype: str = "auto",
        batch_size: int | None = None,
        work_bytes: int = 1 << 29,
        memory_bytes: int | None = None,
        device_bytes: int = 0,
    ) -> None:
        self.wanted = read_sparsity(sparsity, pattern)
        self.sparsity = None if pattern is not None else self.wanted.share
        self.pattern = pattern
        if allocation not in {"uniform", "loss"}:
            raise UsageError(f"allocation is {allocation!r}; use uniform or loss")
        if allocation == "loss" and pattern is not None:
            raise UsageError(f"an N:M pattern is the same everywhere: allocation=loss needs a sparsity, not {pattern}")
        if inputs not in {"pruned", "dense"}:
            raise UsageError(f"inputs is {inputs!r}; use pruned or dense")
        check_distillation(distil_epochs, distil_rate)
        if distil_epochs and not self.needs_data:
            raise UsageError(f"{self.name} reads no text, so there is nothing to distil with: use another method")
        if distil_epochs and not exclude_lm_head:
            raise UsageError("distillation reads the dense model's predictions through the lm_head: leave it dense")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("work_bytes", work_bytes, 1),
            ("memory_bytes", memory_bytes, 0),
            ("device_bytes", device_bytes, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        if forward_dtype != "auto":
            resolve_dtype(forward_dtype)
        self.calibration = calibration
        self.text_field = text_field
        self.samples = samples
        self.seq_len = seq_len
        self.seed = seed
        self.calibration_spec()
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.per_module = {key: str(value) for key, value in (per_module or {}).items()}
        read_per_module(self.per_module)
        self.exclude_lm_head = exclude_lm_head
        self.allocation = allocation
        self.true_sequential = true_sequential and inputs == "pruned"
        self.inputs = inputs
        self.distil_epochs = distil_epochs
        self.distil_rate = distil_rate
        self.forward_dtype = forward_dtype
        self.batch_size = batch_size
        self.work_bytes = work_bytes
        self.memory_bytes = memory_bytes
        self.device_bytes = device_bytes

    prunes: ClassVar[bool] = True
    keeps_shapes: ClassVar[bool] = True
    verb: ClassVar[str] = "sparsify"
    needs_data: ClassVar[bool] = True

    def why_not_streamed(self) -> str:
        """See the base: what needs all weights at once."""
        if self.calibration == "self" and self.needs_data:
            return "streaming cannot sample text from a model that does not fit in memory; name a text file"
        if self.allocation != "uniform":
            return f"allocation={self.allocation} needs the whole model in memory; streaming prunes uniformly"
        if self.distil_epochs:
            return "distillation needs the whole model in memory: leave distil_epochs out when streaming"
        return "" if self.needs_data else f"{self.name} needs no calibration; streaming is for methods that do"

    def loss_reader(self) -> str:
        """See the base; the options that read the loss."""
        if self.allocation == "loss":
            return f"allocation=loss of {self.name}"
        return f"distil_epochs of {self.name}" if self.distil_epochs else super().loss_reader()

    def calibration_spec(self) -> CalibrationSpec:
        """Which calibration samples are wanted.

        Raises:
            UsageError: an option is out of range.
        """
        return CalibrationSpec(
            self.calibration, samples=self.samples, seq_len=self.seq_len, seed=self.seed, text_field=self.text_field
        )

    @abstractmethod
    def solver(self) -> Solver:
        """The solver for this pass's options."""

    def requires(self, program: Program) -> None:
        """There are projections, and the scope matches some.

        Raises:
            PreconditionError: refusals 1, 4 and 5.
            UsageError, PlanError: refusals 2 and 3; the forward precision is higher than the model's.
        """
        require_lifted(program, self.name)
        names = called_projections(program.graph_module)
        experts = any(isinstance(get_attribute(program.graph_module, name), GroupedLinear) for name in names)
        if experts and not any(isinstance(group, ExpertGroup) for group in program.groups):
            raise PreconditionError(
                f"{self.name}: the model has experts, and nobody has looked for their routers, which would be pruned "
                "too: run locate_attention, locate_mlp, locate_hidden and locate_experts first"
            )
        if self.needs_data:
            self._dtype(program)
            if program.source is not None:
                check_method(self, program.source.model_class, program.source.config)
            text_samples(program.interface, torch.zeros(1, self.seq_len, dtype=torch.long))
            if program.source is None:
                raise PreconditionError(f"{self.name} runs calibration text: it needs a Hugging Face model")

    def targets(self, program: Program) -> dict[str, Sparsity]:
        """The projections to prune, and how far; see `fxprune.weights.scope.targets_of`."""
        return targets_of(
            program,
            self.wanted,
            include=self.include,
            exclude=self.exclude,
            per_module=read_per_module(self.per_module),
            exclude_lm_head=self.exclude_lm_head,
        )

    def call(self, program: Program) -> PassResult:
        """Prune; masks are left in `Program.weight_masks`, figures in `results["sparsity"]`."""
        targets = self.targets(program)
        seconds: dict[str, float] = {}
        results: dict[str, Any] = {}
        root = own_projections(program.graph_module, targets)
        details: dict[str, Any] = {}
        if self.needs_data:
            start = time.perf_counter()
            with naming_overflow(program, None):
                tokens, results["calibration"] = self._tokens(program)
            seconds["text"] = time.perf_counter() - start
            with naming_overflow(program, tokens, self._dtype(program)):
                if self.allocation == "loss":
                    start = time.perf_counter()
                    free = {name: one for name, one in targets.items() if not self._is_said(name)}
                    targets = targets | allocate_by_loss(program, free, tokens, self._dtype(program))
                    seconds["allocate"] = time.perf_counter() - start
                layers = LayerwiseSolver(root, self.solver(), targets, program.weight_masks)
                details = self._calibrated(program, layers, text_samples(program.interface, tokens), seconds)
        else:
            layers = LayerwiseSolver(root, self.solver(), targets, program.weight_masks)
            start = time.perf_counter()
            layers.without_data()
            seconds["solve"] = time.perf_counter() - start
        # Forms that units were removed from before have weights that are gone now: nothing equals them any more.
        forms = {name: form for name, form in program.references.items() if name not in {"masked", "unslimmed"}}
        masks = {**program.weight_masks, **layers.masks}
        pruned = program.replace(graph_module=root, weight_masks=masks, references=forms)
        if self.distil_epochs:
            start = time.perf_counter()
            with naming_overflow(program, tokens, self._dtype(program)):
                details["distilled"] = distil_weights(
                    pruned,
                    program,
                    layers.masks,
                    tokens,
                    epochs=self.distil_epochs,
                    rate=self.distil_rate,
                    forward_dtype=self._dtype(program),
                    batch_size=self.batch_size,
                ).to_json()
            seconds["distil"] = time.perf_counter() - start
        sparsity: dict[str, Any] = {**self.figures(root, list(layers.figures.values())), **details, "seconds": seconds}
        pruned = pruned.with_results(**results, sparsity=sparsity)
        summary: dict[str, Any] = {key: sparsity[key] for key in ("target", "removed_share", "mean_error")}
        return PassResult(
            pruned, modified=True, details={**summary, "linears": len(layers.figures), "seconds": seconds}
        )

    def _is_said(self, name: str) -> bool:
        """Whether the user says how much of a projection goes."""
        return any(fnmatchcase(name, pattern) for pattern in self.per_module)

    def _dtype(self, program: Program, device: torch.device | None = None) -> torch.dtype | None:
        device = device or next(program.graph_module.parameters()).device
        return forward_precision(self.forward_dtype, dtype_of(program), device)

    def _tokens(self, program: Program) -> tuple[Tensor, Mapping[str, Any]]:
        device = program.interface.example_inputs["input_ids"].device
        texts = texts_of(program, self.calibration_spec(), device)
        return texts.tokens.to(device), texts.description

    def engine_options(self, program: Program, device: torch.device | None = None) -> EngineOptions:
        """How the engine shall run, on another device than the program's if one is given."""
        return EngineOptions(
            batch_size=self.batch_size,
            work_bytes=self.work_bytes,
            memory_bytes=self.memory_bytes,
            device_bytes=self.device_bytes,
            forward_dtype=self._dtype(program, device),
        )

    def cut(self, root: GraphModule, targets: Iterable[str], samples: Samples) -> Cut:
        """The graph in stages."""
        return cut_stages(
            root, targets, samples.varying, true_sequential=self.true_sequential, replay=self.inputs == "pruned"
        )

    def _calibrated(
        self, program: Program, layers: LayerwiseSolver, samples: Samples, seconds: dict[str, float]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        cut = self.cut(layers.root, layers.targets, samples)
        seconds["cut"] = time.perf_counter() - start
        engine = CalibrationEngine(cut, samples, self.engine_options(program))
        with track(f"{self.name}: stages", len(cut.stages)) as advance:
            engine.run(layers, on_stage=advance)
        details, parts = details_of(engine, layers, dtype_of(program))
        seconds |= parts
        return details

    def figures(self, root: GraphModule, figures: Sequence[LayerFigures]) -> dict[str, Any]:
        """The report's `sparsity` section."""
        weights = sum(math.prod(f.shape) for f in figures)
        removed = sum(f.removed * math.prod(f.shape) for f in figures)
        return {
            "method": self.name,
            "target": self.wanted.describe(),
            "allocation": self.allocation,
            "removed_share": removed / weights,
            "weights": weights,
            "pruned_linears": len(figures),
            "dense_linears": [name for name in called_projections(root) if name not in {f.name for f in figures}],
            "mean_error": sum(f.error for f in figures) / len(figures),
            "linears": [figure.to_json() for figure in figures],
            "speed": f"{NO_SPEED_UP}; {_HOW_TO_MEASURE}",
        }

    def ensures(self, before: Program, after: Program) -> None:
        """Removed weights are exactly zero, shapes are as before.

        Raises:
            PostconditionError: they are not.
        """
        for name, mask in after.weight_masks.items():
            weight = get_attribute(after.graph_module, name).weight
            if weight.shape != get_attribute(before.graph_module, name).weight.shape:
                raise PostconditionError(f"{self.name} changed the shape of {name}")
            if bool(weight.detach()[~mask].count_nonzero()):
                raise PostconditionError(f"{self.name} left weights of {name} that its mask removes")

"""Slimming as a plug-in of `transformers.exporters`: an export of a dense model comes out slim.

    model ── torch.export ──► graph ── SlimQuantizer: lift, locate, prune, mask, slim, compare ──► smaller graph
                                                                                                       │
                              .pt2, ONNX, ExecuTorch, OpenVINO ◄── the exporter goes on ── torch.export┘

The exporters know one kind of plug-in that may transform the traced graph, the quantizer with `quantizes_fx_graph`;
they export what it returns once more and convert it to any format.

Refused:
 1. a plan or a pass that removes nothing;
 2. whole layers of a model with a cache: the exporter has fixed how many layers the cache has before it asks;
 3. a slim graph that does not compute what the masked one does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers.base import ExportQuantizer

from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import ExportError, TraceError, UsageError
from fxprune.core.pass_base import Pass
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.core.program import Source
from fxprune.runtimes.runners import GraphRunner
from fxprune.tracing.pytree_form import program_of_exported
from fxprune.verification.compare import compare_modules, compare_runners
from fxprune.verification.ladder import tolerance_for
from fxprune.weights.base import SparsePass

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import GraphModule

    from fxprune.core.program import Form, Program

__all__ = ["SlimQuantizer"]

_STANDARD = {"input_ids", "attention_mask", "position_ids"}


class SlimQuantizer(ExportQuantizer):  # type: ignore[misc]  # transformers comes without types
    """Prune and slim the graph of any export (see the module's docstring for what it refuses).

    With a cache among the sample inputs, heads that go take their part of it along: after the export, the cache in the
    dictionary of sample inputs has the slim head counts, as the exported program expects them.

    `export_for_generation` exports several graphs of one model, and each is pruned by itself: give it a plan, or a pass
    that looks at no data.

    Example:
        >>> from transformers.exporters import OnnxConfig, OnnxExporter
        >>> config = OnnxConfig(dynamic=True, quantizer=SlimQuantizer(MagnitudeUnits(ratio=0.2)))
        >>> OnnxExporter().export(model, inputs, config).save_pretrained("slim-onnx")

    Args:
        pruning: which units go: a pruning pass such as `ChannelPrune(ratio=0.2)`, or a plan that one has made.
        model: the model that will be exported, for passes that run calibration text; the sample inputs must then have
            a mask, positions and a cache.
        tokenizer: its tokenizer, for calibration text that is not sampled from the model.

    Attributes:
        program: the slim program of the last export, with its plan and history; None before.

    Raises:
        UsageError: `pruning` is neither a pass nor a plan.
    """

    quantizes_fx_graph = True
    supported_formats = tuple(ExportFormat)

    def __init__(self, pruning: Pass | Plan, *, model: nn.Module | None = None, tokenizer: Any = None) -> None:
        super().__init__()
        if not isinstance(pruning, (Pass, Plan)):
            raise UsageError(
                f"SlimQuantizer takes a pruning pass or a Plan, not a {type(pruning).__name__}; such as "
                "ChannelPrune(ratio=0.2) or Plan.of({group: kept units})"
            )
        self.pruning = pruning
        self.program: Program | None = None
        self._source = None
        if model is not None:
            name = getattr(model.config, "_name_or_path", "") or type(model).__name__
            self._source = Source(name=name, config=model.config, model_class=type(model), tokenizer=tokenizer)

    def quantize(self, model: GraphModule, sample_inputs: dict[str, Any], export_format: ExportFormat) -> GraphModule:
        """Slim the graph of an exported program; the exporter calls this.

        Args:
            model: `ExportedProgram.module()`; it is taken apart.
            sample_inputs: what it was exported with, nested; a cache in it is replaced by the slim one.
            export_format: what will be made of it; it makes no difference.

        Returns:
            The slim graph, called as the dense one.

        Raises:
            ExportError: refusals 1 and 2.
            VerificationError: refusal 3.
            FxpruneError: the pass or slimming refused.
        """
        del export_format
        program, convention = program_of_exported(model, sample_inputs)
        program = self._pruned(program.replace(source=self._source))
        _compare(program)
        try:
            slim = convention.restore(program)
        except TraceError as error:
            raise ExportError(
                f"{error}: whole layers cannot be left out of a model that is exported with a cache; use fxprune's own "
                "export, or export without a cache"
            ) from error
        convention.put_inputs(program, sample_inputs)
        self.program = program
        return slim

    def _pruned(self, program: Program) -> Program:
        program = Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
        if isinstance(self.pruning, Plan):
            program = program.replace(plan=self.pruning)
        else:
            program = self.pruning(program).program
        if isinstance(self.pruning, SparsePass):
            return program  # zeros change no shape
        plan = program.plan
        if plan is not None:
            plan.validate(program.groups)
        if plan is None or not any(plan.removed_units(group) for group in program.groups):
            plan_of = "the plan" if isinstance(self.pruning, Plan) else f"the pass {self.pruning.name}"
            raise ExportError(
                f"{plan_of} removes none of the {len(program.groups)} groups' units, so the export would be dense; "
                "name units to remove, or export without SlimQuantizer"
            )
        return Pipeline([build_pass("insert_masks", {}), build_pass("slim", {})])(program).program


def _compare(program: Program) -> None:
    """Slim computes what masked does, over several steps on a cache where there is one."""
    masked = program.references.get("masked")
    if masked is None:
        return
    examples = program.interface.example_inputs
    floating = next(t.dtype for t in program.graph_module.parameters() if t.is_floating_point())
    cache = {entry.input for entry in program.interface.cache}
    if not cache:
        compare_modules(
            "slim = masked", masked.module, program.graph_module, tuple(examples.values()), tolerance_for(floating)
        ).require()
        return
    if not {*examples} - cache <= _STANDARD or "logits" not in program.interface.outputs:
        raise ExportError(
            f"a graph with a cache and the inputs {', '.join({*examples} - cache)} cannot be compared with the masked "
            f"one; export with inputs of {', '.join(sorted(_STANDARD))} and a cache"
        )
    compare_runners(
        "slim = masked",
        _runner(masked),
        GraphRunner(program.graph_module, program.interface, "slim"),
        vocabulary=_vocabulary(program),
        tolerance=tolerance_for(floating),
        device=examples["input_ids"].device,
    ).require()


def _runner(form: Form) -> GraphRunner:
    return GraphRunner(form.module, form.interface, "masked")


def _vocabulary(program: Program) -> int:
    if program.source is not None:
        return int(program.source.config.get_text_config().vocab_size)
    return int(program.interface.example_inputs["input_ids"].max()) + 1

"""Writes the slim model as a Hugging Face checkpoint, and proves that it loads back.

    Program ──► config.json  model.safetensors  tokenizer  generation config  fxprune.json  README.md

Uniform plans load with plain `AutoModelForCausalLM.from_pretrained`, mixed ones too once fxprune is imported. The
program is not changed.

Refused:
 1. a program of a plain `nn.Module` (there is no config to write; export it instead);
 2. an output directory that is not empty, unless `overwrite`, and the directory that the model came from;
 3. masks that are not slimmed yet;
 4. a model whose class transformers does not map: no checkpoint of it could be loaded.

What can be known of these is told before the passes in front of it have worked (`precheck`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from fxprune.checkpoints.checkpoint import ExpectedLogits, save
from fxprune.checkpoints.savable import without_unsavable
from fxprune.core.errors import PreconditionError
from fxprune.core.output import prepare_output
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.precision import coarsest, is_low
from fxprune.core.program import Form
from fxprune.models.savable import require_savable
from fxprune.runtimes.runners import position_ids_from_mask
from fxprune.slimming.norms import rms_norms
from fxprune.tracing.lifted_graphs import state_tensors
from fxprune.tracing.masks import has_masks
from fxprune.tracing.nodes import module_of
from fxprune.tracing.weight_masks import masks_of_state
from fxprune.verification.rounding import in_double

if TYPE_CHECKING:
    from fxprune.core.program import Program

__all__ = ["Save"]


def _epsilons(program: Program) -> dict[str, float]:
    """Epsilons of norms that slimming changed, by the norm's module."""
    lifted = program.references.get("lifted")
    if lifted is None or not isinstance(lifted.module, GraphModule):
        return {}
    before, after = (
        {module_of(norm.site): norm.epsilon for norm in rms_norms(module)}
        for module in (lifted.module, program.graph_module)
    )
    return {name: epsilon for name, epsilon in after.items() if before.get(name) != epsilon}


def _expected(program: Program) -> ExpectedLogits | None:
    """Inputs without a cache, one row left-padded, with the logits of the slim graph, or what it gives first.

    Lower precisions are computed in float64, so that the reloaded model can be compared to 1e-4. They get no padding:
    transformers' eager attention takes its softmax in float32, where the float64 mask of a row that sees nothing is
    infinite, and gives NaN.
    """
    if not program.interface.outputs:
        return None
    first = "logits" if "logits" in program.interface.outputs else program.interface.outputs[0]
    form = Form(program.graph_module, program.interface)
    low = is_low(coarsest(program.graph_module.parameters()))
    form = in_double(form) if low else form
    face = form.interface
    cache = {entry.input for entry in face.cache}
    given = {name: t[:, :, :0] if name in cache else t for name, t in face.example_inputs.items()}
    if cache:
        mask = torch.ones_like(given["input_ids"])
        mask[0, :1] = 0 if not low else 1
        given["attention_mask"] = mask
        if "position_ids" in given:
            given["position_ids"] = position_ids_from_mask(mask, mask.shape[1])
    elif low:
        given |= {name: torch.ones_like(t) for name, t in given.items() if name.endswith("attention_mask")}
    with torch.no_grad():
        outputs = dict(zip(face.outputs, form.module(*given.values()), strict=True))
    inputs = {name: t for name, t in given.items() if name not in cache}
    return ExpectedLogits(inputs, outputs[first], torch.float64 if low else None)


class Save(Pass):
    """Write a checkpoint (see the module's docstring).

    Args:
        out: directory to write; it appears whole or not at all.
        overwrite: whether an earlier output may be replaced.
        max_shard_size: largest weight file, in bytes or such as `"5GB"`; larger models get several files and an index.
    """

    name = "save"

    def __init__(self, *, out: Path | str, overwrite: bool = False, max_shard_size: int | str = "5GB") -> None:
        self.out = str(out)
        self.overwrite = overwrite
        self.max_shard_size = max_shard_size

    def precheck(self, program: Program, pruning: Pass | None = None) -> Program:
        """A checkpoint can be written of this model, and to this place; groups that its class cannot save are left out.

        Raises:
            PreconditionError: refusal 1 or 4.
            OutputError: refusal 2.
        """
        require_savable(program.source)
        self._prepare(program)
        return program if pruning is None else without_unsavable(program, pruning)

    def _prepare(self, program: Program) -> None:
        inputs = [] if program.source is None else [program.source.path]
        prepare_output(self.out, overwrite=self.overwrite, inputs=inputs)

    def requires(self, program: Program) -> None:
        """The program came from a Hugging Face model, is slimmed, and the directory can be used.

        Raises:
            PreconditionError: refusals 1, 3 and 4.
            OutputError: refusal 2.
        """
        require_savable(program.source)
        if has_masks(program.graph_module):
            raise PreconditionError("save writes slim models: run slim before save, masks are still in the graph")
        self._prepare(program)

    def call(self, program: Program) -> PassResult:
        """Save; `details` says which kind of checkpoint it became and why."""
        assert program.source is not None
        info = save(
            {**program.unreached, **state_tensors(program.graph_module)},
            Path(self.out),
            source=program.source,
            plan=program.plan.to_json() if program.plan else {},
            history=[event.to_json() for event in program.history],
            epsilons=_epsilons(program),
            expected=_expected(program),
            weight_masks={
                **program.source.weight_masks,
                **masks_of_state(program.graph_module, program.weight_masks),
            },
            buffers={name for name, _ in program.graph_module.named_buffers(remove_duplicate=False)},
            overwrite=self.overwrite,
            max_shard_size=self.max_shard_size,
        )
        details = {"directory": str(info.directory), "kind": info.kind, "reason": info.reason, "bytes": info.bytes}
        return PassResult(program.with_results(checkpoint=details), modified=True, details=details)

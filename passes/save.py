"""Writes the slim model as a Hugging Face checkpoint, and proves that it loads back.

    Program ──► config.json  model.safetensors  tokenizer  generation config  fxprune.json  README.md

Uniform plans load with plain `AutoModelForCausalLM.from_pretrained`, mixed ones too once fxprune is imported. The
program is not changed.

Refused:
 1. a program of a plain `nn.Module` (there is no config to write; export it instead);
 2. an output directory that is not empty, unless `overwrite`;
 3. masks that are not slimmed yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from fxprune.channels import module_of
from fxprune.checkpoint import ExpectedLogits, save
from fxprune.errors import PreconditionError
from fxprune.graphs import state_tensors
from fxprune.masks import has_masks
from fxprune.norms import rms_norms
from fxprune.output import prepare_output
from fxprune.pass_base import Pass, PassResult
from fxprune.program import Form
from fxprune.runners import position_ids_from_mask
from fxprune.verify import in_double
from fxprune.weight_masks import masks_of_state

if TYPE_CHECKING:
    from fxprune.program import Program

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
    """Inputs without a cache, one row left-padded, with the logits of the slim graph; None where there are none.

    Lower precisions are computed in float64, so that the reloaded model can be compared to 1e-4. They get no padding:
    transformers' eager attention takes its softmax in float32, where the float64 mask of a row that sees nothing is
    infinite, and gives NaN.
    """
    if "logits" not in program.interface.outputs:
        return None
    dtype = next(p.dtype for p in program.graph_module.parameters() if p.is_floating_point())
    form = Form(program.graph_module, program.interface)
    low = dtype not in {torch.float32, torch.float64}
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
    with torch.no_grad():
        outputs = dict(zip(face.outputs, form.module(*given.values()), strict=True))
    inputs = {name: t for name, t in given.items() if name not in cache}
    return ExpectedLogits(inputs, outputs["logits"], torch.float64 if low else None)


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

    def requires(self, program: Program) -> None:
        """The program came from a Hugging Face model, is slimmed, and the directory can be used.

        Raises:
            PreconditionError: refusals 1 and 3.
            OutputError: refusal 2.
        """
        if program.source is None:
            raise PreconditionError("save writes Hugging Face checkpoints; this program came from a plain nn.Module")
        if has_masks(program.graph_module):
            raise PreconditionError("save writes slim models: run slim before save, masks are still in the graph")
        prepare_output(self.out, overwrite=self.overwrite)

    def call(self, program: Program) -> PassResult:
        """Save; `details` says which kind of checkpoint it became and why."""
        assert program.source is not None
        info = save(
            state_tensors(program.graph_module),
            Path(self.out),
            source=program.source,
            plan=program.plan.to_json() if program.plan else {},
            history=[event.to_json() for event in program.history],
            epsilons=_epsilons(program),
            expected=_expected(program),
            weight_masks=masks_of_state(program.graph_module, program.weight_masks),
            overwrite=self.overwrite,
            max_shard_size=self.max_shard_size,
        )
        details = {"directory": str(info.directory), "kind": info.kind, "reason": info.reason, "bytes": info.bytes}
        return PassResult(program.with_results(checkpoint=details), modified=True, details=details)

"""What a slim program must prove: it computes what the masked one does, forward and backward, deployed or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxprune.channels.call import Weight
from fxprune.core.pipeline import Pipeline
from fxprune.core.program import Form
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.slimming.builder import GraphBuilder
from fxprune.slimming.cut import decide
from fxprune.verification.rounding import in_double

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.core.plan import Plan
    from fxprune.core.program import Interface, Program

__all__ = [
    "assert_slim_is_masked",
    "backward_error",
    "forward_error",
    "from_nothing",
    "outputs_of",
    "program_in_double",
    "slimmed",
]


def slimmed(program: Program, plan: Plan) -> Program:
    """The slim program of a plan, with the masked one as its reference."""
    return Pipeline([InsertMasks(), Slim()])(program.replace(plan=plan)).program


def from_nothing(interface: Interface) -> dict[str, Tensor]:
    """Inputs with an empty cache, where dense and slim forms have the same past.

    Every length that may change is one longer than in the sample the graph was traced with: nothing may be baked in.
    """
    cache = {entry.input for entry in interface.cache}
    examples = dict(interface.example_inputs)
    for name, axes in interface.dynamic_axes.items():
        for axis in axes:
            examples[name] = torch.cat([examples[name], examples[name].narrow(axis, 0, 1)], dim=axis)
    if cache:
        new = examples["input_ids"].shape[1]
        examples = {name: t[:, :, :0] if name in cache else t for name, t in examples.items()}
        examples["attention_mask"] = torch.ones_like(examples["attention_mask"][:, :new])
        examples["attention_mask"][0, 0] = 0
    return examples


def _result(module: Any, interface: Interface) -> Tensor:
    """The first output, logits for language models, without the positions of padding."""
    examples = from_nothing(interface)
    outputs = module(*(examples[name] for name in interface.inputs))
    first: Tensor = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    return first[:, 1:] if interface.cache else first


def outputs_of(module: Any, interface: Interface) -> Tensor:
    """The first output on the example inputs from an empty cache, without gradients."""
    with torch.no_grad():
        return _result(module, interface)


def forward_error(program: Program) -> float:
    """Largest difference of an output between slim and masked, relative to the largest masked output."""
    masked = program.references["masked"]
    expected = outputs_of(masked.module, masked.interface)
    given = outputs_of(program.graph_module, program.interface)
    return float((expected - given).abs().max() / expected.abs().max())


def _gradients(module: GraphModule, interface: Interface) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, and the gradients of a fixed random combination of the outputs, by name."""
    parameters = dict(module.named_parameters())
    result = _result(module, interface)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    found = torch.autograd.grad((result * weights).sum(), list(parameters.values()), allow_unused=True)
    return parameters, {n: g for (n, _), g in zip(parameters.items(), found, strict=True) if g is not None}


def assert_slim_is_masked(program: Program, plan: Plan) -> Program:
    """The slim program of a plan, shown to be the masked one: outputs and gradients to 1e-5 in float32.

    Some plans leave a model whose float32 gradients are themselves no better than 1e-4 (a norm over one channel left).
    Those are slimmed once more, in float64 from the start, where nothing but a wrong graph can differ.
    """
    slim = slimmed(program, plan)
    if forward_error(slim) <= 1e-5 and backward_error(slim, program) <= 1e-5:
        return slim
    assert forward_error(slim) <= 1e-3
    dense = program_in_double(program)
    exact = slimmed(dense, plan)
    assert forward_error(exact) <= 1e-10
    assert backward_error(exact, dense) <= 1e-9
    return slim


def program_in_double(program: Program) -> Program:
    """A located program in float64."""
    form = in_double(Form(program.graph_module, program.interface))
    assert isinstance(form.module, GraphModule)
    return program.replace(graph_module=form.module, interface=form.interface)


def backward_error(program: Program, dense: Program) -> float:
    """Largest difference of a gradient between slim and masked, relative to the largest one of its parameter.

    A slim parameter's gradient must be what is kept of the masked one's; that of a norm's weight w' = w/sqrt(r) is
    larger by sqrt(r), as the chain rule says.

    Args:
        program: the slim one.
        dense: the located one it comes from, whose channels are known and say what is kept.
    """
    masked: Form = program.references["masked"]
    module, interface = masked.module, masked.interface
    assert isinstance(module, GraphModule)
    assert program.plan is not None
    channels = dense.channels
    assert channels is not None
    cut = decide(dense.graph_module, channels, dense.groups, program.plan)
    builder = GraphBuilder(dense.graph_module, dense.interface, channels, cut)
    _, whole = _gradients(module, interface)
    parameters, slim = _gradients(program.graph_module, program.interface)
    names = {id(p): n for n, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
    worst = 0.0
    for name, gradient in slim.items():
        owner = names[id(module.get_parameter(name))]
        expected = builder._narrowed(whole[owner], Weight(owner, tuple(whole[owner].shape)))
        expected = expected.reshape(parameters[name].shape)
        if owner in cut.norms:
            expected = expected * cut.norms[owner][1] ** 0.5
        scale = max(float(expected.abs().max()), 1e-2 * _largest(whole))
        worst = max(worst, float((gradient - expected).abs().max()) / scale)
    return worst


def _largest(gradients: Mapping[str, Tensor]) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())

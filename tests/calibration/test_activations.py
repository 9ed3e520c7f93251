"""Calibration statistics: moments of what Linears read, equal to those that hooks on the original model see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.calibration.activations import ChannelStatistics, collect_statistics
from fxprune.core.errors import CalibrationError
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.nodes import get_attribute
from tests.families import located

LINEARS = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
TOKENS = torch.randint(0, 61, (7, 9), generator=torch.Generator().manual_seed(0))


def collect(batch_size: int = 4) -> dict[str, ChannelStatistics]:
    program = located("qwen2")
    return collect_statistics(program.graph_module, program.interface, LINEARS, TOKENS, batch_size=batch_size)


def test_moments_are_those_of_the_original_model() -> None:
    model = located("qwen2").references["eager"].module
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in LINEARS:

        def hook(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=TOKENS)
    for handle in hooks:
        handle.remove()
    for name, statistics in collect().items():
        assert statistics.tokens == TOKENS.numel()
        assert statistics.mean.dtype == torch.float64
        torch.testing.assert_close(statistics.mean, seen[name].mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.variance, seen[name].var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_the_batch_size_changes_nothing_and_progress_is_told() -> None:
    one, all_at_once = collect(1), collect(7)
    for name in LINEARS:
        torch.testing.assert_close(one[name].mean, all_at_once[name].mean, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(one[name].variance, all_at_once[name].variance, rtol=1e-5, atol=1e-8)
    program = located("qwen2")
    done: list[int] = []
    collect_statistics(program.graph_module, program.interface, LINEARS, TOKENS, batch_size=3, on_batch=done.append)
    assert done == [3, 6, 7]


def test_no_logits_are_computed_and_no_hook_is_left() -> None:
    program = located("qwen2")
    called: list[str] = []
    hook = program.graph_module.get_submodule("lm_head").register_forward_pre_hook(lambda *_: called.append("lm_head"))
    try:
        collect()
    finally:
        hook.remove()
    assert called == []
    for name in LINEARS:
        assert not get_attribute(program.graph_module, name)._forward_pre_hooks


def test_activations_that_are_not_finite_name_the_first_linear() -> None:
    program = located("qwen2")
    graph_module = copy_graph_module(program.graph_module)
    wrong = nn.Linear(30, 20, bias=False)
    nn.init.constant_(wrong.weight, float("nan"))
    graph_module.set_submodule("model.layers.1.mlp.up_proj", wrong)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj read NaN or infinite values"):
        collect_statistics(graph_module, program.interface, LINEARS, TOKENS)

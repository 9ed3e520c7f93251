"""RMS norms over fewer channels: the constants that keep them exact, what is recognised and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.slimming.norms import RmsNorm, find_rms_norm, rms_norms
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
EPSILON, WIDTH = 1e-2, 12
KEPT = [0, 2, 3, 7, 8, 10, 11]


class Norm(nn.Module):
    """An RMS norm written in one of the ways that models write it."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WIDTH, generator=generator, dtype=dtype))
        self.form, self.width, self.epsilon = form, WIDTH, EPSILON

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def scaled(m: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.epsilon)


FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], float]] = {
    "llama": (lambda m, x: m.weight * scaled(m, x), 0.0),
    "gemma adds one to its weight": (lambda m, x: scaled(m, x) * (1.0 + m.weight), 1.0),
    "the weight may stand first": (lambda m, x: scaled(m, x) * m.weight, 0.0),
    "square": (lambda m, x: m.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.epsilon)), 0.0),
    "product with itself": (lambda m, x: m.weight * (x * torch.rsqrt((x * x).mean(-1, True) + m.epsilon)), 0.0),
    "casts on the way": (lambda m, x: m.weight * scaled(m, x.float()).to(x.dtype), 0.0),
    "one operator": (lambda m, x: nn.functional.rms_norm(x, (m.width,), m.weight, m.epsilon), 0.0),
}


def found(form: Callable[[Any, Tensor], Tensor], dtype: torch.dtype = torch.float64) -> list[RmsNorm]:
    module = Norm(form, dtype)
    return list(rms_norms(trace(module, example_inputs=(torch.randn(3, WIDTH, dtype=dtype),)).graph_module))


@pytest.mark.parametrize("name", FORMS)
def test_the_constants_of_a_norm_are_read_from_the_graph(name: str) -> None:
    form, offset = FORMS[name]
    (norm,) = found(form)
    assert (norm.epsilon, norm.weight, norm.offset) == (EPSILON, "weight", offset)
    assert norm.site.target in {aten.mean.dim, aten.rms_norm.default}
    assert EPSILON in norm.epsilon_node.args


@pytest.mark.parametrize("name", [name for name in FORMS if "cast" not in name])
def test_a_narrow_norm_with_rescaled_constants_is_the_dense_one_with_zeros(name: str) -> None:
    form, _ = FORMS[name]
    (norm,) = found(form)
    module = Norm(form)
    x = torch.zeros(3, WIDTH, dtype=torch.float64)
    x[:, KEPT] = torch.randn(3, len(KEPT), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = module(x)[:, KEPT]
        ratio = len(KEPT) / WIDTH
        module.weight = nn.Parameter(norm.rescaled(module.weight[KEPT], ratio))
        module.width = len(KEPT)
        module.epsilon = norm.epsilon / ratio
        narrow = module(x[:, KEPT])
    torch.testing.assert_close(narrow, dense, rtol=1e-14, atol=1e-14)


def test_rescaling_keeps_the_dtype_and_computes_in_double() -> None:
    (norm,) = found(FORMS["gemma adds one to its weight"][0], torch.float32)
    weight = torch.tensor([0.125, -0.75], dtype=torch.bfloat16)
    narrow = norm.rescaled(weight, 0.25)
    assert narrow.dtype == torch.bfloat16
    assert narrow.tolist() == [1.25, -0.5]  # (1 + w) * 2 - 1


REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer norm": lambda m, x: nn.functional.layer_norm(x, (m.width,), m.weight),
    "no weight": lambda m, x: scaled(m, x) + m.weight,
    "a mean of no squares": lambda m, x: m.weight * (x * torch.rsqrt(x.mean(-1, keepdim=True) + EPSILON)),
    "cubes": lambda m, x: m.weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPSILON)),
    "no epsilon": lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    "something else is scaled": lambda m, x: m.weight * (x.sin() * torch.rsqrt(x.pow(2).mean(-1, True) + EPSILON)),
    "a weight that is computed": lambda m, x: m.weight.exp() * scaled(m, x),
    "an operator without a weight": lambda m, x: nn.functional.rms_norm(x, (m.width,), None, EPSILON) * m.weight.exp(),
    "root instead of its inverse": lambda m, x: m.weight * (x * torch.sqrt(x.pow(2).mean(-1, True) + EPSILON)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_rms_norm_with_a_weight_is_not_taken_for_one(name: str) -> None:
    assert not found(REFUSED[name])


def test_two_readers_of_one_inverse_root_are_no_norm() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
        return m.weight * (x * root) + root

    assert not found(twice)


def test_the_operators_own_epsilon_is_that_of_the_dtype() -> None:
    (norm,) = found(lambda m, x: nn.functional.rms_norm(x, (m.width,), m.weight), torch.float32)
    assert norm.epsilon == torch.finfo(torch.float32).eps


def test_a_node_that_reduces_nothing_has_no_norm() -> None:
    graph_module = trace(
        Norm(FORMS["llama"][0]), example_inputs=(torch.randn(3, WIDTH, dtype=torch.float64),)
    ).graph_module
    nodes = [
        node for node in graph_module.graph.nodes if node.op == "call_function" and node.target is not aten.mean.dim
    ]
    assert nodes
    assert all(find_rms_norm(graph_module, node) is None for node in nodes)

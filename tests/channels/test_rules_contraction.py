"""The rules for products: matrix, dot and outer products, and fused attention in all its forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fxprune.channels.rules.attention import ATTENTION
from tests.walked import B, S, Walked, pairs, values

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
HEADS, DIM, VALUE_DIM = 3, 4, 5

FUSED: dict[str, Callable[..., Any]] = {
    "math": lambda q, k, v: aten._scaled_dot_product_attention_math.default(q, k, v)[0],
    "flash for cpu": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0],
}


@pytest.mark.parametrize("name", FUSED)
def test_every_fused_attention_makes_a_block_of_each_head(name: str) -> None:
    same = 4 if name == "flash for cpu" else VALUE_DIM
    shape = {"q": values(B, HEADS, S, DIM), "k": values(B, HEADS, S, DIM), "v": values(B, HEADS, S, same)}
    walked = Walked(FUSED[name], free=(0, 2), **shape)
    (site,) = walked.ledger.attentions
    blocks = walked.classes(site.heads)
    assert len(set(blocks)) == HEADS
    for head in range(HEADS):
        parts = (walked.of("q")[0, head, 0], walked.of("k")[0, head, 0], walked.out[0, head, 0])
        assert {cls for part in parts for cls in walked.classes(part)} == {blocks[head]}


def test_all_fused_attentions_have_the_rule() -> None:
    assert {target._overloadpacket.__name__ for target in ATTENTION} == {
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    }


def test_one_tensor_may_be_query_key_and_value() -> None:
    walked = Walked(
        lambda x: aten.scaled_dot_product_attention.default(x, x, x), free=(0, 2), x=values(B, HEADS, S, DIM)
    )
    (site,) = walked.ledger.attentions
    assert len(set(walked.classes(site.heads))) == HEADS
    assert walked.out.shape == (B, HEADS, S, DIM)


def test_a_bias_for_each_head_is_shared_by_the_scores_it_is_added_to() -> None:
    tensors = {name: values(B, HEADS, S, DIM) for name in "qkv"}
    free = dict.fromkeys("qkv", (0, 2)) | {"bias": (2, 3)}
    walked = Walked(
        lambda q, k, v, bias: aten.scaled_dot_product_attention.default(q, k, v, bias),
        free,
        **tensors,
        bias=values(1, HEADS, S, S),
    )
    (site,) = walked.ledger.attentions
    bias = walked.of("bias")[0, :, 0, 0]
    assert len(set(walked.classes(site.heads)) | set(walked.classes(bias))) == 2 * HEADS
    assert pairs(walked.ledger.needs) >= {(int(h), int(b)) for h, b in zip(site.heads, bias, strict=True)}


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "mm": (lambda a, b: aten.mm.default(a, b), (S, 4), (4, S)),
    "bmm": (lambda a, b: aten.bmm.default(a, b), (B, S, 4), (B, 4, S)),
    "mv": (lambda a, b: aten.mv.default(a, b), (S, 4), (4,)),
    "dot": (lambda a, b: aten.dot.default(a, b), (4,), (4,)),
    "inner": (lambda a, b: aten.inner.default(a, b), (S, 4), (B, 4)),
    "matmul of vectors": (lambda a, b: aten.matmul.default(a, b), (4,), (4,)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_channels_that_are_summed_over_on_both_sides_meet_and_form_one_block(name: str) -> None:
    function, first, second = PRODUCTS[name]
    inputs, axes = {"a": values(*first), "b": values(*second)}, {"a": first.index(4), "b": second.index(4)}
    free = {key: tuple(axis for axis in range(tensor.dim()) if axis != axes[key]) for key, tensor in inputs.items()}
    walked = Walked(function, free, **inputs)
    lines = [walked.of(key).movedim(axes[key], -1).reshape(-1, 4)[0] for key in "ab"]
    assert len(set(walked.classes(torch.cat(lines)))) == 1
    assert walked.out.shape == function(*inputs.values()).shape


def test_a_sum_is_added_to_the_product() -> None:
    def add(c: Any, a: Any, b: Any) -> Any:
        return aten.addmm.default(c, a, b)

    walked = Walked(add, free=(0,), c=values(S, 4), a=values(S, 5), b=values(5, 4))
    assert walked.out.shape == (S, 4)
    assert walked.classes(walked.out[0]) == walked.classes(walked.of("c")[0])


def test_an_outer_product_carries_what_both_carry() -> None:
    walked = Walked(lambda x, y: aten.outer.default(x, y), free=(), x=values(2), y=values(3))
    x, y, out = walked.of("x"), walked.of("y"), walked.out
    assert len(set(out.ravel().tolist())) == 6
    expected = {(int(out[i, j]), int(a)) for i in range(2) for j in range(3) for a in (x[i], y[j])}
    assert pairs(walked.ledger.needs) == expected


def test_a_linear_with_a_computed_weight_pins_what_it_reads_and_the_parameters_it_reads_directly() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Any) -> Any:
            return aten.linear.default(x, self.weight)

    walked = Walked(Computed(), x=values(B, S, 3))
    (pin,) = walked.ledger.pins
    assert str(pin) == "linear: its weight is computed, not a parameter"
    weight = {*walked.axis("weight", 0).tolist(), *walked.axis("weight", 1).tolist()}
    assert set(pin.ids.tolist()) == {1, 2, 3} | weight

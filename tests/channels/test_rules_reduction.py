"""The rules for reductions, norms and sums along axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.walked import B, S, Walked, values

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten

OVER_CHANNELS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: aten.sum.dim_IntList(x, [-1]),
    "amax": lambda x: aten.amax.default(x, [2]),
    "var": lambda x: aten.var.correction(x, [-1], correction=0),
    "var.dim": lambda x: aten.var.dim(x, [2], False),
    "logsumexp": lambda x: aten.logsumexp.default(x, [-1]),
    "linalg_vector_norm": lambda x: aten.linalg_vector_norm.default(x, 2, [-1]),
    "norm": lambda x: aten.norm.ScalarOpt_dim(x, 2, [2]),
    "prod": lambda x: aten.prod.dim_int(x, 2),
    "any": lambda x: aten.any.dim(x, 2),
    "count_nonzero": lambda x: aten.count_nonzero.dim_IntList(x, [2]),
    "var_mean": lambda x: aten.var_mean.correction(x, [-1])[1],
    "aminmax": lambda x: aten.aminmax.default(x, dim=2)[0],
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_a_reduction_over_channels_is_a_norm_over_all_of_them(name: str) -> None:
    walked = Walked(OVER_CHANNELS[name], x=values(B, S, 3))
    (norm,) = walked.ledger.norms
    assert (norm.ids.tolist(), norm.width, norm.choice) == ([1, 2, 3], 3, False)
    assert walked.out.shape == (B, S)
    assert len(set(walked.out.ravel().tolist())) == 1


OVER_POSITIONS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: aten.sum.dim_IntList(x, [1]),
    "linalg_vector_norm": lambda x: aten.linalg_vector_norm.default(x, 2, [1]),
    "norm": lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]),
    "var_mean": lambda x: aten.var_mean.correction(x, [1])[0],
    "aminmax": lambda x: aten.aminmax.default(x, dim=1)[1],
    "any": lambda x: aten.any.dims(x, [1]),
}


@pytest.mark.parametrize("name", OVER_POSITIONS)
def test_a_reduction_over_positions_keeps_the_channels(name: str) -> None:
    walked = Walked(OVER_POSITIONS[name], x=values(B, S, 3))
    assert walked.out.tolist() == [[1, 2, 3]] * B
    assert not walked.ledger.norms


def test_a_reduction_over_everything_is_a_norm_too() -> None:
    walked = Walked(lambda x: aten.mean.default(x), x=values(B, S, 3))
    assert [norm.ids.tolist() for norm in walked.ledger.norms] == [[1, 2, 3]]
    assert walked.out.shape == ()


def test_every_distinct_set_of_channels_has_a_norm_of_its_own() -> None:
    walked = Walked(lambda x: aten.mean.dim(x, [-1]), x=values(B, S, 2, 3))
    assert [norm.ids.tolist() for norm in walked.ledger.norms] == [[1, 2, 3], [4, 5, 6]]
    assert walked.out[0, 0].tolist() == [7, 8]


@pytest.mark.parametrize("softmax", [aten._safe_softmax.default, aten.special_softmax.default, aten.log_softmax.int])
def test_a_softmax_along_channels_is_a_choice(softmax: Any) -> None:
    walked = Walked(lambda x: softmax(x, -1), x=values(B, S, 3))
    assert [(norm.choice, norm.ids.tolist()) for norm in walked.ledger.norms] == [(True, [1, 2, 3])]
    assert not walked.ledger.pins
    assert torch.equal(walked.out, walked.of("x"))


@pytest.mark.parametrize("along", [aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default])
def test_sums_along_positions_keep_channels_and_along_channels_pin_them(along: Any) -> None:
    walked = Walked(lambda x: along(x, 1), x=values(B, S, 3))
    assert torch.equal(walked.out, walked.of("x"))
    (pin,) = Walked(lambda x: along(x, 2), x=values(B, S, 3)).ledger.pins
    assert (pin.ids.tolist(), pin.reason) == ([1, 2, 3], "mixes channels along an axis")


def test_differences_of_positions_are_one_fewer() -> None:
    walked = Walked(lambda x: aten.diff.default(x, 1, 1), x=values(B, S, 3))
    assert walked.out.tolist() == [[[1, 2, 3]] * (S - 1)] * B


def test_a_triangle_of_positions_keeps_channels_and_one_of_channels_pins_them() -> None:
    walked = Walked(lambda x: aten.tril.default(x), free=(0, 2, 3), x=values(B, 4, S, S))
    assert torch.equal(walked.out, walked.of("x"))
    (pin,) = Walked(lambda x: aten.tril.default(x), x=values(B, S, 3)).ledger.pins
    assert pin.op == "tril"


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: aten.layer_norm.default(x, [2, 3]),
        lambda x: aten.native_layer_norm.default(x, [2, 3], None, None, 1e-5)[0],
        lambda x: aten.rms_norm.default(x, [2, 3]),
    ],
    ids=["layer_norm", "native_layer_norm", "rms_norm"],
)
def test_a_norm_over_two_axes_is_over_all_their_channels(norm: Callable[[Any], Any]) -> None:
    walked = Walked(norm, x=values(B, S, 2, 3))
    (site,) = walked.ledger.norms
    assert (site.ids.tolist(), site.width) == ([1, 2, 3, 4, 5, 6], 6)
    assert torch.equal(walked.out, walked.of("x"))

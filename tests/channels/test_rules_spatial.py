"""The rules for convolutions, pooling and batch norms: channels on axis 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.walked import Walked, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

aten = torch.ops.aten
FREE = (0, 2, 3)


class Conv(nn.Module):
    """A convolution of images, or of sequences."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1, *, bias: bool = True, dims: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs // groups, *[2] * dims))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.groups, self.dims = groups, dims

    def forward(self, x: Any) -> Any:
        options = ([1] * self.dims, [0] * self.dims, [1] * self.dims, self.groups)
        convolution = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[self.dims]
        return convolution(x, self.weight, self.bias, *options)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_is_a_linear_at_every_position(dims: int) -> None:
    x = values(2, 3, *[4] * dims)
    walked = Walked(Conv(3, 5, dims=dims), free=(0, 2, 3, 4)[: dims + 1], x=x)
    rows, columns = walked.axis("weight", 0), walked.axis("weight", 1)
    first = walked.out.movedim(1, -1).reshape(-1, 5)
    assert walked.classes(first[0]) == walked.classes(rows) == walked.classes(walked.axis("bias", 0))
    assert bool((first == first[0]).all())
    assert walked.classes(columns) == walked.classes([1, 2, 3])
    assert len(set(walked.classes([*rows, *columns]))) == 8
    assert all(axis.role == "" for axis in walked.ledger.axes.values())  # no Linear: masks cannot stand on its input
    assert {pin.op for pin in walked.map.pins} == {"placeholder", "output"}


def test_a_filter_for_each_channel_goes_with_it() -> None:
    walked = Walked(Conv(3, 3, groups=3, dims=1), free=(0, 2), x=values(2, 3, 6))
    line = walked.out[0, :, 0]
    assert walked.classes(line) == walked.classes([1, 2, 3]) == walked.classes(walked.axis("weight", 0))
    assert walked.classes(walked.axis("bias", 0)) == walked.classes([1, 2, 3])
    assert len(set(walked.classes([1, 2, 3]))) == 3


def test_other_groups_pin_inputs_and_rows() -> None:
    walked = Walked(Conv(4, 6, groups=2), free=FREE, x=values(2, 4, 3, 3))
    assert walked.result is None
    pinned = {int(i) for pin in walked.ledger.pins for i in pin.ids}
    assert {1, 2, 3, 4, *walked.axis("weight", 0).tolist()} <= pinned
    assert "equally many channels of every group would have to go" in [pin.reason for pin in walked.ledger.pins]


def test_an_image_whose_every_pixel_is_a_channel_is_pinned_with_the_columns_and_puts_out_rows() -> None:
    walked = Walked(Conv(3, 5), free=(0,), x=values(2, 3, 4, 4))
    rows, columns = walked.axis("weight", 0), walked.axis("weight", 1)
    assert walked.classes(walked.out[0, :, 0, 0]) == walked.classes(rows)
    reasons = {pin.reason: set(pin.ids.tolist()) for pin in walked.ledger.pins}
    assert reasons["its channels differ from position to position"] == set(range(1, 3 * 4 * 4 + 1))
    assert reasons["reads values that carry no traced channels"] == set(columns.tolist())


POOLS: dict[str, Callable[[Any], Any]] = {
    "avg_pool2d": lambda x: aten.avg_pool2d.default(x, [2, 2]),
    "max_pool2d": lambda x: aten.max_pool2d.default(x, [2, 2]),
    "adaptive_avg_pool2d": lambda x: aten.adaptive_avg_pool2d.default(x, [1, 1]),
    "upsample_nearest2d": lambda x: aten.upsample_nearest2d.default(x, [8, 8]),
    "upsample_bilinear2d": lambda x: aten.upsample_bilinear2d.vec(x, [8, 8], False, None),
    "avg_pool1d": lambda x: aten.avg_pool1d.default(aten.flatten.using_ints(x, 2), [2]),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_keeps_channels(name: str) -> None:
    walked = Walked(POOLS[name], free=FREE, x=values(2, 3, 4, 4))
    lines = walked.out.movedim(1, -1).reshape(-1, 3)
    assert {tuple(line) for line in lines.tolist()} == {(1, 2, 3)}
    assert not walked.ledger.pins


def test_pooling_over_channels_pins_them() -> None:
    (pin,) = Walked(lambda x: aten.avg_pool1d.default(x, [2]), free=(0, 1), x=values(2, 3, 4)).ledger.pins
    assert (pin.ids.tolist(), pin.reason) == ([1, 2, 3, 4], "its channels differ from position to position")


class BatchNorm(nn.Module):
    """Weight, bias and statistics of three channels."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Any) -> Any:
        return aten.batch_norm.default(x, self.weight, self.shift, self.mean, self.variance, False, 0.1, 1e-5, False)


def test_weights_and_statistics_of_a_batch_norm_go_with_the_channels() -> None:
    walked = Walked(BatchNorm(), free=FREE, x=values(2, 3, 4, 4))
    assert torch.equal(walked.out, walked.of("x"))
    for name in ("weight", "shift", "mean", "variance"):
        assert walked.classes(walked.axis(name, 0)) == walked.classes([1, 2, 3])
    assert not walked.ledger.norms


def test_a_group_norm_pins_channels() -> None:
    (pin,) = Walked(lambda x: aten.group_norm.default(x, 2), free=FREE, x=values(2, 4, 3, 3)).ledger.pins
    assert (pin.op, pin.ids.tolist()) == ("group_norm", [1, 2, 3, 4])

"""The rules for movement operators: every one does to the ids what it does to the values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.channels.rules.movement import MOVEMENT
from tests.walked import B, S, Walked, pairs, values

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten

MOVES: dict[str, Callable[[Any], Any]] = {
    "view_copy": lambda x: aten.view_copy.default(x, [B, S, 24]),
    "_unsafe_view": lambda x: aten._unsafe_view.default(x, [B, S, 4, 6]),
    "flatten": lambda x: aten.flatten.using_ints(x, 2),
    "unflatten": lambda x: aten.unflatten.int(x, 3, [2, 3]),
    "ravel": lambda x: aten.ravel.default(x),
    "squeeze.dims": lambda x: aten.squeeze.dims(aten.unsqueeze.default(x, 2), [2]),
    "squeeze_copy": lambda x: aten.squeeze_copy.dim(aten.unsqueeze_copy.default(x, 2), 2),
    "permute_copy": lambda x: aten.permute_copy.default(x, [3, 0, 2, 1]),
    "transpose_copy": lambda x: aten.transpose_copy.int(x, -1, -2),
    "t": lambda x: aten.t.default(aten.select.int(aten.select.int(x, 0, 0), 0, 0)),
    "t_copy": lambda x: aten.t_copy.default(aten.select_copy.int(aten.select_copy.int(x, 0, 0), 0, 0)),
    "mT": lambda x: aten.mT.default(x),
    "numpy_T": lambda x: aten.numpy_T.default(x),
    "moveaxis": lambda x: aten.moveaxis.int(x, 3, 1),
    "movedim": lambda x: aten.movedim.intlist(x, [3, 2], [0, 1]),
    "swapaxes": lambda x: aten.swapaxes.default(x, 2, 3),
    "fliplr": lambda x: aten.fliplr.default(x),
    "rot90": lambda x: aten.rot90.default(x, 1, [2, 3]),
    "pixel_shuffle": lambda x: aten.pixel_shuffle.default(aten.view.default(x, [B, 4, 6, 3]), 2),
    "pixel_unshuffle": lambda x: aten.pixel_unshuffle.default(x, 2),
    "channel_shuffle": lambda x: aten.channel_shuffle.default(aten.transpose.int(x, 1, 2), 2),
    "slice with a step": lambda x: aten.slice.Tensor(x, 3, 1, 9223372036854775807, 2),
    "slice_copy": lambda x: aten.slice_copy.Tensor(x, 2, 1, 3),
    "narrow": lambda x: aten.narrow.default(x, 3, 2, 3),
    "narrow_copy": lambda x: aten.narrow_copy.default(x, 3, 2, 3),
    "split_copy": lambda x: aten.split_copy.Tensor(x, 4, 3)[1],
    "unsafe_split": lambda x: aten.unsafe_split.Tensor(x, 4, 3)[0],
    "split_with_sizes_copy": lambda x: aten.split_with_sizes_copy.default(x, [1, 2, 3], 3)[2],
    "unsafe_chunk": lambda x: aten.unsafe_chunk.default(x, 3, 3)[1],
    "tensor_split": lambda x: aten.tensor_split.sections(x, 4, 3)[1],
    "tensor_split at indices": lambda x: aten.tensor_split.indices(x, [1, 4], 3)[1],
    "hsplit": lambda x: aten.hsplit.array(aten.select.int(x, 1, 0), [1, 3])[1],
    "dsplit": lambda x: aten.dsplit.int(x, 2)[1],
    "unbind": lambda x: aten.unbind.int(x, 2)[3],
    "unbind_copy": lambda x: aten.unbind_copy.int(x, 3)[1],
    "diagonal": lambda x: aten.diagonal.default(x, 1, 2, 3),
    "unfold": lambda x: aten.unfold.default(x, 3, 2, 2),
    "concat": lambda x: aten.concat.default([x, aten.flip.default(x, [3])], 2),
    "hstack": lambda x: aten.hstack.default([x, x]),
    "dstack": lambda x: aten.dstack.default([x, aten.flip.default(x, [2])]),
    "column_stack": lambda x: aten.column_stack.default([x, x]),
    "expand_as": lambda x: aten.expand_as.default(aten.narrow.default(x, 1, 0, 1), x),
    "slice_scatter": lambda x: aten.slice_scatter.default(x, aten.slice.Tensor(x, 3, 0, 2), 3, 4, 6),
    "select_scatter": lambda x: aten.select_scatter.default(x, aten.select.int(x, 2, 3), 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_movement_does_to_the_ids_what_it_does_to_the_values(name: str) -> None:
    walked = Walked(MOVES[name], x=values(B, S, 4, 6))
    expected = MOVES[name](torch.arange(1, 25).reshape(4, 6).expand(B, S, 4, 6).contiguous())
    assert torch.equal(walked.out, expected)
    assert not walked.ledger.merges
    assert not walked.ledger.needs
    assert {pin.op for pin in walked.map.pins} == {"placeholder", "output"}


def test_every_movement_operator_is_an_operator_that_moves() -> None:
    assert len(MOVEMENT) > 80
    assert all(isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable for target in MOVEMENT)


def test_a_grid_of_positions_repeats_the_ids_of_its_lines() -> None:
    walked = Walked(lambda x, y: aten.meshgrid.default([x, y])[1], free=(), x=values(2), y=values(3))
    assert walked.out.tolist() == [[3, 4, 5]] * 2
    assert not walked.ledger.needs


def test_positions_that_are_repeated_are_no_copies_of_channels() -> None:
    walked = Walked(lambda x: aten.repeat.default(x, [4, 1]), free=(0,), x=values(S, 3))
    assert walked.out.tolist() == [[1, 2, 3]] * (4 * S)
    assert not walked.ledger.needs
    copies = Walked(lambda x: aten.repeat.default(x, [1, 2]), free=(0,), x=values(S, 3))  # channels are repeated
    assert len(set(copies.out[0].tolist())) == 6
    assert pairs(copies.ledger.needs) == {(int(c), o) for c, o in zip(copies.out[0], [1, 2, 3] * 2, strict=True)}


def test_channels_that_stand_side_by_side_on_positions_are_the_same() -> None:
    def tokens(first: Any, others: Any) -> Any:
        return aten.cat.default([first, others], 1)

    walked = Walked(tokens, first=values(B, 1, 3), others=values(B, S, 3))
    assert walked.out.tolist() == [[[1, 2, 3]] * (S + 1)] * B
    assert pairs(walked.ledger.merges) == {(1, 4), (2, 5), (3, 6)}
    channels = Walked(lambda a, b: aten.cat.default([a, b], 2), a=values(B, S, 2), b=values(B, S, 2))
    assert not channels.ledger.merges
    single = Walked(lambda x: aten.cat.default([aten.split.Tensor(x, 1, 2)[i] for i in range(3)], 2), x=values(B, S, 3))
    assert single.out[0, 0].tolist() == [1, 2, 3]
    assert not single.ledger.merges


def test_padding_of_channels_stays_as_long_as_one_of_them_does() -> None:
    walked = Walked(lambda x: aten.constant_pad_nd.default(x, [1, 2], 0.5), x=values(B, S, 3))
    first, *own, last, again = walked.out[0, 0].tolist()
    assert own == [1, 2, 3]
    assert first == last == again == 4
    assert pairs(walked.ledger.needs) == {(1, 4), (2, 4), (3, 4)}
    assert not walked.ledger.pins


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
def test_padding_of_positions_changes_no_channels(mode: str) -> None:
    walked = Walked(lambda x: aten.pad.default(x, [0, 0, 2, 1], mode), x=values(B, S, 3))
    assert walked.out.tolist() == [[[1, 2, 3]] * (S + 3)] * B
    assert not walked.ledger.needs
    assert not walked.ledger.pins


def test_padding_that_repeats_channels_pins_them() -> None:
    walked = Walked(lambda x: aten.reflection_pad1d.default(x, [1, 1]), x=values(B, S, 3))
    (pin,) = walked.ledger.pins
    assert (pin.ids.tolist(), pin.reason) == ([1, 2, 3], "repeats or cuts off channels at an edge")


def test_two_channels_of_one_complex_number_go_together() -> None:
    def rotate(x: Any) -> Any:
        return aten.view_as_real.default(aten.view_as_complex.default(aten.view.default(x, [B, S, 3, 2])))

    walked = Walked(rotate, x=values(B, S, 6))
    assert walked.out[0, 0].tolist() == [[1, 1], [3, 3], [5, 5]]
    assert pairs(walked.ledger.merges) == {(1, 2), (3, 4), (5, 6)}
    assert len(set(walked.classes([1, 2, 3, 4, 5, 6]))) == 3


def test_polar_numbers_of_positions_leave_channels_alone() -> None:
    def rotate(x: Any, angle: Any) -> Any:
        number = aten.polar.default(aten.ones_like.default(angle), angle)
        return aten.mul.Tensor(aten.view_as_complex.default(x), number)

    walked = Walked(rotate, free=(0, 1, 2), x=values(B, S, 3, 2), angle=values(B, S, 3))
    assert int(walked.out[0, 0, 0]) == 1
    assert {pin.op for pin in walked.map.pins} == {"placeholder", "output"}


class Selected(nn.Module):
    """Constant positions along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 0]))

    def forward(self, x: Any) -> Any:
        return aten.index_select.default(x, 2, self.order)


def test_constant_positions_pick_ids_and_computed_ones_pin() -> None:
    assert Walked(Selected(), x=values(B, S, 3)).out.tolist() == [[[3, 1, 1]] * S] * B
    computed = Walked(lambda x, i: aten.index_select.default(x, 2, i), x=values(B, S, 3), i=torch.tensor([1, 0]))
    (pin,) = computed.ledger.pins
    assert (pin.ids.tolist(), pin.reason) == ([1, 2, 3], "picks channels by computed positions")
    rows = Walked(lambda x, i: aten.index_select.default(x, 1, i), x=values(B, S, 3), i=torch.tensor([1, 0]))
    assert rows.out.tolist() == [[[1, 2, 3]] * 2] * B


def test_as_strided_has_no_rule_and_pins() -> None:
    walked = Walked(lambda x: aten.as_strided.default(x, [2, 2], [1, 2]), x=values(B, S, 4))
    (pin,) = walked.ledger.pins
    assert (pin.op, pin.ids.tolist(), pin.reason) == ("as_strided", [1, 2, 3, 4], "no rule for this operator")


def test_an_in_place_operator_is_its_functional_form_unless_the_old_name_is_read_again() -> None:
    walked = Walked(lambda x: aten.silu_.default(aten.clone.default(x)), x=values(B, S, 3))
    assert walked.out[0, 0].tolist() == [1, 2, 3]
    assert [site.op for site in walked.ledger.activations] == ["silu_"]

    class Again(nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            x = aten.clone.default(x)
            return aten.add.Tensor(aten.mul_.Tensor(x, y), x)

    walked = Walked(Again(), x=values(B, S, 3), y=values(B, S, 3))
    (pin,) = walked.ledger.pins
    assert (pin.op, pin.reason) == ("mul_", "writes in place into a value that is read again")
    assert np.sort(pin.ids).tolist() == [1, 2, 3, 4, 5, 6]

"""The rules for operators that pick by number: which axes numbers address, and what is written at positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.walked import B, S, Walked, pairs, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.core.channel_ids import Pin

aten = torch.ops.aten
EXPERTS = 4


def only_pin(walked: Walked) -> Pin:
    (pin,) = walked.ledger.pins
    return pin


@pytest.mark.parametrize(
    "choose",
    [
        lambda x: aten.topk.default(x, 2)[1],
        lambda x: aten.max.dim(x, -1)[1],
        lambda x: aten.min.dim(x, -1)[1],
        lambda x: aten.argmax.default(x, -1),
        lambda x: aten.argmin.default(x, -1),
    ],
    ids=["topk", "max", "min", "argmax", "argmin"],
)
def test_what_is_chosen_among_channels_addresses_them(choose: Callable[[Any], Any]) -> None:
    def count(x: Any) -> Any:
        return aten.histc.default(aten.to.dtype(aten.view.default(choose(x), [-1]), torch.float32), EXPERTS, 0, 3)

    walked = Walked(count, x=values(B, S, EXPERTS))
    assert walked.out.tolist() == [1, 2, 3, 4]  # as many bins as channels, one for each
    assert [(site.choice, site.ids.tolist()) for site in walked.ledger.norms] == [(True, [1, 2, 3, 4])]
    assert not walked.ledger.pins


def test_numbers_stay_numbers_of_channels_while_they_are_moved_sorted_and_picked() -> None:
    def move(x: Any, some: Any) -> Any:
        number = aten.view.default(aten.topk.default(x, 2)[1], [-1])
        number = aten.sort.default(aten.cat.default([number, number], 0))[0]
        number = aten.index_select.default(aten.index.Tensor(number, [some]), 0, some)
        return aten.one_hot.default(aten.gather.default(number, 0, some), EXPERTS)

    walked = Walked(move, free={"x": (0, 1), "some": (0,)}, x=values(B, S, EXPERTS), some=torch.tensor([0, 2]))
    assert walked.out.tolist() == [[1, 2, 3, 4]] * 2
    assert not walked.ledger.pins


@pytest.mark.parametrize(
    "order",
    [
        lambda x: aten.sort.default(x)[0],
        lambda x: aten.sort.stable(x, stable=True)[0],
        lambda x: aten.argsort.default(x),
        lambda x: aten.kthvalue.default(x, 2)[0],
        lambda x: aten.median.dim(x, -1)[0],
    ],
    ids=["sort", "stable sort", "argsort", "kthvalue", "median"],
)
def test_an_order_of_all_channels_pins_them(order: Callable[[Any], Any]) -> None:
    assert only_pin(Walked(order, x=values(B, S, 3))).ids.tolist() == [1, 2, 3]


def test_an_order_of_positions_leaves_channels_as_they_are() -> None:
    walked = Walked(lambda x: aten.sort.default(x, 1)[0], x=values(B, S, 3))
    assert walked.out.tolist() == [[[1, 2, 3]] * S] * B
    walked = Walked(lambda x: aten.max.dim(x, 1)[0], x=values(B, S, 3))
    assert walked.out.tolist() == [[1, 2, 3]] * B
    assert not walked.ledger.pins


@pytest.mark.parametrize("choose", [lambda x: aten.topk.default(x, 1)[0], lambda x: aten.max.dim(x, -1, True)[0]])
def test_what_is_chosen_inside_rows_of_channels_speaks_for_the_row(choose: Callable[[Any], Any]) -> None:
    walked = Walked(lambda x: choose(aten.view.default(x, [B, S, 2, 2])), x=values(B, S, EXPERTS))
    assert not walked.ledger.pins
    assert walked.out.tolist() == [[[[5], [6]]] * S] * B  # a channel for each row
    (site,) = walked.ledger.norms
    assert site.choice
    assert site.rows is not None
    assert site.rows.tolist() == [[1, 2], [3, 4]]
    assert pairs(walked.ledger.needs) == {(1, 5), (2, 5), (3, 6), (4, 6)}
    assert [rows.tolist() for rows in walked.ledger.rows] == [[[1, 2], [3, 4]]] * 2  # the view's, and the choice's
    ordered = Walked(lambda x: aten.sort.default(aten.view.default(x, [B, S, 2, 2]))[0], x=values(B, S, EXPERTS))
    assert str(only_pin(ordered)) == "sort: puts channels in an order that depends on their values"


def test_positions_that_one_row_is_chosen_along_are_no_rows() -> None:
    def one_group(x: Any) -> Any:
        return aten.topk.default(aten.view.default(x, [B, S, 1, EXPERTS]), 1)[0]

    walked = Walked(one_group, x=values(B, S, EXPERTS))
    assert not walked.ledger.pins
    assert walked.ledger.norms[0].choice


def test_what_numbers_are_used_for_has_the_axis_that_they_address() -> None:
    def route(x: Any, weights: Any) -> Any:
        number = aten.topk.default(x, 2)[1]
        empty = aten.zeros_like.default(weights)
        return aten.scatter.value(empty, 1, number, 1.0), aten.gather.default(weights, 1, number)

    free = {"x": (0,), "weights": (0, 1)}
    walked = Walked(route, free, x=values(S, EXPERTS), weights=values(S, EXPERTS))
    assert walked.of("scatter_value").tolist() == [[1, 2, 3, 4]] * S


PICKS: dict[str, Callable[..., Any]] = {
    "gather": lambda w, i: aten.gather.default(w, 1, i),
    "take_along_dim": lambda w, i: aten.take_along_dim.default(w, i, 1),
    "index": lambda w, i: aten.index.Tensor(w, [None, aten.view.default(i, [-1])]),
    "index_select": lambda w, i: aten.index_select.default(w, 1, aten.view.default(i, [-1])),
    "scatter": lambda w, i: aten.scatter.value(w, 1, i, 0.0),
}


@pytest.mark.parametrize("name", PICKS)
def test_what_is_picked_by_numbers_is_the_axis_that_they_address(name: str) -> None:
    def pick(x: Any, weights: Any) -> Any:
        return PICKS[name](weights, aten.topk.default(x, 2)[1])

    walked = Walked(pick, free=(0,), x=values(S, EXPERTS), weights=values(S, EXPERTS))
    mine, theirs = walked.of("x")[0], walked.of("weights")[0]
    assert walked.classes(mine) == walked.classes(theirs)
    assert len(set(walked.classes(mine))) == EXPERTS
    assert not walked.ledger.pins


def test_cumulative_counts_stay_one_for_each_channel_and_other_sums_pin() -> None:
    def ends(x: Any) -> Any:
        number = aten.view.default(aten.topk.default(x, 2)[1], [-1])
        return aten.cumsum.default(aten.histc.default(aten.to.dtype(number, torch.float32), EXPERTS, 0, 3), 0)

    walked = Walked(ends, x=values(B, S, EXPERTS))
    assert walked.out.tolist() == [1, 2, 3, 4]
    assert not walked.ledger.pins


def test_counting_values_pins_channels() -> None:
    pin = only_pin(Walked(lambda x: aten.histc.default(x, 3, 0, 2), free=(), x=values(3)))
    assert (pin.ids.tolist(), pin.reason) == ([1, 2, 3], "counts values of channels")


def in_rows(index: Any) -> Any:
    return aten.expand.default(aten.view.default(index, [2, 1]), [2, 3])


WRITES: dict[str, Callable[..., Any]] = {
    "index_add": lambda x, i, y: aten.index_add.default(x, 0, i, y),
    "index_copy": lambda x, i, y: aten.index_copy.default(x, 0, i, y),
    "index_put": lambda x, i, y: aten.index_put.default(x, [i], y),
    "scatter_add": lambda x, i, y: aten.scatter_add.default(x, 0, in_rows(i), y),
    "scatter_reduce": lambda x, i, y: aten.scatter_reduce.two(x, 0, in_rows(i), y, "sum"),
}


@pytest.mark.parametrize("name", WRITES)
def test_rows_that_are_written_at_positions_have_the_channels_of_those_they_replace(name: str) -> None:
    tensors = {"x": values(S, 3), "i": torch.tensor([0, 2]), "y": values(2, 3)}
    walked = Walked(WRITES[name], free=(0,), **tensors)
    assert pairs(walked.ledger.merges) == {(1, 4), (2, 5), (3, 6)}
    assert walked.out.tolist() == [[1, 2, 3]] * S
    channels = Walked(WRITES[name], free=(1,), x=values(3, S), i=torch.tensor([0, 2]), y=values(2, 3))
    assert only_pin(channels).reason == "writes to channels at computed positions"


def test_a_write_into_an_empty_tensor_brings_its_channels() -> None:
    def collect(i: Any, y: Any) -> Any:
        return aten.index_put.default(aten.new_zeros.default(y, [5, 3]), [i], y)

    walked = Walked(collect, free=(0,), i=torch.tensor([0, 2]), y=values(2, 3))
    assert walked.out.tolist() == [[1, 2, 3]] * 5


def test_masked_scatter_has_no_rule_and_pins() -> None:
    def scatter(x: Any, y: Any) -> Any:
        return aten.masked_scatter.default(x, aten.gt.Scalar(x, 0), y)

    pin = only_pin(Walked(scatter, x=values(B, S, 2), y=values(B, S, 2)))
    assert (pin.op, sorted(pin.ids.tolist())) == ("masked_scatter", [1, 1, 2, 2, 3, 4])


class Table(nn.Module):
    """Looks up rows of a parameter with some operator."""

    def __init__(self, look_up: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.table, self.look_up = nn.Parameter(torch.zeros(7, 3)), look_up

    def forward(self, x: Any) -> Any:
        return self.look_up(self.table, x)


@pytest.mark.parametrize(
    "look_up",
    [lambda t, x: aten.index.Tensor(t, [x]), lambda t, x: aten.index_select.default(t, 0, x)],
    ids=["index", "index_select"],
)
def test_a_table_of_biases_for_each_head_has_columns_and_pinned_rows(look_up: Callable[[Any, Any], Any]) -> None:
    walked = Walked(Table(look_up), free=(0,), x=torch.tensor([0, 4]))
    assert walked.out.tolist() == [walked.axis("table", 1).tolist()] * 2
    assert only_pin(walked).ids.tolist() == walked.axis("table", 0).tolist()


def test_embedding_bag_has_no_rule_and_pins_its_table() -> None:
    def bag(table: Any, x: Any) -> Any:
        return aten.embedding_bag.default(table, x, aten.zeros_like.default(aten.slice.Tensor(x, 0, 0, 1)))[0]

    walked = Walked(Table(bag), free=(0,), x=torch.tensor([0, 4]))
    assert walked.result is None
    pinned = {*walked.axis("table", 0).tolist(), *walked.axis("table", 1).tolist()}
    assert set(only_pin(walked).ids.tolist()) == pinned

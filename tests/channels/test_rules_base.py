"""The rule table of channel tracing, one family of operators at a time: ids in, ids and relations out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.channels.relations import combine, distinct_rows, reduce_last
from fxprune.channels.walk import walk
from fxprune.core.channel_ids import ChannelLedger, ChannelMap
from fxprune.core.program import Interface
from tests.walked import B, S, Walked, pairs, values

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


# --- inputs and movement --------------------------------------------------------------------------------------------


def test_a_graph_input_has_one_id_per_element_of_its_static_axes() -> None:
    walked = Walked(lambda x: aten.alias.default(x), x=values(B, S, 4))
    assert torch.equal(walked.of("x"), torch.tensor([1, 2, 3, 4]).expand(B, S, 4))
    assert [str(pin) for pin in walked.map.pins] == [
        "placeholder in x: the caller supplies this axis",
        "output: the caller receives this axis",
    ]


def test_integer_inputs_carry_no_channels() -> None:
    walked = Walked(lambda x: aten.alias.default(x), x=torch.zeros(B, S, 4, dtype=torch.long))
    assert walked.result is None
    assert walked.ledger.next_id == 1


MOVES: dict[str, Callable[[Any], Any]] = {
    "view": lambda x: aten.view.default(x, [B, S, 2, 3, 2]),
    "reshape": lambda x: aten.reshape.default(aten.transpose.int(x, 2, 3), [B, S, 12]),
    "transpose": lambda x: aten.transpose.int(x, 1, 2),
    "permute": lambda x: aten.permute.default(x, [0, 2, 3, 1]),
    "slice": lambda x: aten.slice.Tensor(x, 3, 1, 6, 2),
    "select": lambda x: aten.select.int(x, 2, 1),
    "split": lambda x: aten.split.Tensor(x, 4, 3)[1],
    "chunk": lambda x: aten.chunk.default(x, 2, -1)[1],
    "cat": lambda x: aten.cat.default([aten.slice.Tensor(x, 3, 4, 6), aten.slice.Tensor(x, 3, 0, 2)], 3),
    "stack": lambda x: aten.stack.default([x, x], 2),
    "unsqueeze": lambda x: aten.unsqueeze.default(x, 2),
    "flip": lambda x: aten.flip.default(x, [3]),
    "roll": lambda x: aten.roll.default(x, [2], [3]),
}


@pytest.mark.parametrize("name", MOVES)
def test_movement_does_to_the_ids_what_it_does_to_the_values(name: str) -> None:
    walked = Walked(MOVES[name], x=values(B, S, 2, 6))
    expected = MOVES[name](torch.arange(1, 13).reshape(2, 6).expand(B, S, 2, 6).contiguous())
    assert torch.equal(walked.out, expected)
    assert not walked.ledger.merges
    assert not walked.ledger.needs


def test_casts_hand_ids_on_and_creation_makes_none() -> None:
    walked = Walked(
        lambda x: aten.add.Tensor(
            aten.add.Tensor(aten.to.dtype(x, torch.float64), aten.ones_like.default(x)), aten.new_ones.default(x, [3])
        ),
        x=values(B, S, 3),
    )
    assert torch.equal(walked.of("to_dtype"), walked.of("x"))
    assert torch.equal(walked.of("ones_like_default"), walked.of("x"))  # as long as x is, along the same channels
    assert walked.by_node["new_ones_default"] is None
    assert torch.equal(walked.out, walked.of("x"))


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: aten.reshape.default(
            aten.expand.default(aten.unsqueeze.default(x, 2), [B, 2, 3, S, 4]), [B, 6, S, 4]
        ),
        lambda x: aten.repeat_interleave.self_int(x, 3, 1),
    ],
    ids=["unsqueeze, expand, reshape", "repeat_interleave"],
)
def test_each_copy_of_a_kv_head_is_a_channel_of_its_own_that_needs_the_original(copy: Callable[[Any], Any]) -> None:
    walked = Walked(copy, free=(0, 2), x=values(B, 2, S, 4))  # (batch, KV heads, sequence, head_dim)
    copies = walked.out[0, :, 0]  # (6 heads, head_dim)
    originals = walked.of("x")[0, :, 0].repeat_interleave(3, 0)
    assert walked.out.shape == (B, 6, S, 4)
    assert bool((walked.out == copies[None, :, None]).all())
    assert len(set(copies.ravel().tolist())) == 24
    needed = pairs(walked.ledger.needs)
    assert needed == {(int(c), int(o)) for c, o in zip(copies.ravel(), originals.ravel(), strict=True)}


def test_expanding_along_an_axis_that_may_change_makes_no_copies() -> None:
    def broadcast(x: Any, y: Any) -> Any:
        return aten.expand.default(aten.unsqueeze.default(x, 0), [aten.sym_size.int(y, 0), -1, -1])

    walked = Walked(broadcast, free=(0,), x=values(S, 4), y=values(B, 4))
    assert torch.equal(walked.out, walked.of("x").expand(B, S, 4))
    assert not walked.ledger.needs


# --- elementwise ----------------------------------------------------------------------------------------------------


def test_elementwise_merges_channels_that_meet_one_to_one() -> None:
    walked = Walked(lambda x, y: aten.mul.Tensor(x, y), x=values(B, S, 3), y=values(B, S, 3))
    assert pairs(walked.ledger.merges) == {(1, 4), (2, 5), (3, 6)}
    assert not walked.ledger.needs
    assert torch.equal(walked.out, walked.of("x"))


def test_a_weight_that_all_heads_share_is_needed_by_each_and_merges_nothing() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Any) -> Any:
            return aten.mul.Tensor(x, self.weight)

    walked = Walked(Norm(), x=values(B, S, 3, 2))
    heads, weight = walked.of("x")[0, 0], walked.axis("weight", 0)
    assert not walked.ledger.merges
    assert pairs(walked.ledger.needs) == {(int(heads[h, d]), int(weight[d])) for h in range(3) for d in range(2)}
    assert torch.equal(walked.out, walked.of("x"))


def test_channels_that_meet_many_to_many_become_new_ones_that_need_both() -> None:
    walked = Walked(
        lambda x, y: aten.add.Tensor(aten.unsqueeze.default(x, 3), aten.unsqueeze.default(y, 2)),
        x=values(B, S, 2),
        y=values(B, S, 3),
    )
    x, y, out = walked.of("x")[0, 0], walked.of("y")[0, 0], walked.out[0, 0]
    assert out.shape == (2, 3)
    assert len(set(out.ravel().tolist())) == 6
    assert not set(out.ravel().tolist()) & {*x.tolist(), *y.tolist()}
    expected = {(int(out[i, j]), int(a)) for i in range(2) for j in range(3) for a in (x[i], y[j])}
    assert pairs(walked.ledger.needs) == expected


MEETINGS: dict[str, tuple[Tensor, Tensor]] = {  # ids of (batch, sequence, heads, channels)
    "one to one": (torch.tensor([1, 2]).expand(B, S, 1, 2), torch.tensor([3, 4]).expand(B, S, 1, 2)),
    "many to one": (torch.arange(1, 7).reshape(3, 2).expand(B, S, 3, 2), torch.tensor([7, 8]).expand(B, S, 3, 2)),
    "many to many": (torch.tensor([[1], [2]]).expand(B, S, 2, 3), torch.tensor([3, 0, 4]).expand(B, S, 2, 3)),
    "along the last axis": (torch.tensor([[1], [2]]).expand(B, S, 2, 3), torch.tensor([[3], [4]]).expand(B, S, 2, 3)),
    "one varies": (torch.arange(1, 4).reshape(1, S, 1, 1).expand(B, S, 1, 1), torch.tensor([4]).expand(B, S, 1, 1)),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_what_repeats_meets_as_if_every_copy_were_looked_at(name: str) -> None:
    found: list[Any] = []
    for a, b in (MEETINGS[name], [ids.contiguous() for ids in MEETINGS[name]]):
        call: Any = SimpleNamespace(ledger=ChannelLedger(next_id=9))
        out = combine(call, a, b)
        assert out is not None
        rows, which = distinct_rows(out)
        assert torch.equal(torch.from_numpy(rows)[which], out)
        reduced = reduce_last(call, out, merge=False)
        assert reduced is not None
        found.append((out.tolist(), reduced.tolist(), pairs(call.ledger.merges), pairs(call.ledger.needs)))
    assert found[0] == found[1]


def test_activations_are_noted_with_the_channels_they_are_applied_to() -> None:
    walked = Walked(lambda x: aten.silu.default(x), x=values(B, S, 3))
    assert [(site.op, site.ids.tolist()) for site in walked.ledger.activations] == [("silu", [1, 2, 3])]


# --- linear ---------------------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """One Linear, the way lifting leaves it."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x: Any) -> Any:
        return self.proj(x)


def test_a_linear_puts_out_its_rows_and_merges_its_columns_with_what_comes_in() -> None:
    walked = Walked(Projection(3, 4, bias=True), x=values(B, S, 3))
    rows, columns = walked.axis("proj.weight", 0), walked.axis("proj.weight", 1)
    assert walked.out[0, 0].tolist() == rows.tolist()
    assert bool((walked.out == walked.out[0, 0]).all())
    assert walked.classes(columns) == walked.classes([1, 2, 3])
    assert walked.classes(walked.axis("proj.bias", 0)) == walked.classes(rows)
    assert len(set(walked.classes([*rows, *columns]))) == 7
    assert all(axis.role for axis in walked.ledger.axes.values() if axis.parameter == "proj.weight")


def test_columns_that_several_heads_read_are_shared_not_merged() -> None:
    walked = Walked(Projection(2, 3), x=values(B, S, 4, 2))  # one Linear applied to each of four heads
    heads, columns = walked.of("x")[0, 0], walked.axis("proj.weight", 1)
    rows, out = walked.axis("proj.weight", 0), walked.out[0, 0]
    assert not walked.ledger.merges
    needed = pairs(walked.ledger.needs)
    assert {(int(heads[h, d]), int(columns[d])) for h in range(4) for d in range(2)} <= needed
    assert len(set(out.ravel().tolist())) == 12  # a head's outputs are its own, and need the rows that all heads share
    assert {(int(out[h, r]), int(rows[r])) for h in range(4) for r in range(3)} <= needed


def test_columns_that_read_values_without_channels_must_stay() -> None:
    walked = Walked(Projection(3, 2), x=values(B, S, 3), free=(0, 1, 2))
    (pin,) = [pin for pin in walked.map.pins if pin.op == "Linear"]
    assert pin.ids.tolist() == walked.axis("proj.weight", 1).tolist()
    assert str(pin) == "Linear in proj: reads values that carry no traced channels"


def test_columns_that_read_some_elements_without_channels_must_stay_and_the_others_need_not() -> None:
    class Half(Projection):
        def forward(self, x: Any) -> Any:
            return self.proj(aten.cat.default([x, aten.new_ones.default(x, [B, S, 2])], -1))

    walked = Walked(Half(5, 4), x=values(B, S, 3))
    (pin,) = [pin for pin in walked.map.pins if pin.op == "Linear"]
    assert pin.ids.tolist() == walked.axis("proj.weight", 1)[3:].tolist()
    assert walked.classes(walked.axis("proj.weight", 1)[:3]) == walked.classes([1, 2, 3])


class SharedScale(nn.Module):
    """Heads that one Linear scales together; another Linear may read the scale as well."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.out = (nn.Linear(i, o, bias=False) for i, o in ((5, 6), (5, 2), (6, 4)))
        self.reader = nn.Linear(2, 3, bias=False) if read else None

    def forward(self, x: Any) -> Any:
        scale = self.scale(x)
        heads = aten.mul.Tensor(aten.view.default(self.heads(x), [B, S, 3, 2]), aten.unsqueeze.default(scale, 2))
        out = self.out(aten.view.default(heads, [B, S, 6]))
        return out if self.reader is None else (out, self.reader(scale))


@pytest.mark.parametrize("read", [False, True])
def test_what_is_shared_goes_with_its_last_user_unless_a_linear_reads_it(read: bool) -> None:
    walked = Walked(SharedScale(read=read), x=values(B, S, 5))
    heads, scale = walked.axis("heads.weight", 0), walked.axis("scale.weight", 0)
    some, every = (np.array(walked.classes(ids)) for ids in (heads[:4], heads))
    assert walked.map.source[every].all()
    assert walked.map.keep(some)[heads].tolist() == [False] * 4 + [True] * 2
    assert walked.map.keep(some)[scale].all()
    assert walked.map.keep(every)[scale].tolist() == [read, read]


def test_what_a_pinned_channel_is_computed_from_must_stay() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.reader = (nn.Linear(i, o, bias=False) for i, o in ((3, 4), (3, 2), (4, 5)))

        def forward(self, x: Any) -> Any:
            a = self.a(x)
            product = aten.mul.Tensor(aten.unsqueeze.default(a, 3), aten.unsqueeze.default(self.b(x), 2))
            return product, self.reader(a)

    walked = Walked(Outer(), x=values(B, S, 3))
    rows = walked.classes([*walked.axis("a.weight", 0), *walked.axis("b.weight", 0)])
    assert walked.map.pinned[rows].all()
    assert not walked.map.source[rows].any()
    assert [str(pin) for pin in walked.map.pin_reasons(np.array(rows))] == [
        "need: something that must stay is computed from it"
    ]


# --- contraction ----------------------------------------------------------------------------------------------------


def attention(q: Any, k: Any, v: Any) -> Any:
    """Matmul, softmax, matmul over (batch, heads, sequence, head_dim)."""
    scores = aten.matmul.default(q, aten.transpose.int(k, 2, 3))
    return aten.matmul.default(aten.softmax.int(scores, -1), v)


def scaled_dot_product(q: Any, k: Any, v: Any) -> Any:
    return aten.scaled_dot_product_attention.default(q, k, v)


@pytest.mark.parametrize("function", [attention, scaled_dot_product])
def test_query_key_and_output_channels_of_a_head_form_one_block(function: Callable[..., Any]) -> None:
    heads, dim, value_dim = 3, 4, 5
    shape = {"q": values(B, heads, S, dim), "k": values(B, heads, S, dim), "v": values(B, heads, S, value_dim)}
    walked = Walked(function, free=(0, 2), **shape)
    blocks = []
    for head in range(heads):
        ids = [walked.of("q")[0, head, 0], walked.of("k")[0, head, 0], walked.out[0, head, 0]]
        classes = {cls for part in ids for cls in walked.classes(part)}
        assert len(classes) == 1
        blocks.append(classes.pop())
    assert len(set(blocks)) == heads
    (site,) = walked.ledger.attentions
    assert walked.classes(site.heads) == blocks
    assert walked.classes(site.outputs) == [block for block in blocks for _ in range(value_dim)]
    assert not [pin for pin in walked.ledger.pins if pin.op not in {"placeholder", "output"}]


def grouped(q: Any, k: Any, v: Any) -> Any:
    k, v = (aten.repeat_interleave.self_int(t, 3, 1) for t in (k, v))
    return attention(q, k, v)


def grouped_by_operator(q: Any, k: Any, v: Any) -> Any:
    return aten.scaled_dot_product_attention.default(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("function", [grouped, grouped_by_operator])
def test_query_heads_that_share_a_kv_head_stay_independent_and_need_it(function: Callable[..., Any]) -> None:
    kv_heads, heads, dim = 2, 6, 4
    shape = {"q": values(B, heads, S, dim), "k": values(B, kv_heads, S, dim), "v": values(B, kv_heads, S, dim)}
    walked = Walked(function, free=(0, 2), **shape)
    (site,) = walked.ledger.attentions
    blocks = np.array(walked.classes(site.heads))
    assert len(set(blocks.tolist())) == heads
    for name in ("k", "v"):
        for kv in range(kv_heads):
            shared = np.unique(walked.classes(walked.of(name)[0, kv, 0]))
            reached, frontier = set(), set(shared.tolist())
            while frontier:  # everything that needs the KV head, directly or through its copies
                reached |= frontier
                frontier = set(walked.map.users(np.array(sorted(frontier)))) - reached
            assert reached & set(blocks.tolist()) == set(blocks[kv * 3 : kv * 3 + 3].tolist())


def test_softmax_over_positions_is_harmless_and_along_channels_a_choice() -> None:
    harmless = Walked(lambda x: aten.softmax.int(x, 1), x=values(B, S, 3))
    assert torch.equal(harmless.out, harmless.of("x"))
    assert not harmless.ledger.pins
    choosing = Walked(lambda x: aten.softmax.int(x, -1), x=values(B, S, 3))
    (norm,) = choosing.ledger.norms
    assert (norm.kind, norm.ids.tolist(), norm.choice) == ("softmax", [1, 2, 3], True)
    assert torch.equal(choosing.out, choosing.of("x"))
    mixing = Walked(lambda x: aten.cumsum.default(x, -1), x=values(B, S, 3))
    (pin,) = mixing.ledger.pins
    assert (pin.op, pin.ids.tolist(), pin.reason) == ("cumsum", [1, 2, 3], "mixes channels along an axis")


# --- reductions, lookups, the rest ----------------------------------------------------------------------------------


def test_a_mean_over_channels_is_a_norm_that_every_channel_needs() -> None:
    walked = Walked(lambda x: aten.mul.Tensor(x, aten.mean.dim(x, [-1], True)), x=values(B, S, 3))
    (norm,) = walked.ledger.norms
    assert (norm.kind, norm.ids.tolist(), norm.width) == ("mean", [1, 2, 3], 3)
    mean = walked.of("mean_dim")
    assert mean.shape == (B, S, 1)
    assert {(channel, int(mean[0, 0, 0])) for channel in (1, 2, 3)} <= pairs(walked.ledger.needs)
    assert len(set(walked.classes([1, 2, 3]))) == 3


def test_a_mean_over_positions_reduces_no_channels() -> None:
    walked = Walked(lambda x: aten.mean.dim(x, [1]), x=values(B, S, 3))
    assert walked.out.tolist() == [[1, 2, 3]] * B
    assert not walked.ledger.norms


def test_a_layer_norm_is_a_norm_and_its_weight_goes_with_the_channels() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Any) -> Any:
            return aten.layer_norm.default(x, [3], self.scale)

    walked = Walked(Norm(), x=values(B, S, 3))
    (norm,) = walked.ledger.norms
    assert (norm.kind, norm.ids.tolist(), norm.width) == ("layer_norm", [1, 2, 3], 3)
    assert walked.classes(walked.axis("scale", 0)) == walked.classes([1, 2, 3])


def test_an_embedding_pins_its_rows_and_puts_out_its_columns() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(7, 3))

        def forward(self, x: Any) -> Any:
            return aten.embedding.default(self.table, x)

    walked = Walked(Lookup(), x=torch.zeros(B, S, dtype=torch.long))
    assert walked.out[0, 0].tolist() == walked.axis("table", 1).tolist()
    (pin,) = walked.ledger.pins
    assert (pin.op, pin.reason) == ("embedding", "rows are looked up by index")
    assert pin.ids.tolist() == walked.axis("table", 0).tolist()


def test_an_operator_without_a_rule_pins_what_it_touches_and_says_where_and_why() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 4, bias=False)
            self.other = nn.Linear(3, 5, bias=False)

        def forward(self, x: Any) -> Any:
            return aten.cummax.default(self.up(x), -1)[0], self.other(x)

    walked = Walked(Inner(), x=values(B, S, 3))
    (pin,) = walked.ledger.pins
    assert (pin.op, pin.reason) == ("cummax", "no rule for this operator")
    assert pin.ids.tolist() == walked.axis("up.weight", 0).tolist()
    assert walked.map.pinned[walked.classes(walked.axis("up.weight", 0))].all()
    reasons = walked.map.pin_reasons(np.array(walked.classes(walked.axis("up.weight", 0))))
    assert [reason.op for reason in reasons] == ["cummax"]


def test_a_cache_that_is_extended_has_the_channels_of_what_extends_it_and_is_not_pinned() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(3, 4, bias=False)

        def forward(self, x: Any, past: Any) -> Any:
            key = aten.transpose.int(aten.view.default(self.key(x), [B, S, 2, 2]), 1, 2)
            return aten.cat.default([past, key], 2)

    graph_module = torch.fx.symbolic_trace(Cache())
    inputs = {"x": values(B, S, 3), "past": values(B, 2, 5, 2)}
    axes = {"x": {0: "batch", 1: "new"}, "past": {0: "batch", 2: "past"}}
    ledger = walk(graph_module, Interface(inputs, axes, ("present",)))
    channels = ChannelMap(ledger)
    rows = channels.class_of[ledger.axes["key.weight", 0].ids()]
    (past,) = [pin.ids for pin in ledger.inputs if pin.module == "past"]
    assert channels.class_of[past].tolist() == rows.tolist()
    assert not channels.pinned[rows].any()  # neither as an input nor as an output: it comes back smaller
    assert [str(pin) for pin in channels.pins] == ["placeholder in x: the caller supplies this axis"]

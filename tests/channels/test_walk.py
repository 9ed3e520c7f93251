"""Channel tracing and the locate passes on whole models: what is found in each family, with no code for any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.channels.call import Call
from fxprune.channels.walk import trace_channels, walk
from fxprune.core.errors import PreconditionError
from fxprune.core.groups import AttentionGroup, MlpGroup
from fxprune.core.program import Program
from fxprune.passes.locate_attention import LocateAttention
from fxprune.passes.locate_mlp import LocateMlp
from fxprune.tracing.trace import trace
from tests.families import FAMILIES, SIZES, located, located_plain

ONE_LAYER = {"num_hidden_layers": 1}


def attentions(program: Program) -> list[AttentionGroup]:
    return [group for group in program.groups if isinstance(group, AttentionGroup)]


def mlps(program: Program) -> list[MlpGroup]:
    return [group for group in program.groups if isinstance(group, MlpGroup)]


def refused(program: Program, name: str) -> dict[str, str]:
    found: dict[str, str] = next(event.details["refused"] for event in program.history if event.name == name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_is_found(family: str) -> None:
    groups = attentions(located(family))
    assert [group.name for group in groups] == [f"model.layers.{layer}.self_attn" for layer in range(2)]
    for group in groups:
        assert (group.units, group.kv_heads, group.head_dim) == (6, 2, 6)
        assert [group.heads_of(kv) for kv in range(2)] == [[0, 1, 2], [3, 4, 5]]
        axes = {(s.parameter.removeprefix(f"{group.name}."), s.axis): s.indices for s in group.slices}
        shared = {(s.parameter.removeprefix(f"{group.name}."), s.axis): s.indices for s in group.shared}
        rows_of_heads = np.arange(36).reshape(6, 6)
        assert axes["q_proj.weight", 0].tolist() == axes["o_proj.weight", 1].tolist() == rows_of_heads.tolist()
        assert shared["k_proj.weight", 0].tolist() == shared["v_proj.weight", 0].tolist() == rows_of_heads[:2].tolist()
        assert {s.parameter for s in group.consumers} == {f"{group.name}.o_proj.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mlp_channel_is_found(family: str) -> None:
    groups = mlps(located(family))
    assert [group.name for group in groups] == [f"model.layers.{layer}.mlp" for layer in range(2)]
    for group in groups:
        assert (group.units, group.gated, group.activation) == (SIZES["intermediate_size"], True, "silu")
        axes = {(s.parameter.removeprefix(f"{group.name}."), s.axis): s.indices.ravel().tolist() for s in group.slices}
        every = list(range(SIZES["intermediate_size"]))
        assert axes == {("gate_proj.weight", 0): every, ("up_proj.weight", 0): every, ("down_proj.weight", 1): every}


def test_biases_belong_to_the_heads_they_are_added_to() -> None:
    group = attentions(located("qwen2"))[0]
    assert f"{group.name}.q_proj.bias" in {s.parameter for s in group.slices}
    assert {f"{group.name}.{name}.bias" for name in ("k_proj", "v_proj")} <= {s.parameter for s in group.shared}


def test_the_norm_that_all_heads_of_qwen3_share_belongs_to_none() -> None:
    group = attentions(located("qwen3"))[0]
    assert not [s for s in (*group.slices, *group.shared) if "norm" in s.parameter]


@pytest.mark.parametrize(("kv_heads", "sharing"), [(6, None), (1, [0] * 6)], ids=["MHA", "MQA"])
def test_attention_without_groups_and_with_one_kv_head(kv_heads: int, sharing: list[int] | None) -> None:
    (group,) = attentions(located("llama", num_key_value_heads=kv_heads, **ONE_LAYER))
    assert (group.units, group.kv_heads) == (6, kv_heads)
    assert (None if group.sharing is None else group.sharing.tolist()) == sharing
    producers = {s.parameter.rpartition(".")[0].rpartition(".")[2] for s in group.slices if s.produces}
    assert producers == ({"q_proj"} if sharing else {"q_proj", "k_proj", "v_proj"})


def test_tied_embeddings_are_one_parameter() -> None:
    program = located("llama", tie_word_embeddings=True, **ONE_LAYER)
    channels = program.channels
    assert channels is not None
    table = channels.axes_by_parameter()
    tied = [name for name in table if table[name][0].size == SIZES["vocab_size"]]
    assert len(tied) == 1
    vocabulary = next(axis for axis in table[tied[0]] if axis.axis == 0)
    assert vocabulary.role == "rows"  # the lm_head reads it
    pins = channels.pin_reasons(channels.class_of[vocabulary.ids()])
    assert {pin.op for pin in pins} == {"embedding", "output"}
    assert len(program.groups) == 2


def test_the_cache_may_shrink_and_the_logits_may_not() -> None:
    channels = located("llama").channels
    assert channels is not None
    assert [(pin.op, pin.reason) for pin in channels.pins if pin.op in {"placeholder", "output"}] == [
        ("output", "the caller receives this axis")
    ]


def test_two_traces_of_one_graph_agree() -> None:
    program = located("llama")
    again = trace_channels(program.graph_module, program.interface)
    assert program.channels is not None
    assert np.array_equal(again.class_of, program.channels.class_of)


class Mlp(nn.Module):
    """An MLP with something between its Linears."""

    def __init__(self, between: Any, width: int = 12) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, width)
        self.fc2 = nn.Linear(width, 5)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.between(self.fc1(x)))


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def test_an_mlp_without_a_gate() -> None:
    (group,) = mlps(located_plain(nn.Sequential(Mlp(nn.functional.gelu)), X))
    assert (group.name, group.units, group.gated, group.activation) == ("0", 12, False, "gelu")


class FusedMlp(nn.Module):
    """Gate and up in one weight: [gate; up] or interleaved."""

    def __init__(self, *, interleaved: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(6, 24)
        self.down = nn.Linear(12, 6)
        self.interleaved = interleaved

    def forward(self, x: Tensor) -> Any:
        both = self.gate_up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_fused_gate_and_up_comes_out_as_two_rows_a_channel(interleaved: bool) -> None:
    (group,) = mlps(located_plain(FusedMlp(interleaved=interleaved), X))
    assert (group.units, group.gated) == (12, True)
    rows = next(s for s in group.slices if s.parameter == "gate_up.weight").indices
    expected = np.arange(24).reshape(12, 2) if interleaved else np.stack([np.arange(12), np.arange(12, 24)], 1)
    assert rows.tolist() == expected.tolist()


def test_near_misses_are_refused_with_the_reason() -> None:
    def running_maximum(x: Tensor) -> Tensor:
        x = nn.functional.silu(x)
        return x + x.cummax(-1)[0]

    program = located_plain(nn.Sequential(Mlp(running_maximum)), X)
    assert not program.groups
    assert refused(program, "locate_mlp") == {"0": "pinned by cummax in 0: no rule for this operator"}
    low_rank = located_plain(nn.Sequential(Mlp(nn.Identity())), X)
    assert refused(low_rank, "locate_mlp") == {"0": "no activation between the Linears"}
    normed = located_plain(nn.Sequential(Mlp(nn.Sequential(nn.SiLU(), nn.LayerNorm(12)))), X)
    assert "normalised together" in refused(normed, "locate_mlp")["0"]


class Heads(nn.Module):
    """Multi-head attention in which something happens to the heads before they are read."""

    def __init__(self, after: Any, heads: int = 3, dim: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, heads * dim) for _ in range(3))
        self.o = nn.Linear(heads * dim, 6)
        self.after, self.heads = after, heads

    def forward(self, x: Tensor) -> Any:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(self.after(out).transpose(1, 2).flatten(2))


X3 = torch.linspace(-1, 1, 60).reshape(2, 5, 6)


def test_heads_that_an_unknown_operator_mixes_are_refused_by_its_name() -> None:
    (group,) = attentions(located_plain(nn.Sequential(Heads(nn.Identity())), X3))
    assert (group.units, group.head_dim) == (3, 4)
    program = located_plain(nn.Sequential(Heads(lambda out: out.cummax(-1)[0])), X3)
    assert not attentions(program)
    assert refused(program, "locate_attention") == {"0": "pinned by cummax in 0: no rule for this operator"}


@pytest.mark.parametrize("locate", [LocateAttention(), LocateMlp()])
def test_locating_needs_lifted_projections(locate: LocateAttention | LocateMlp) -> None:
    with pytest.raises(PreconditionError, match="run lift_linears first"):
        locate(trace(Mlp(nn.SiLU()), example_inputs=(X,)))


def test_calls_of_a_walk_answer_afterwards_what_they_did_during_it_where_they_are_kept() -> None:
    program = located("llama")

    def told(call: Call) -> list[tuple[object, ...]]:
        inputs = call.node.all_input_nodes
        return [(n.name, getattr(call.value_of(n), "shape", None), _listed(call.ids_of(n))) for n in inputs]

    during: list[list[tuple[object, ...]]] = []
    calls: list[Call] = []
    walk(program.graph_module, program.interface, lambda call, _: during.append(told(call)))
    walk(program.graph_module, program.interface, lambda call, _: calls.append(call), keep=True)
    assert [told(call) for call in calls] == during
    assert any(ids is not None for asked in during for *_, ids in asked)


def _listed(ids: Tensor | None) -> object:
    return None if ids is None else ids.tolist()

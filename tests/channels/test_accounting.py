"""Accounting: parameters, MACs and bytes, on graphs small enough to count by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fxprune.channels.accounting import (
    MacCount,
    attention_shapes,
    bytes_of_weights,
    bytes_read_per_step,
    compare_macs,
    compare_parameters,
    count_parameters,
    linear_parameters_by_name,
    macs_per_token,
    mask_sparsity,
    removed_share,
)
from fxprune.channels.block_linears import block_linear_parameters, lm_heads
from fxprune.core.errors import PreconditionError
from fxprune.passes.lift_linears import LiftLinears
from fxprune.tracing.trace import trace

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 13, 8, 4, 2, 3, 10


class Decoder(nn.Module):
    """One decoder block with grouped-query attention that returns logits and the cache it made."""

    def __init__(self, *, fused: bool = True, tied: bool = False, mlp: int = MLP, cap: float | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.k = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, mlp, bias=False)
        self.down = nn.Linear(mlp, HIDDEN, bias=False)
        self.projection = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.fused, self.cap = fused, cap
        if tied:
            self.projection.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(input_ids)
        batch, new = input_ids.shape
        q = self.q(x).view(batch, new, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k(x).view(batch, new, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v(x).view(batch, new, KV_HEADS, HEAD_DIM).transpose(1, 2)
        wide_k, wide_v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        if self.fused:
            y = functional.scaled_dot_product_attention(q, wide_k, wide_v)
        else:
            scores = torch.matmul(q, wide_k.transpose(2, 3)) * HEAD_DIM**-0.5
            y = torch.matmul(torch.softmax(scores, dim=-1), wide_v)
        x = x + self.o(y.transpose(1, 2).reshape(batch, new, HEADS * HEAD_DIM))
        x = x + self.down(functional.silu(self.up(x)))
        logits = self.projection(x)
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits, k, v


def traced(**options: object) -> GraphModule:
    return symbolic_trace(Decoder(**options))  # type: ignore[arg-type]


QKVO = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
BLOCKS = QKVO + 2 * HIDDEN * MLP
HEAD = HIDDEN * VOCABULARY
BIAS = HEADS * HEAD_DIM


def test_parameters_by_hand() -> None:
    graph = traced()
    assert count_parameters(graph) == BLOCKS + BIAS + 2 * HEAD
    assert linear_parameters_by_name(graph)["q"] == HIDDEN * HEADS * HEAD_DIM + BIAS
    assert sum(linear_parameters_by_name(graph).values()) == BLOCKS + BIAS + HEAD
    assert block_linear_parameters(graph) == BLOCKS + BIAS
    assert bytes_of_weights(graph) == 4 * count_parameters(graph)
    assert bytes_of_weights(traced().half()) == 2 * count_parameters(graph)


@pytest.mark.parametrize("same_object", [True, False])
def test_tied_tensors_count_once(*, same_object: bool) -> None:
    model = Decoder(tied=True)
    if not same_object:
        model.projection.weight = nn.Parameter(model.embed.weight.detach())
    assert count_parameters(model) == BLOCKS + BIAS + HEAD
    assert block_linear_parameters(model) == BLOCKS + BIAS
    assert lm_heads(model) == ("projection",)


def test_equal_values_are_not_tied() -> None:
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.load_state_dict(a.state_dict())
    assert count_parameters(nn.ModuleList([a, b])) == 32


def test_meta_tensors_are_counted() -> None:
    with torch.device("meta"):
        model = Decoder(tied=True)
    assert count_parameters(model) == BLOCKS + BIAS + HEAD
    assert attention_shapes(symbolic_trace(model), [torch.zeros(2, 5, dtype=torch.long)])[0].heads == HEADS
    with pytest.raises(PreconditionError, match="meta device"):
        mask_sparsity(model)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_head_is_found_by_data_flow(cap: float | None) -> None:
    graph = traced(cap=cap)
    assert lm_heads(graph) == ("projection",)
    # Without a name the cache outputs do not make the value projection a head: it feeds the attention too.
    assert lm_heads(graph, outputs=["logits", "present.0.key", "present.0.value"]) == ("projection",)
    assert lm_heads(graph, outputs=["logits"]) == ("projection",)  # asked with the outputs of a shorter graph
    # The name decides: the value projection makes the output that is called logits here.
    assert lm_heads(graph, outputs=["other", "present.0.key", "logits"]) == ("v",)


def test_head_of_an_eager_model_is_what_the_model_says() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    assert lm_heads(model) == ("lm_head",)
    count = macs_per_token(model)
    assert count.lm_head == 8 * VOCABULARY
    assert count.blocks == 4 * 8 * 8 + 3 * 8 * 12


def test_an_unlifted_product_is_named() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            product = torch.matmul(torch.matmul(x, self.weight), self.weight.t())
            y: Tensor = self.fc(product)
            return y

    graph = symbolic_trace(Raw())
    count = macs_per_token(graph)
    assert (count.blocks, count.lm_head) == (0, 8)
    assert count.uncounted == ("matmul(weight)", "matmul(weight)")
    assert macs_per_token(traced()).uncounted == ()


def test_experts_that_are_no_linears_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 16, 8, dtype=torch.bfloat16))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.weight.transpose(1, 2), offs=ends)

    assert macs_per_token(symbolic_trace(Experts())).uncounted == ("_grouped_mm(weight)",)
    assert macs_per_token(nn.Sequential(nn.Linear(2, 2), Experts())).uncounted == ("1.weight",)


def test_a_linear_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.shared(self.shared(x)))
            return y

    graph = symbolic_trace(Twice())
    assert macs_per_token(graph) == MacCount(blocks=32, lm_head=8)
    assert block_linear_parameters(graph) == 20


@pytest.mark.parametrize("fused", [True, False])
def test_macs_agree_with_the_flop_counter(*, fused: bool) -> None:
    graph = traced(fused=fused)
    batch, new = 2, 5
    ids = torch.zeros(batch, new, dtype=torch.long)
    count = macs_per_token(graph, example_inputs={"input_ids": torch.zeros(3, 7, dtype=torch.long)})
    assert (count.blocks, count.lm_head, count.linear) == (BLOCKS, HEAD, BLOCKS + HEAD)
    assert count.attention_scores(new, new) == HEADS * 2 * HEAD_DIM * new * new
    # The counter knows the products inside the reference attention, not the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        graph(ids)
    assert 2 * count.of_step(new, batch=batch) == counter.get_total_flops()


def test_macs_of_a_step() -> None:
    count = macs_per_token(traced(), example_inputs=[torch.zeros(2, 3, dtype=torch.long)])
    per_pair = HEADS * 2 * HEAD_DIM
    assert count.of_step(1, past=9) == BLOCKS + HEAD + per_pair * 10
    assert count.of_step(4, batch=3, logits=1) == 3 * (4 * BLOCKS + HEAD + per_pair * 16)


def test_unknown_attention_is_said_not_guessed() -> None:
    count = macs_per_token(traced())
    assert count.attention is None
    with pytest.raises(PreconditionError, match="example_inputs"):
        count.attention_scores(1, 1)
    with pytest.raises(PreconditionError, match="input_ids"):
        macs_per_token(traced(), example_inputs={"tokens": torch.zeros(1, 1)})


def test_a_router_softmax_is_no_attention() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(torch.softmax(self.gate(x), dim=-1), self.experts)

    assert attention_shapes(symbolic_trace(Router()), [torch.zeros(2, 3, 4)]) == ()


@pytest.mark.parametrize(("tied", "tables"), [(False, HEAD), (True, 0)])
def test_a_step_does_not_read_a_lookup_table(*, tied: bool, tables: int) -> None:
    for module in (Decoder(tied=tied), traced(tied=tied)):
        assert bytes_read_per_step(module) == bytes_of_weights(module) - 4 * tables


def test_a_lookup_by_function_is_a_table_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(5, 4))
            self.fc = nn.Linear(4, 2, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.fc(functional.embedding(ids, self.table))
            return y

    assert bytes_read_per_step(symbolic_trace(Functional())) == 4 * 8


def test_mask_sparsity_counts_stored_zeros_of_blocks_only() -> None:
    graph = traced()
    assert mask_sparsity(graph) == 0.0
    with torch.no_grad():
        graph.get_parameter("up.weight").zero_()
        graph.get_parameter("projection.weight").zero_()
    assert mask_sparsity(graph) == pytest.approx(HIDDEN * MLP / BLOCKS)
    with pytest.raises(PreconditionError, match=r"no nn\.Linear"):
        mask_sparsity(nn.LayerNorm(3))


def test_the_three_figures_are_apart() -> None:
    dense, slim = traced(), traced(mlp=4)
    removed = 2 * HIDDEN * (MLP - 4)
    section = compare_parameters(dense, slim).to_json()
    assert section["dense"] - section["slim"] == removed
    assert section["removed_share_blocks"] == pytest.approx(removed / (BLOCKS + BIAS))
    assert section["removed_share_all"] == pytest.approx(removed / count_parameters(dense))
    macs = compare_macs(dense, slim).to_json()
    assert macs["dense"] - macs["slim"] == removed
    assert macs["removed_share"] == pytest.approx(removed / (BLOCKS + HEAD))
    assert macs["lm_head_dense"] == macs["lm_head_slim"] == HEAD
    assert mask_sparsity(slim) == 0.0


def test_a_share_of_nothing_is_absent() -> None:
    assert removed_share(0, 0) is None
    norm = nn.LayerNorm(3)
    section = compare_parameters(norm, norm).to_json()
    assert section == {"dense": 6, "slim": 6, "dense_blocks": 0, "slim_blocks": 0, "removed_share_all": 0.0}


EXPERTS, CHOSEN, EXPERT_MLP, LAYERS = 5, 2, 12, 2
ATTENTION = 8 * (8 + 4 + 4 + 8)
MIXTURE = EXPERTS * 3 * 8 * EXPERT_MLP


@pytest.fixture(scope="module")
def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=EXPERT_MLP, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def mixture(mixtral: MixtralForCausalLM) -> tuple[GraphModule, dict[str, Tensor]]:
    program = LiftLinears()(trace(mixtral)).program
    return program.graph_module, dict(program.interface.example_inputs)


def test_experts_count_in_a_graph_and_in_the_model_alike(
    mixtral: MixtralForCausalLM, mixture: tuple[GraphModule, dict[str, Tensor]]
) -> None:
    graph, examples = mixture
    blocks = LAYERS * (ATTENTION + MIXTURE + EXPERTS * 8)
    macs = LAYERS * (ATTENTION + CHOSEN * MIXTURE // EXPERTS + EXPERTS * 8)
    for module in (mixtral, graph):
        assert block_linear_parameters(module) == blocks
        assert sum(linear_parameters_by_name(module).values()) == blocks + 8 * VOCABULARY
        count = macs_per_token(module)
        assert (count.blocks, count.lm_head, count.uncounted) == (macs, 8 * VOCABULARY, ())
    assert macs_per_token(graph, example_inputs=examples).blocks == macs


def test_macs_of_experts_follow_the_rows_at_the_example(mixture: tuple[GraphModule, dict[str, Tensor]]) -> None:
    graph, examples = mixture
    longer = dict(examples)
    longer["input_ids"] = longer["position_ids"] = torch.zeros(2, 7, dtype=torch.long)
    longer["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    short, long = (macs_per_token(graph, example_inputs=inputs) for inputs in (examples, longer))
    assert short.blocks == long.blocks  # per token


def test_experts_without_known_shapes_are_said_not_guessed(mixture: tuple[GraphModule, dict[str, Tensor]]) -> None:
    graph = GraphModule(mixture[0], mixture[0].graph)
    bare = torch.fx.Graph()
    bare.output(bare.graph_copy(graph.graph, {}))
    for node in bare.nodes:
        node.meta.clear()
    count = macs_per_token(GraphModule(graph, bare))
    assert count.blocks == LAYERS * (ATTENTION + EXPERTS * 8)
    assert len(count.uncounted) == 2 * LAYERS
    assert all(label.startswith("GroupedLinear(") for label in count.uncounted)


def test_a_model_that_does_not_say_how_many_experts_a_token_sees(mixtral: MixtralForCausalLM) -> None:
    experts = copy.deepcopy(mixtral.model.layers[0].mlp.experts)
    experts.config = None
    count = macs_per_token(experts)
    assert (count.blocks, count.uncounted) == (0, ("gate_up_proj", "down_proj"))
    assert block_linear_parameters(experts) == MIXTURE


def test_zeros_of_experts_are_mask_sparsity(mixtral: MixtralForCausalLM) -> None:
    model = MixtralForCausalLM(mixtral.config)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.zero_()
    blocks = LAYERS * (ATTENTION + MIXTURE + EXPERTS * 8)
    share = MIXTURE / 3 / blocks
    assert mask_sparsity(model) == pytest.approx(share)
    assert mask_sparsity(LiftLinears()(trace(model)).program.graph_module) == pytest.approx(share)


def test_a_step_reads_only_the_experts_of_its_token(
    mixtral: MixtralForCausalLM, mixture: tuple[GraphModule, dict[str, Tensor]]
) -> None:
    unread = LAYERS * MIXTURE * (EXPERTS - CHOSEN) // EXPERTS + 8 * VOCABULARY  # and the embedding
    for module in (mixtral, mixture[0]):
        assert bytes_read_per_step(module) == bytes_of_weights(module) - 4 * unread


def test_slim_experts_are_smaller_in_every_figure(mixtral: MixtralForCausalLM) -> None:
    config = MixtralConfig(**(mixtral.config.to_dict() | {"intermediate_size": EXPERT_MLP - 4}))
    slim = LiftLinears()(trace(MixtralForCausalLM(config).eval())).program.graph_module
    dense = LiftLinears()(trace(mixtral)).program.graph_module
    removed = LAYERS * EXPERTS * 3 * 8 * 4
    assert compare_parameters(dense, slim).dense_blocks - compare_parameters(dense, slim).slim_blocks == removed
    macs = compare_macs(dense, slim)
    assert macs.dense.blocks - macs.slim.blocks == removed * CHOSEN // EXPERTS

"""The picture of a block: nodes and edges of the graph, and files that can be opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import ExportError, UsageError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.exporters.group_picture import block_graph, block_of, draw_block
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from pathlib import Path

    import networkx as nx

    from fxprune.core.program import Program


def located(config: LlamaConfig | MixtralConfig) -> Program:
    program = trace(AutoModelForCausalLM.from_config(config))
    return Pipeline([build_pass(name, {}) for name in LOCATE])(program).program


@pytest.fixture(scope="module")
def llama() -> Program:
    return located(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def edges(graph: nx.DiGraph[str], relation: str) -> set[tuple[str, str]]:
    return {(a, b) for a, b in graph.edges if graph.edges[a, b]["relation"] == relation}


def test_who_writes_and_who_reads(llama: Program) -> None:
    block = block_of(llama)
    assert block == "model.layers.1"
    graph = block_graph(llama, block)
    linears = {node for node in graph if graph.nodes[node]["kind"] == "linear"}
    assert {name.removeprefix(f"{block}.") for name in linears} == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip
    heads, channels, hidden = f"{block}.self_attn [attention]", f"{block}.mlp [mlp]", "model [hidden]"
    writes, reads = edges(graph, "writes"), edges(graph, "reads")
    assert {a for a, b in writes if b == heads} == {f"{block}.self_attn.{n}_proj" for n in "qkv"}
    assert {b for a, b in reads if a == heads} == {f"{block}.self_attn.o_proj"}
    assert {a for a, b in writes if b == channels} == {f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"}
    assert {b for a, b in reads if a == channels} == {f"{block}.mlp.down_proj"}
    assert {a for a, b in writes if b == hidden} == {
        f"{block}.self_attn.o_proj", f"{block}.mlp.down_proj", "model.embed_tokens",
    }  # fmt: skip
    assert {b for a, b in reads if a == hidden} >= {f"{block}.mlp.up_proj", "lm_head"}
    assert edges(graph, "normalises") == {
        (hidden, f"{block}.input_layernorm"), (hidden, f"{block}.post_attention_layernorm"),
    }  # fmt: skip
    assert {frozenset(edge) for edge in edges(graph, "tied")} == {frozenset({"model.embed_tokens", "lm_head"})}
    assert edges(graph, "holds") == {("model.layers [layers]", heads), ("model.layers [layers]", channels)}


def test_experts_and_their_router() -> None:
    program = located(
        MixtralConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=5,
            num_experts_per_tok=2,
        )
    )
    graph = block_graph(program, "model.layers.0")
    experts, inner = "model.layers.0.mlp [experts]", "model.layers.0.mlp.experts [expert_mlp]"
    gate_up, down = (f"model.layers.0.mlp.experts.{name}_proj_linear" for name in ("gate_up", "down"))
    assert ("model.layers.0.mlp.gate", experts) in edges(graph, "writes")
    assert {(experts, gate_up), (experts, down)} <= edges(graph, "holds")
    assert (gate_up, inner) in edges(graph, "writes")
    assert (inner, down) in edges(graph, "reads")


def test_a_block_that_is_not_there_is_refused(llama: Program) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.7"):
        block_graph(llama, "model.layers.7")


def test_svg_has_the_text_and_is_the_same_every_time(llama: Program, tmp_path: Path) -> None:
    graph = draw_block(llama, tmp_path / "a.svg")
    draw_block(llama, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    assert all(f">{graph.nodes[node]['label']}<" in text for node in graph if graph.nodes[node]["kind"] == "linear")
    assert "stroke-dasharray" in text  # the tie


def test_png_is_a_png(llama: Program, tmp_path: Path) -> None:
    draw_block(llama, tmp_path / "a.png", block="model.layers.0")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_another_suffix_and_a_missing_directory_are_refused(llama: Program, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        draw_block(llama, tmp_path / "a.pdf")
    with pytest.raises(ExportError, match="cannot be written"):
        draw_block(llama, tmp_path / "missing" / "a.svg")

"""Models whose cache is more than keys and values, and decoders that are called in other ways than most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import fxprune
from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import PreconditionError, TraceError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.evaluation.perplexity import perplexity
from fxprune.evaluation.scoring import Scorer
from fxprune.exporters.onnx import onnx_refusal
from fxprune.exporters.ort import OrtRunner
from fxprune.flows.steps import prune_program
from fxprune.runtimes.runners import EagerRunner, GraphRunner, greedy, position_ids_from_mask
from fxprune.verification.compare import compare_runners
from tests.families import randomise

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fxprune.core.program import Program

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 6,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolution": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    ),
    "mamba": (
        "GraniteMoeHybrid",
        {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 56},
    ),
}


def build(kind: str, head: str = "ForCausalLM", **fields: Any) -> nn.Module:
    """A tiny model in which no norm and no bias is an identity."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    model: nn.Module = getattr(transformers, f"{kind}{head}")(config_class(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.rand_like(parameter))
    return model


def located(model: nn.Module, **options: Any) -> Program:
    return Pipeline([build_pass(name, {}) for name in LOCATE])(fxprune.trace(model, **options)).program


def slim(program: Program) -> GraphRunner:
    return GraphRunner(program.graph_module, program.interface, "slim")


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_is_pruned_saved_and_evaluated_with_its_own_cache(
    kind: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    name, fields = HYBRIDS[kind]
    model = build(name, **{**fields, "vocab_size": len(tiny_tokenizer)})
    program = located(model, tokenizer=tiny_tokenizer)
    assert program.interface.causal
    assert not program.interface.cache
    assert program.interface.fixed_length is None
    assert {"attention", "mlp"} <= {group.kind for group in program.groups}

    # One of the two is calibrated, on text that the original model samples with its own cache.
    text_options = {"calibration": "self", "samples": 8, "seq_len": 16} if kind == "convolution" else {}
    method = "flap" if text_options else "magnitude-units"
    options = {"ratio": 0.2, "round_to": 1, **text_options}
    pruned = prune_program(program, method, options, out=tmp_path / "slim")
    rungs = {rung["rung"]: rung for rung in pruned.results["verify"]}
    text = rungs["greedy text of reloaded checkpoint = slim"]
    assert text["cases"] == 1  # climbed, with the model's own cache
    assert rungs["reloaded checkpoint = slim"]["cases"] == 13
    assert sum(p.numel() for p in pruned.graph_module.parameters()) < sum(p.numel() for p in model.parameters())

    reloaded = fxprune.load(tmp_path / "slim")
    own, saved = pruned.graph_module.state_dict(), reloaded.state_dict()
    parameters = {name for name, _ in pruned.graph_module.named_parameters()} & set(saved)
    assert len(parameters) > 10
    assert all(torch.equal(own[name], saved[name]) for name in parameters)
    tokens = torch.randint(4, 60, (96,), generator=torch.Generator().manual_seed(1))
    figures = [
        perplexity(form, tokens, text="t", window=48).perplexity for form in (EagerRunner(reloaded), slim(pruned))
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    prompt = tokens[None, :7]
    generated = reloaded.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 7:]
    assert torch.equal(generated, greedy(slim(pruned), prompt, 5))
    assert torch.equal(generated, greedy(EagerRunner(reloaded), prompt, 5))


def test_the_state_of_a_hybrid_goes_on_and_can_be_forked() -> None:
    name, fields = HYBRIDS["convolution"]
    model = build(name, **fields)
    ids = torch.arange(4, 14)[None]
    mask = torch.ones_like(ids)
    positions = position_ids_from_mask(mask, 10)
    runner = EagerRunner(model)
    expected, _ = EagerRunner(model, cache=False).step(ids, mask, positions, None)
    _, past = runner.step(ids[:, :6], mask[:, :6], positions[:, :6], None)
    copied = runner.fork(past)
    for start in (past, copied):  # the first must not have lengthened the second
        first, longer = runner.step(ids[:, 6:9], mask[:, :9], positions[:, 6:9], start)
        second, _ = runner.step(ids[:, 9:], mask, positions[:, 9:], longer)
        found = torch.cat([first, second], dim=1)
        assert torch.allclose(found, expected[:, 6:], atol=1e-4)


def test_a_long_sequence_shows_a_graph_that_holds_for_one_chunk_only() -> None:
    """Models whose code loops over chunks: their graph serves its own length, and shorter sequences padded to it."""
    fields = {
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    model = build("MiniMax", **fields)
    program = fxprune.trace(model, length=12)
    assert program.interface.fixed_length == 12
    graph, eager = slim(program), EagerRunner(model, cache=False)
    rung = compare_runners("x", eager, graph, vocabulary=61, tolerance=1e-4, device=torch.device("cpu"), longer=12)
    assert rung.passed
    tokens = torch.zeros(1, 13, dtype=torch.long)
    with pytest.raises(PreconditionError, match=r"trace\(model, length=13\)"):
        graph.step(tokens, torch.ones_like(tokens), tokens, None)
    assert "12 tokens only" in onnx_refusal(program)
    with pytest.raises(PreconditionError, match="seq_len=12"):
        build_pass("sparsegpt", {"sparsity": 0.5, "seq_len": 16}).requires(
            Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
        )


@pytest.mark.parametrize("kind", ["Llama", "Lfm2"])
def test_a_decoder_without_a_head_is_pruned(kind: str, tmp_path: Path) -> None:
    fields = HYBRIDS["convolution"][1] if kind == "Lfm2" else {}
    model = build(kind, "Model", **fields)
    program = located(model)
    assert program.interface.outputs == ("last_hidden_state",)
    assert not program.interface.causal
    pruned = prune_program(program, "magnitude-units", {"ratio": 0.2, "round_to": 1}, out=tmp_path / "slim")
    reloaded = fxprune.load(tmp_path / "slim")
    ids = torch.arange(4, 12)[None]
    found = reloaded(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    (expected,) = pruned.graph_module(ids, torch.ones_like(ids))
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(PreconditionError, match="returns no logits"):
        EagerRunner(model).step(ids, torch.ones_like(ids), ids, None)


def test_a_model_that_returns_tuples_is_traced_and_evaluated() -> None:
    model = build("Llama")
    model.config.return_dict = False
    pruned = prune_program(located(model), "magnitude-units", {"ratio": 0.2, "round_to": 1})
    assert pruned.interface.causal
    assert model.config.return_dict is False
    tokens = torch.arange(4, 52)
    assert perplexity(EagerRunner(model), tokens, text="t", window=16).perplexity > 1


def test_a_padding_token_that_the_configuration_demands_stays() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    config = transformers.ModernBertDecoderConfig(**sizes, local_attention=8)
    program = fxprune.trace(transformers.ModernBertDecoderForCausalLM(config))
    assert len(program.interface.cache) == 4
    assert config.pad_token_id == 3
    with torch.device("meta"):
        model = transformers.ModernBertDecoderForCausalLM(config)
    assert len(fxprune.trace(model).interface.cache) == 4
    assert config.pad_token_id == 3


def test_what_stops_a_sample_is_told_as_a_trace_error() -> None:
    class Broken(transformers.LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, images: torch.Tensor, **_: Any) -> Any:
            return images[input_ids]

    with pytest.raises(TraceError, match=r"Broken.*example_inputs"):
        fxprune.trace(Broken(transformers.LlamaConfig(**SIZES)))


def test_a_state_that_the_model_keeps_to_itself_is_computed_again() -> None:
    fields = {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16}
    model = build("RecurrentGemma", **fields)
    ids = torch.arange(4, 10)[None]
    runner, whole = EagerRunner(model), EagerRunner(model, cache=False)
    assert torch.equal(greedy(runner, ids, 3), greedy(whole, ids, 3))


def test_scores_of_a_hybrid_are_those_of_its_graph() -> None:
    name, fields = HYBRIDS["convolution"]
    model = build(name, **fields)
    pairs = [([4, 5, 6], [7, 8]), ([9], [10]), (list(range(20, 40)), [41])]
    forms = EagerRunner(model), slim(fxprune.trace(model))
    eager, graph = (Scorer(form, max_length=64).score(pairs) for form in forms)
    for one, other in zip(eager, graph, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)


def test_a_hybrid_is_exported_as_a_graph_of_whole_sequences(tmp_path: Path) -> None:
    name, fields = HYBRIDS["convolution"]
    program = located(build(name, **fields))
    assert onnx_refusal(program) == ""
    assert "cache" in onnx_refusal(program, genai=True)
    with pytest.raises(PreconditionError, match="export to onnx instead"):
        build_pass("export_onnx", {"out": str(tmp_path / "genai"), "to": "genai"}).requires(program)
    build_pass("export_onnx", {"out": str(tmp_path / "onnx")})(program)
    runner = OrtRunner(tmp_path / "onnx" / "model.onnx", threads=1)
    prompt = torch.arange(5, 13)[None]
    assert torch.equal(greedy(runner, prompt, 6), greedy(slim(program), prompt, 6))


def test_keys_of_an_indexer_are_cached_by_the_model_alone() -> None:
    """They have no heads, so that no cache of keys and values holds them."""
    fields = {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
    }
    model = build("DeepseekV32", **fields)
    program = fxprune.trace(model)
    assert program.interface.causal
    assert program.interface.cache == ()
    forms = EagerRunner(model), slim(program)
    assert compare_runners("traced", *forms, vocabulary=61, tolerance=1e-4, device=torch.device("cpu")).passed


def test_a_window_that_the_models_own_code_asks_about_limits_a_graph_with_a_cache() -> None:
    options = dict(SIZES, attention_dropout=0.0, sliding_window=None)
    within = transformers.DogeConfig(**options, keep_window_size=256)
    short = transformers.DogeConfig(**options, keep_window_size=9)
    models = []
    for config in (within, short):
        torch.manual_seed(0)
        models.append(transformers.DogeForCausalLM(config).eval())
        randomise(models[-1])  # decays that all start alike tie the scores of all tokens
    free = fxprune.trace(models[0])
    assert free.interface.cache
    assert free.interface.fixed_length is None
    tied = fxprune.trace(models[1], length=24)
    assert not tied.interface.cache
    assert tied.interface.fixed_length == 24
    tokens = torch.arange(24).unsqueeze(0)  # the model's own scores of equal tokens tie
    for model, program in zip(models, (free, tied), strict=True):
        runners = EagerRunner(model, cache=False), GraphRunner(program.graph_module, program.interface)
        for length in (6, 10, 24):
            ids = tokens[:, :length]
            expected, got = (runner.step(ids, torch.ones_like(ids), ids, None)[0] for runner in runners)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_graph_for_one_length_that_reads_ahead_is_refused_in_a_sentence() -> None:
    """Its code makes lists as long as the text, so no length is free, and all tokens see each other."""
    torch.manual_seed(0)
    config = transformers.CpmAntConfig(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=48,
        num_hidden_layers=2,
        prompt_length=4,
        segment_types=4,
        init_std=0.3,
    )
    with pytest.raises(TraceError, match="for 11 tokens only, and it reads tokens ahead.*example_inputs=") as found:
        fxprune.trace(transformers.CpmAntForCausalLM(config).eval())
    assert "\n" not in str(found.value)


def test_a_model_that_asks_whether_there_is_a_past_is_traced_on_whole_sequences() -> None:
    """With a past, its code widens the mask by the tokens of an image; a prompt of text starts without one."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GitConfig(
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = transformers.GitForCausalLM(config).eval()
    program = fxprune.trace(model)
    assert not program.interface.cache
    assert program.interface.fixed_length is None
    runners = EagerRunner(model, cache=False), GraphRunner(program.graph_module, program.interface)
    rung = compare_runners("", *runners, vocabulary=61, tolerance=1e-4, device=torch.device("cpu"), longer=24)
    assert rung.passed, rung

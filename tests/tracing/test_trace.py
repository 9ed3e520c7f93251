"""The front end: models become flat graphs that compute the same, with names, axes and cache entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fxprune.core.errors import TraceError
from fxprune.models.cache_names import cache_argument, cache_of
from fxprune.runtimes.compiled import CompiledRunner
from fxprune.runtimes.runners import EagerRunner, GraphRunner, Past, Runner, greedy
from fxprune.tracing.on_meta import ListsAsSlices
from fxprune.tracing.sample import sample_inputs
from fxprune.tracing.trace import trace
from fxprune.tracing.whole_sequences import fixed_length
from tests.families import FAMILIES, STEPS, build, located, steps


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_computes_what_the_model_does_at_every_length(family: str) -> None:
    program = located(family)
    eager = EagerRunner(program.references["eager"].module)
    traced = program.references["traced"]
    graph = GraphRunner(traced.module, traced.interface)  # type: ignore[arg-type]
    runners: tuple[Runner, ...] = (eager, graph)
    for batch, padding in STEPS.values():
        pasts: list[Past | None] = [None, None]
        for step in steps(batch, padding=padding):
            outs = []
            for index, runner in enumerate(runners):
                out, pasts[index] = runner.step(step.tokens, step.mask, step.positions, pasts[index])
                outs.append(out[step.mask[:, -step.tokens.shape[1] :].bool()])
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
def test_the_interface_of_a_language_model() -> None:
    interface = located("llama").interface
    argument = cache_argument(build("llama"))
    cache = tuple(f"{argument}_{index}" for index in range(4))
    assert interface.inputs == ("input_ids", "attention_mask", "position_ids", *cache)
    assert interface.outputs == ("logits", *cache)
    entries = [(entry.input, entry.output, entry.layer, entry.kind) for entry in interface.cache]
    assert entries == [(name, name, i // 2, ("key", "value")[i % 2]) for i, name in enumerate(cache)]
    batch = interface.dynamic_axes["input_ids"][0]
    assert set(interface.dynamic_axes["input_ids"]) == {0, 1}
    for name in cache:
        assert set(interface.dynamic_axes[name]) == {0, 2}
        assert interface.dynamic_axes[name][0] == batch
    assert (
        min(t.shape[axis] for name, t in interface.example_inputs.items() for axis in interface.dynamic_axes[name]) >= 2
    )


class Elsewhere(LlamaForCausalLM):
    """As classes outside the library are written: the cache goes in and comes out under the name it always had."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Any = None, past_key_values: Any = None, **options: Any
    ) -> CausalLMOutputWithPast:
        cache = past_key_values
        if cache is None and options.get("use_cache"):
            cache = DynamicCache(config=self.config)
        given = {str(cache_argument(self.model)): cache, "attention_mask": attention_mask, **options}
        hidden = self.model(input_ids, **given).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=cache)


@pytest.mark.smoke
def test_a_class_of_another_library_keeps_the_old_name_of_the_cache() -> None:
    model = Elsewhere(build("llama").config).eval()
    program = trace(model)
    assert [entry.input for entry in program.interface.cache] == [f"past_key_values_{index}" for index in range(4)]
    tokens = torch.tensor([[5, 8, 13, 21, 34]])
    graph = GraphRunner(program.graph_module, program.interface)
    expected = greedy(EagerRunner(model, cache=False), tokens, 4)
    assert torch.equal(greedy(graph, tokens, 4), expected)
    assert torch.equal(greedy(CompiledRunner(model, backend="eager"), tokens, 4), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_given_cache_may_have_either_name(name: str) -> None:
    model = build("llama", num_hidden_layers=1)
    taken = cache_argument(model)
    given = {name if key == taken else key: value for key, value in sample_inputs(model).items()}
    interface = trace(model, example_inputs=given).interface
    assert [entry.input for entry in interface.cache] == [f"{taken}_0", f"{taken}_1"]


@pytest.mark.smoke
def test_the_sample_has_a_left_padded_row_and_a_filled_cache() -> None:
    inputs = sample_inputs(build("llama", num_hidden_layers=1))
    mask: Tensor = inputs["attention_mask"]
    assert mask[0, 0] == 0
    assert mask[0, -1] == 1
    assert mask[1].all()
    assert mask.shape[1] == inputs["input_ids"].shape[1] + cache_of(inputs).get_seq_length()


def test_a_graph_has_nothing_but_flat_tensors_and_no_assertions() -> None:
    program = located("llama")
    graph_module = program.references["traced"].module
    assert isinstance(graph_module, torch.fx.GraphModule)
    assert [node.name for node in graph_module.graph.nodes if node.op == "placeholder"] == list(
        program.interface.inputs
    )
    assert not [
        node.name for node in graph_module.graph.nodes if "assert" in str(node.target) or "guard" in str(node.target)
    ]
    outputs = graph_module(*program.interface.example_inputs.values())
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(program.interface.outputs)


def test_parameters_are_shared_with_the_model() -> None:
    program = located("qwen2")
    model = program.references["eager"].module
    mine = {id(p) for p in program.graph_module.parameters()}
    assert mine == {id(p) for p in model.parameters()}


def test_the_source_remembers_where_the_model_came_from() -> None:
    source = located("llama").source
    assert source is not None
    assert source.name == source.model_class.__name__ == "LlamaForCausalLM"
    assert source.config.num_attention_heads == 6


def test_greedy_text_of_the_graph_is_the_models() -> None:
    program = located("llama")
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    graph = GraphRunner(program.graph_module, program.interface)
    eager = EagerRunner(program.references["eager"].module)
    assert torch.equal(greedy(graph, prompt, 6), greedy(eager, prompt, 6))


def test_a_model_without_weights_traces_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build("llama", num_hidden_layers=1, hidden_size=48, intermediate_size=4096)
    program = trace(model)
    assert {p.device.type for p in program.graph_module.parameters()} == {"meta"}
    assert len(program.interface.cache) == 2


class Plain(nn.Module):
    """Two inputs, two outputs, dropout that evaluation removes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(6, 8), nn.Linear(8, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.drop(self.up(x)).relu()
        return self.down(hidden) * scale, hidden


@pytest.mark.parametrize("by_name", [False, True])
def test_a_plain_module_is_traced_from_examples_by_position_or_by_name(by_name: bool) -> None:
    model = Plain()
    x, scale = torch.randn(3, 5, 6), torch.randn(3, 5, 1)
    inputs: Any = {"x": x, "scale": scale} if by_name else (x, scale)
    program = trace(model, example_inputs=inputs)
    assert program.interface.inputs == ("x", "scale")
    assert program.interface.outputs == ("output_0", "output_1")
    assert program.source is None
    assert set(program.interface.dynamic_axes["x"]) == {0, 1}
    for batch, length in ((3, 5), (2, 7), (1, 1)):
        x, scale = torch.randn(batch, length, 6), torch.randn(batch, length, 1)
        for mine, theirs in zip(program.graph_module(x, scale), model(x, scale), strict=True):
            assert torch.equal(mine, theirs)


def test_a_plain_module_without_examples_is_refused() -> None:
    with pytest.raises(TraceError, match="Plain is a plain nn.Module: pass example_inputs="):
        trace(Plain())


def test_what_torch_export_cannot_trace_is_refused_with_the_cause() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"could not trace Branches: [\s\S]*no data-dependent control flow") as caught:
        trace(Branches(), example_inputs=(torch.ones(2, 3),))
    assert caught.value.__cause__ is not None


def test_inputs_that_are_handed_back_untouched_are_no_outputs() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), count

    program = trace(Counter(), example_inputs=(torch.randn(3, 4), torch.zeros(3)))
    assert program.interface.outputs == ("output_0",)
    assert len(program.graph_module(*program.interface.example_inputs.values())) == 1


@pytest.mark.parametrize(
    ("index", "is_run"),
    [
        ((slice(None), [1]), True),
        ((..., [-2]), True),
        ([-1], True),
        ((None, slice(0, 2), [0, 1, 2]), True),
        ([-2, -1], True),
        ([0, 2], False),
        ([-1, 0], False),
        ([0, 0], False),
        ((0, [1]), False),
        (([0, 1], [1, 2]), False),
        ((slice(None), slice(None), [True, False, True, False]), False),
    ],
    ids=str,
)
def test_lists_of_positions_are_slices_where_they_are_runs(index: Any, is_run: bool) -> None:
    x = torch.arange(24).reshape(2, 3, 4) if index != [0, 2] else torch.arange(24).reshape(4, 3, 2)
    with ListsAsSlices():
        found = x[index]
    assert torch.equal(found, x[index])
    assert (found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == is_run


def test_positions_in_a_list_are_known_on_the_meta_device() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    with torch.device("meta"):
        model = FalconForCausalLM(
            FalconConfig(vocab_size=41, hidden_size=24, num_hidden_layers=1, num_attention_heads=4)
        )
    graph = trace(model).graph_module.graph
    assert not [name for node in graph.nodes if "lifted_tensor" in (name := str(node.target))]


def test_a_model_that_looks_for_padding_is_traced_on_the_meta_device() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=24, n_layer=1, n_head=4, pad_token_id=3))
    assert trace(model).interface.outputs[0] == "logits"
    assert model.config.pad_token_id == 3


class Chunked(nn.Module):
    """Chunks of 64 tokens in a Python loop, the last one padded, as reference code of linear attention has it."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to the same."""
        length = input_ids.shape[1]
        padding = (64 - length % 64) % 64
        chunks = nn.functional.pad(input_ids, (0, padding)).reshape(input_ids.shape[0], -1, 64)
        done = [chunks[:, index] * (index + 1) for index in range((length + padding) // 64)]
        return torch.cat(done, 1)[:, :length]


class Tokenwise(nn.Module):
    """No loop: it holds for every length."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to the same."""
        return input_ids.cumsum(1)


@pytest.mark.parametrize(("module", "length"), [(Chunked(), 11), (Tokenwise(), None)])
def test_a_loop_over_chunks_that_one_length_has_unrolled_is_seen_in_its_equations(
    module: nn.Module, length: int | None
) -> None:
    axes = dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    exported = torch.export.export(module, (torch.ones(2, 11, dtype=torch.long),), dynamic_shapes=(axes,), strict=False)
    assert fixed_length(exported) == length


def test_a_configuration_that_wants_no_cache_is_traced_with_one() -> None:
    """Training writes `use_cache: false` into the configurations that it saves."""
    model = build("llama")
    model.config.use_cache = False
    program = trace(model)
    assert len(program.interface.cache) == 2 * model.config.num_hidden_layers
    assert {entry.output for entry in program.interface.cache} <= set(program.interface.outputs)
    assert model.config.use_cache is False


def test_a_number_of_chunks_that_left_no_equation_fixes_the_length() -> None:
    config = FalconH1Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, mamba_chunk_size=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
        mamba_n_groups=1, mamba_d_state=16, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    program = trace(FalconH1ForCausalLM(config).eval())
    assert program.interface.fixed_length == program.interface.example_inputs["input_ids"].shape[1]


def test_an_encoder_decoder_that_classifies_makes_its_decoders_tokens_itself() -> None:
    config = BartConfig(
        vocab_size=61,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    assert "decoder_input_ids" not in sample_inputs(BartForSequenceClassification(config))
    assert "decoder_input_ids" in sample_inputs(BartForConditionalGeneration(config))


def test_the_size_of_images_is_the_vision_parts_or_any() -> None:
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_channels=1)
    assert sample_inputs(ResNetForImageClassification(resnet))["pixel_values"].shape == (2, 1, 224, 224)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipConfig(vision_config=vision | {"image_size": 24, "patch_size": 8}, text_config=vision)
    model = SiglipForImageClassification(siglip).eval()
    assert sample_inputs(model)["pixel_values"].shape == (2, 3, 24, 24)
    assert trace(model).interface.outputs == ("logits",)

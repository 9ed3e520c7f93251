"""Heads of classes that take counts and split sizes from their own integers: found, proved by logits, or refused."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BigBirdConfig,
    BigBirdForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    DistilBertConfig,
    HYV4Config,
    HYV4ForCausalLM,
)
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.llama import modeling_llama

import fxprune
import fxprune.checkpoints.checkpoint
from fxprune.channels.front_end import LOCATE
from fxprune.checkpoints.checkpoint import classify, load
from fxprune.checkpoints.trial import relative_error
from fxprune.core.errors import CheckpointError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.runtimes.runners import EagerRunner, GraphRunner, greedy
from tests.proof import slimmed
from tests.slices import (
    HIDDEN,
    SMALL,
    Keep,
    consumer_cuts_of,
    cut,
    cuts_of,
    expected_of,
    inputs_of,
    json_of,
    logits,
    make_model,
    masked,
    save_slim,
    source_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from tests.slices import Cut

DIM = HIDDEN // 4  # of a head, where the class derives it


def rows(heads: Sequence[int], dim: int = DIM, start: int = 0, size: int = 1) -> list[int]:
    """Rows of heads, each `size` times as wide as a head."""
    return [start + head * size * dim + row for head in heads for row in range(size * dim)]


def thirds(heads: Sequence[int]) -> list[int]:
    """Rows of all query heads, then of all key heads, then of all value heads."""
    return [row for part in range(3) for row in rows(heads, start=part * HIDDEN)]


def shared(heads: Sequence[int]) -> list[int]:
    """Rows of query heads, and those of the one key and value head behind them."""
    return [*rows(heads), *range(HIDDEN, HIDDEN + 2 * DIM)]


def grouped(heads: Sequence[int]) -> list[int]:
    """Two groups, each of two query heads, a key and a value head; a group goes with both of its query heads."""
    kept = {group: [head % 2 for head in heads if head // 2 == group] for group in (0, 1)}
    return [row for group, own in kept.items() if own for row in rows([*own, 2, 3], start=group * 4 * DIM)]


def separate(pattern: str) -> Callable[[Sequence[int]], list[Cut]]:
    """Cuts of separate projections; `pattern` is that of the three that write, `{}` that of the one that reads."""
    writes, reads = pattern.split(" ")
    return lambda heads: [(rf"{writes}\.(weight|bias)", 0, rows(heads)), (rf"{reads}\.weight", 1, rows(heads))]


def fused(write: str, read: str, kept: Callable[[Sequence[int]], list[int]]) -> Callable[[Sequence[int]], list[Cut]]:
    return lambda heads: [(rf"{write}\.(weight|bias)", 0, kept(heads)), (rf"{read}\.weight", 1, rows(heads))]


def conv(heads: Sequence[int]) -> list[Cut]:
    """GPT-2's weights are (in, out)."""
    written = [(r"attn\.c_attn\.weight", 1, thirds(heads)), (r"attn\.c_attn\.bias", 0, thirds(heads))]
    return [*written, (r"attn\.c_proj\.weight", 0, rows(heads))]


@dataclass(frozen=True)
class Case:
    """A class, how its heads are cut, and the attributes that must say so."""

    model_type: str
    changes: dict[str, Any]
    cuts: Callable[[Sequence[int]], list[Cut]]
    attributes: set[str]
    heads: tuple[Sequence[int], ...] = ((1, 3), (0, 1, 2, 3), (0, 2, 3))


FALCON = {"alibi": False, "bias": False}
FALCON_PARTS = (r"self_attention\.query_key_value", r"self_attention\.dense")
CASES: dict[str, Case] = {
    "gpt2": Case("gpt2", {}, conv, {"split_size"}),
    "gpt_bigcode": Case(
        "gpt_bigcode", {}, fused(r"attn\.c_attn", r"attn\.c_proj", shared), {"embed_dim", "num_key_value_groups"}
    ),
    "gpt_bigcode, a key head for each": Case(
        "gpt_bigcode",
        {"multi_query": False},
        fused(r"attn\.c_attn", r"attn\.c_proj", lambda heads: rows(heads, size=3)),
        {"num_heads"},
    ),
    "falcon, one key head": Case(
        "falcon", {**FALCON, "multi_query": True}, fused(*FALCON_PARTS, shared), {"num_heads"}
    ),
    "falcon, a key head for each": Case(
        "falcon",
        {**FALCON, "multi_query": False, "num_kv_heads": 4},
        fused(*FALCON_PARTS, lambda heads: rows(heads, size=3)),
        {"num_heads", "num_kv_heads"},
    ),
    "falcon, groups": Case(
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        fused(*FALCON_PARTS, grouped),
        {"num_heads", "num_kv_heads"},
        ((2, 3), (1, 2), (0, 1, 2, 3)),
    ),
    "opt": Case("opt", {}, separate(r"self_attn\.[qkv]_proj self_attn\.out_proj"), {"num_heads"}),
    "gptj": Case(
        "gptj",
        {"rotary_dim": 4, "n_inner": 24, "n_positions": 64, "head_dim": None},
        separate(r"attn\.[qkv]_proj attn\.out_proj"),
        # Since transformers 5.24 the class takes the number from the width of its projections.
        {"num_attention_heads"} if hasattr(GPTJAttention, "_split_heads") else set(),
    ),
    "stablelm": Case(
        "stablelm",
        {"head_dim": None, "num_key_value_heads": 4},
        separate(r"self_attn\.[qkv]_proj self_attn\.o_proj"),
        {"num_heads", "num_key_value_heads"},
    ),
}


def made(case: Case) -> tuple[PreTrainedModel, dict[str, Tensor], PreTrainedModel]:
    """The dense model, what three of its four layers keep, and the dense model without the removed heads."""
    model = make_model(case.model_type, **case.changes)
    parts = [
        [(rf".*\.{layer}\.{pattern}", axis, kept) for pattern, axis, kept in case.cuts(heads)]
        for layer, heads in enumerate(case.heads)
    ]
    return (
        model,
        cut(model.state_dict(), [piece for part in parts for piece in part]),
        masked(model, [part[-1] for part in parts]),
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_layer_may_have_heads_of_its_own(case: Case, tmp_path: Path) -> None:
    model, tensors, reference = made(case)
    assert (logits(model) - logits(reference)).abs().max() > 0.1
    info = save_slim(tensors, model, tmp_path / "out", expected=expected_of(reference))
    assert info.kind == "mixed"
    assert {name for values in info.constants.values() for name in values} == case.attributes
    assert all(type(value) is int for values in info.constants.values() for value in values.values())
    loaded = load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-5, rtol=1e-5)
    prompt = {"max_new_tokens": 8, "do_sample": False}
    ids = torch.tensor([[3, 14, 15]])
    assert loaded.generate(ids, **prompt).tolist() == reference.generate(ids, **prompt).tolist()
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-5, rtol=1e-5)


def test_query_heads_and_groups_that_a_class_derives_from_its_widths(tmp_path: Path) -> None:
    """Query heads, key heads and query heads for each key head: three integers, and fields that mislead."""
    model = make_model("stablelm", hidden_size=48, head_dim=None, num_attention_heads=6, num_hidden_layers=3)
    cuts: list[Cut] = []
    for layer, (heads, kv) in enumerate([((3, 4, 5), (1,)), ((0, 1, 4, 5), (0, 1)), ((2,), (0,))]):
        block = rf".*\.{layer}\.self_attn"
        cuts += [(rf"{block}\.q_proj\.weight", 0, rows(heads, 8)), (rf"{block}\.[kv]_proj\.weight", 0, rows(kv, 8))]
        cuts += [(rf"{block}\.o_proj\.weight", 1, rows(heads, 8))]
    reference = masked(model, cuts[2::3])
    info = save_slim(cut(model.state_dict(), cuts), model, tmp_path / "out", expected=expected_of(reference))
    assert info.layer_overrides == {}
    assert list(info.constants.values()) == [
        {"num_heads": 3, "num_key_value_heads": 1, "num_key_value_groups": 3},
        {"num_heads": 4, "num_key_value_heads": 2, "num_key_value_groups": 2},
        {"num_heads": 1, "num_key_value_heads": 1, "num_key_value_groups": 1},
    ]
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(reference), atol=1e-5, rtol=1e-5)


def test_eager_attention_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", **SMALL)
    expected = expected_of(model)
    assert relative_error(model, expected) < 1e-5
    eager = modeling_llama.eager_attention_forward

    def doubled(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, weights = eager(*args, **kwargs)
        return 2 * output, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", doubled)
    torch.testing.assert_close(expected_of(model).logits, expected.logits)
    assert relative_error(model, expected) > 0.01
    assert model.config._attn_implementation == "sdpa"


ENCODERS: dict[str, tuple[Any, str]] = {
    "bert": (BertConfig, r"attention\.self\.(query|key|value) attention\.output\.dense"),
    "distilbert": (DistilBertConfig, r"attention\.[qkv]_lin attention\.out_lin"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_heads_of_encoders(name: str, tmp_path: Path) -> None:
    config_class, pattern = ENCODERS[name]
    config = config_class(
        vocab_size=61,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        pad_token_id=0,
    )
    if name == "distilbert":
        config.hidden_dim = 24
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    parts = [
        [(rf".*\.{layer}\.{part}", axis, kept) for part, axis, kept in separate(pattern)(heads)]
        for layer, heads in enumerate([(1, 3), (0, 2, 3)])
    ]
    reference = masked(model, [part[-1] for part in parts])
    assert (logits(model) - logits(reference)).abs().max() > 0.1
    tensors = cut(model.state_dict(), [piece for part in parts for piece in part])
    save_slim(tensors, model, tmp_path / "out", expected=expected_of(reference))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(reference), atol=1e-5, rtol=1e-5)


ALIBI: dict[str, tuple[Case, str, str]] = {
    "bloom": (
        Case("bloom", {}, fused(*FALCON_PARTS, lambda heads: rows(heads, size=3)), set()),
        "transformer.h.0.self_attention: BloomAttention",
        "alibi",
    ),
    "mpt": (
        Case("mpt", {}, fused(r"attn\.Wqkv", r"attn\.out_proj", thirds), set()),
        "transformer.blocks.0.attn: MptAttention",
        "position_bias",
    ),
    "falcon": (
        Case(
            "falcon",
            {"alibi": True, "multi_query": False, "num_kv_heads": 4, "bias": False},
            fused(*FALCON_PARTS, lambda heads: rows(heads, size=3)),
            set(),
        ),
        "transformer.h.0.self_attention: FalconAttention",
        "attention_mask",  # its fused kernel gets the position bias there
    ),
}


@pytest.mark.parametrize("name", ALIBI)
def test_slopes_of_all_dense_heads_are_refused_by_argument(name: str, tmp_path: Path) -> None:
    case, block, argument = ALIBI[name]
    model, tensors, reference = made(case)
    message = re.escape(f"{block} gets `{argument}` with a row for each of 4 heads") + ".* layer with 2 heads.* ONNX"
    with pytest.raises(CheckpointError, match=message):
        save_slim(tensors, model, tmp_path / "out", expected=expected_of(reference))
    assert list(tmp_path.iterdir()) == []


def test_logits_decide_where_shapes_do_not(tmp_path: Path) -> None:
    """Two heads of ten channels and four of five have the same shapes."""
    model, tensors, reference = made(replace(CASES["opt"], heads=((1, 3),)))
    info = save_slim(tensors, model, tmp_path / "heads", expected=expected_of(reference))
    assert info.constants == {"model.decoder.layers.0.self_attn": {"num_heads": 2}}
    halved = load(tmp_path / "heads")
    halved.model.decoder.layers[0].self_attn.num_heads = 4
    halved.model.decoder.layers[0].self_attn.head_dim = 5
    info = save_slim(tensors, model, tmp_path / "dims", expected=expected_of(halved))
    assert info.constants == {"model.decoder.layers.0.self_attn": {"head_dim": 5}}


def test_heads_channels_and_layers_at_once_and_again(tmp_path: Path) -> None:
    """What was loaded can be narrowed and saved once more."""
    model = make_model("gpt2")
    cuts = [(rf".*\.1\.{pattern}", axis, kept) for pattern, axis, kept in conv((1, 3))]
    cuts += cuts_of(model, [Keep(), Keep(mlp=range(3, 19))])
    tensors = cut(model.state_dict(), cuts)
    tensors = {name: tensor for name, tensor in tensors.items() if ".h.0." not in name}
    reference = masked(model, [piece for piece in cuts if "c_proj" in piece[0]])
    reference.transformer.h = reference.transformer.h[1:]
    reference.config.num_hidden_layers = 3
    info = save_slim(tensors, model, tmp_path / "out", expected=expected_of(reference))
    assert info.constants == {"transformer.h.0.attn": {"split_size": 20}}
    loaded = load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-5, rtol=1e-5)
    again: list[Cut] = [(rf".*\.0\.{pattern}", axis, kept) for pattern, axis, kept in again_conv()]
    narrower = masked(loaded, again[-1:])
    info = save_slim(cut(loaded.state_dict(), again), loaded, tmp_path / "again", expected=expected_of(narrower))
    assert info.constants == {"transformer.h.0.attn": {"split_size": 10}}
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(narrower), atol=1e-5, rtol=1e-5)


def again_conv() -> list[Cut]:
    """The second of two heads stays."""
    kept = [part * 2 * DIM + row for part in range(3) for row in rows([1])]
    written: list[Cut] = [(r"attn\.c_attn\.weight", 1, kept), (r"attn\.c_attn\.bias", 0, kept)]
    return [*written, (r"attn\.c_proj\.weight", 0, rows([1]))]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_half_precision_is_compared_in_the_dtype_of_the_reference(dtype: torch.dtype | None, tmp_path: Path) -> None:
    _, tensors, reference = made(CASES["gpt2"])
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    reference = reference.to(torch.bfloat16)
    model = copy.deepcopy(reference)
    expected = expected_of(reference if dtype is None else reference.to(dtype), dtype)
    info = save_slim(tensors, model, tmp_path / "out", expected=expected)
    assert set(info.constants["transformer.h.0.attn"]) == {"split_size"}
    assert load(tmp_path / "out").dtype == torch.bfloat16
    if dtype is not None:
        with pytest.raises(CheckpointError, match="computes something else"):
            save_slim(tensors, model, tmp_path / "off", expected=replace(expected, logits=expected.logits * 1.01))


# --- every kind of checkpoint ---------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, list[Keep], str]] = {
    "uniform": ("llama", [Keep(mlp=range(16))] * 3, "uniform"),
    "mixed": ("llama", [Keep(mlp=range(16)), Keep(heads=(2, 3), kv=(1,))], "mixed"),
    "with integers": ("opt", [Keep(heads=(1, 3), kv=(1, 3))], "mixed"),
}


@pytest.fixture(name="kind", params=KINDS)
def _kind(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Tensor], PreTrainedModel, str]:
    name, keeps, kind = KINDS[request.param]
    model = make_model(name, **{**SMALL, **({"word_embed_proj_dim": 32} if name == "opt" else {})})
    tensors = cut(model.state_dict(), cuts_of(model, keeps))
    return model, tensors, masked(model, consumer_cuts_of(model, keeps)), kind


def test_the_right_logits_are_reproduced(kind: Any, tmp_path: Path) -> None:
    model, tensors, reference, name = kind
    assert save_slim(tensors, model, tmp_path / "out", expected=expected_of(reference)).kind == name


def test_other_logits_are_refused_with_the_error(kind: Any, tmp_path: Path) -> None:
    model, tensors, _, _ = kind
    message = r"computes something else.* relative error of its logits is [\d.e-]+, 0.0001 is allowed"
    with pytest.raises(CheckpointError, match=message):
        save_slim(tensors, model, tmp_path / "out", expected=expected_of(model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["uniform", "mixed"])
def test_the_written_checkpoint_itself_is_compared(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a layout was chosen without regard to the logits."""
    monkeypatch.setattr(fxprune.checkpoints.checkpoint, "classify", lambda *args, **more: classify(*args[:3], **more))
    model = make_model("llama", **SMALL)
    tensors = cut(model.state_dict(), cuts_of(model, KINDS[name][1]))
    with pytest.raises(
        CheckpointError, match=r"rebuilt with fxprune\.load computes something else.*0\.0001 is allowed"
    ):
        save_slim(tensors, model, tmp_path / "out", expected=expected_of(model))
    assert list(tmp_path.iterdir()) == []


def test_an_error_at_padding_is_none(tmp_path: Path) -> None:
    model = make_model("llama", **SMALL)
    expected = expected_of(model)
    hidden = inputs_of(model)["attention_mask"] == 0
    expected.logits[hidden] = torch.nan
    save_slim(model.state_dict(), model, tmp_path / "out", expected=expected)
    expected.logits[~hidden] = torch.nan
    with pytest.raises(CheckpointError, match="logits is inf"):
        classify(model.state_dict(), source_of(model), None, expected)


def test_the_manifest_holds_the_integers(tmp_path: Path) -> None:
    model, tensors, reference = made(CASES["gpt2"])
    save_slim(tensors, model, tmp_path / "out", expected=expected_of(reference))
    assert json_of(tmp_path / "out")["constants"] == {
        "transformer.h.0.attn": {"split_size": 20},
        "transformer.h.2.attn": {"split_size": 30},
    }


# --- classes that change while they run -----------------------------------------------------------------------------


def saved(model: PreTrainedModel, heads: dict[str, list[int]], out: Path) -> PreTrainedModel:
    """The checkpoint of a model that has run and keeps some heads, loaded again."""
    program = fxprune.trace(model)
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
    program = program.replace(plan=Plan.of(heads))
    passes = [build_pass(name, {}) for name in ("insert_masks", "slim")]
    program = Pipeline([*passes, build_pass("save", {"out": str(out)})])(program).program
    loaded = load(out)
    expected = greedy(GraphRunner(program.graph_module, program.interface), torch.arange(4, 10)[None], 3)
    assert torch.equal(greedy(EagerRunner(loaded), torch.arange(4, 10)[None], 3), expected)
    return loaded


def test_a_class_that_exchanges_its_attention_for_short_texts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
        initializer_range=0.2,
    )
    model = BigBirdForCausalLM(config).eval()
    with pytest.raises(CheckpointError, match=r"layer\.1\.attention\.self: .* cannot run with the slim shapes"):
        saved(model, {"bert.encoder.layer.1.attention": [0, 2]}, tmp_path / "out")


def test_a_table_that_is_rounded_when_it_is_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=61, n_positions=64, n_embd=32, dff=40, n_layer=2, n_head=4, initializer_range=0.2)
    model = CTRLLMHeadModel(config).eval().to(torch.bfloat16)
    loaded = saved(model, {"transformer.h.1.multi_head_attention": [0, 2]}, tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [(3, 3), (4, 3), (3, 2)])
def test_a_number_of_heads_that_no_shape_says_goes_with_the_one_that_shapes_say(
    kept: tuple[int, int], tmp_path: Path
) -> None:
    """Keys come from a latent: `num_key_value_heads` has no shape, and the class divides the heads by it."""
    torch.manual_seed(0)
    config = HYV4Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = HYV4ForCausalLM(config).eval()
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(fxprune.trace(model)).program
    groups = [group for group in program.groups if group.kind == "attention"]
    done = slimmed(program, Plan.of({group.name: range(count) for group, count in zip(groups, kept, strict=True)}))
    fxprune.save(done, tmp_path / "slim")
    slim: Any = load(tmp_path / "slim")
    heads = [(layer.self_attn.num_heads, layer.self_attn.num_key_value_groups) for layer in slim.model.layers]
    assert heads == [(count, 1) for count in kept]
    ids = torch.arange(22).reshape(2, 11) % 61
    positions = torch.arange(11).repeat(2, 1)
    runners = EagerRunner(slim, cache=False), GraphRunner(done.graph_module, done.interface)
    got = [runner.step(ids, torch.ones_like(ids), positions, None)[0] for runner in runners]
    torch.testing.assert_close(*got, atol=1e-5, rtol=0)

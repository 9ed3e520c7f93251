"""What a checkpoint directory holds, what may be given to `save`, and that nothing is written that cannot be read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from fxprune.checkpoints.checkpoint import classify, load, save
from fxprune.core.errors import CheckpointError, OutputError, UsageError
from fxprune.models.shards import write_shards
from fxprune.models.skeleton import fill_skeleton
from tests.slices import SMALL, Keep, cut, cuts_of, json_of, logits, make_model, source_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

UNKNOWN = "<unk>"


def tiny_llama(**changes: Any) -> PreTrainedModel:
    """A llama of three layers with 24 MLP channels and 2 KV heads of 8 channels."""
    return make_model("llama", **SMALL, **changes)


def narrowed(model: PreTrainedModel, widths: Sequence[int]) -> dict[str, torch.Tensor]:
    """The state dict with the first channels of each layer's MLP."""
    return cut(model.state_dict(), cuts_of(model, [Keep(mlp=range(width)) for width in widths]))


def test_manifest_records_what_was_done(tmp_path: Path) -> None:
    model = tiny_llama()
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    biases = {"model.layers.1.mlp.down_proj.bias": torch.randn(32)}
    tensors = narrowed(model, (16, 16, 16)) | biases
    source = source_of(model, path=dense)
    info = save(tensors, tmp_path / "out", source=source, plan={"mlp": {"kept": (1, 2)}}, history=[{"ratio": 0.5}])
    record = json_of(tmp_path / "out")
    assert record["schema_version"] == 2
    assert record["kind"] == "uniform"
    assert record["plan"] == {"mlp": {"kept": [1, 2]}}
    assert record["history"] == [{"ratio": 0.5}]
    assert record["source"]["name"] == "tiny"
    assert len(record["source"]["sha256"]) == 64
    assert record["versions"].keys() >= {"fxprune", "torch", "transformers", "safetensors"}
    assert record["parameters"]["model.layers.1.mlp.down_proj.weight"] == {"dense": [32, 24], "slim": [32, 16]}
    assert "model.embed_tokens.weight" not in record["parameters"]
    assert record["added_biases"] == ["model.layers.1.mlp.down_proj.bias"]
    assert len(record["zero_biases"]) == 8  # gate, up and down of three layers, less the one that was added
    assert record["config_overrides"] == {"intermediate_size": 16, "mlp_bias": True}
    assert record["files"] == dict(info.files)
    assert info.files.keys() == {"model.safetensors"}
    config = json_of(tmp_path / "out", "config.json")
    assert (config["num_attention_heads"], config["head_dim"], config["intermediate_size"]) == (4, 8, 16)
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_loading_allocates_nothing_before_the_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    save(narrowed(model, (16, 24, 8)), tmp_path / "out", source=source_of(model), plan={}, history=[])
    seen: list[bool] = []

    def watch(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        seen.extend(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        fill_skeleton(model, tensors, device)

    monkeypatch.setattr("fxprune.checkpoints.checkpoint.fill_skeleton", watch)
    random = torch.get_rng_state()
    load(tmp_path / "out")
    assert seen
    assert all(seen)
    assert torch.equal(torch.get_rng_state(), random)


def test_half_precision_is_kept_and_dtype_converts(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    tensors = narrowed(model, (16, 16, 16))
    save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[])
    assert json_of(tmp_path / "out", "config.json")["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in load(tmp_path / "out").parameters()} == {torch.bfloat16}
    wide = load(tmp_path / "out", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert wide.config.dtype == torch.float32
    assert torch.isfinite(logits(wide)).all()


def test_tensors_of_several_dtypes_are_kept_as_they_are(tmp_path: Path) -> None:
    model = tiny_llama()
    tensors = narrowed(model, (16, 16, 16))
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    info = save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[])
    assert info.kind == "mixed"
    assert "dtypes" in info.reason
    assert load(tmp_path / "out").model.norm.weight.dtype == torch.bfloat16


def test_shards_and_index(tmp_path: Path) -> None:
    model = tiny_llama()
    tensors = narrowed(model, (16, 16, 16))
    info = save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[], max_shard_size=20_000)
    assert len(info.files) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(tmp_path / "out")), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    with pytest.raises(UsageError, match="max_shard_size"):
        save(tensors, tmp_path / "b", source=source_of(model), plan={}, history=[], max_shard_size="many")


def test_views_and_shared_storage_are_written_apart(tmp_path: Path) -> None:
    model = tiny_llama()  # not tied by its configuration
    tensors = narrowed(model, (16, 16, 16))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    large = torch.randn(100, 100)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = large[:32, :16]
    save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[])
    assert torch.equal(load(tmp_path / "out").state_dict()[name], large[:32, :16])
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4 * sum(t.numel() for t in tensors.values()) + 9000


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_may_come_under_either_name_and_stay_tied(name: str, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    tensors = narrowed(model, (16, 16, 16))
    both = {"lm_head.weight", "model.embed_tokens.weight"}
    given = {key: tensor for key, tensor in tensors.items() if key not in both - {name}}
    save(given, tmp_path / "out", source=source_of(model), plan={}, history=[])
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, tensors[name])
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied"):
        classify(tensors, source_of(model))


def test_tokenizer_chat_template_and_generation_config_are_written(tmp_path: Path) -> None:
    model = tiny_llama()
    words = Tokenizer(WordLevel({UNKNOWN: 0, "a": 1, "b": 2}, unk_token=UNKNOWN))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    generation = GenerationConfig(max_new_tokens=3, temperature=0.5)  # transformers itself refuses to save this one
    source = source_of(model, tokenizer=tokenizer, generation_config=generation)
    save(narrowed(model, (16, 24, 24)), tmp_path / "out", source=source, plan={}, history=[])
    reread = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reread.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b"
    loaded = load(tmp_path / "out")
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.temperature) == (3, 0.5)


def test_computed_buffers_may_be_given_and_are_checked(tmp_path: Path) -> None:
    model = tiny_llama()
    name = "model.rotary_emb.inv_freq"
    tensors = narrowed(model, (16, 16, 16)) | {name: model.model.rotary_emb.inv_freq}
    save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[])
    tensors[name] = tensors[name] * 2
    with pytest.raises(CheckpointError, match=r"does not load back .*inv_freq"):
        save(tensors, tmp_path / "b", source=source_of(model), plan={}, history=[])
    assert not (tmp_path / "b").exists()


def test_shapes_that_nothing_can_express_are_refused() -> None:
    model = tiny_llama()
    tensors = narrowed(model, (24, 24, 24))
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(31)
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm\.weight \[31\]"):
        classify(tensors, source_of(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing \['model\.norm\.weight'\]"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), r"unknown \['model\.extra\.weight'\]"),
        (lambda t: t.update({"model.norm.bias": torch.ones(32)}), r"unknown \['model\.norm\.bias'\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, device="meta")}), "meta device"),
    ],
)
def test_state_dicts_of_something_else_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = tiny_llama()
    tensors = narrowed(model, (16, 16, 16))
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        classify(tensors, source_of(model))


def test_classes_unknown_to_transformers_are_refused() -> None:
    class LlamaForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    class Other(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    model = tiny_llama()
    for model_class, message in ((LlamaForCausalLM, "not transformers' own"), (Other, "no model class called 'Other'")):
        with pytest.raises(CheckpointError, match=message):
            classify(model.state_dict(), source_of(model, model_class=model_class))


@pytest.mark.parametrize(("plan", "history"), [({"a": object()}, []), ({}, [{1, 2}]), ({"a": math.nan}, [])])
def test_plans_that_are_not_json_are_refused(
    plan: Mapping[str, object], history: Sequence[object], tmp_path: Path
) -> None:
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="must be JSON"):
        save(model.state_dict(), tmp_path / "out", source=source_of(model), plan=plan, history=history)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_proof_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    tensors = narrowed(model, (16, 24, 8))
    target = tmp_path / "out"
    save(tensors, target, source=source_of(model), plan={}, history=[])
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(OutputError, match="overwrit"):
        save(tensors, target, source=source_of(model), plan={}, history=[])

    def flip_a_bit(given: Mapping[str, torch.Tensor], directory: Path, size: int | str, stem: str) -> dict[str, str]:
        wrong = dict(given)
        wrong["model.norm.weight"] = wrong["model.norm.weight"].clone()
        wrong["model.norm.weight"].view(torch.int32)[5] ^= 1
        return write_shards(wrong, directory, size, stem)

    monkeypatch.setattr("fxprune.checkpoints.checkpoint.write_shards", flip_a_bit)
    with pytest.raises(CheckpointError, match=r"does not load back with fxprune\.load: \['model\.norm\.weight'\]"):
        save(tensors, target, source=source_of(model), plan={}, history=[], overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    save(tensors, target, source=source_of(model), plan={"new": 1}, history=[], overwrite=True)
    assert json_of(target)["plan"] == {"new": 1}


def test_scalars_of_the_graph_are_not_of_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    name = "model.layers.0.self_attn.lifted_tensor_0"
    tensors = narrowed(model, (16, 16, 16)) | {name: torch.tensor([-1.0])}
    save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[])
    assert name not in load(tmp_path / "out").state_dict()
    with pytest.raises(CheckpointError, match=r"unknown .*lifted_tensor_0"):
        classify(tensors | {name: torch.ones(4)}, source_of(model))


def test_a_bias_alone_cannot_be_overlooked_by_plain_loading(tmp_path: Path) -> None:
    model = make_model("mistral", **SMALL)
    name = "model.layers.1.mlp.down_proj.bias"
    tensors = {**model.state_dict(), name: torch.ones(32)}
    info = save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[])
    assert (info.kind, info.added_biases) == ("mixed", (name,))
    assert torch.equal(load(tmp_path / "out").state_dict()[name], tensors[name])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[name], tensors[name])
    with pytest.raises(ValueError, match="needs `import fxprune`"):  # it would leave the bias out with a mere warning
        type(model).from_pretrained(tmp_path / "out")

"""Streaming: the same weights as in memory, the same bits after an interruption, and trouble told by name."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from benchmarks.loader_fuzz import reseal
from fxprune.checkpoints.checkpoint import load
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CheckpointError, OutputError, PlanError, PreconditionError, UsageError
from fxprune.core.pipeline import build_pass
from fxprune.flows.streaming_run import prune_streaming
from fxprune.models.manifest import Manifest, SourceRecord, read_manifest, write_manifest
from fxprune.models.shards import hash_dense_weights, hash_file
from fxprune.passes.magnitude import Magnitude
from fxprune.passes.sparsegpt import SparseGpt
from fxprune.passes.wanda import Wanda
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.trace import trace
from fxprune.tracing.weight_masks import read_masks
from fxprune.weights.streaming import StreamingOutput
from tests.conftest import TINY_LINES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(TINY_LINES * 40))
    return file


@pytest.fixture
def dense(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tied llama of three layers in bfloat16, in several shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    path = tmp_path / "dense"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(path)
    assert (path / "model.safetensors.index.json").is_file()
    return path


def options(text: Path, **more: Any) -> dict[str, Any]:
    return {"calibration": str(text), "samples": 6, "seq_len": 16, "batch_size": 2, **more}


def describe(directory: Path, kind: Literal["uniform", "mixed"] = "uniform") -> None:
    """Give a checkpoint an `fxprune.json` with the hashes of its shards."""
    files = {path.name: hash_file(path) for path in directory.glob("model-*.safetensors")}
    empty: dict[str, Any] = {"config_overrides": {}, "layer_overrides": {}, "parameters": {}, "plan": {}}
    source = SourceRecord(name="dense")
    manifest = Manifest(
        kind=kind,
        reason="",
        source=source,
        versions={},
        history=(),
        added_biases=(),
        zero_biases=(),
        files=files,
        **empty,
    )
    write_manifest(directory, manifest)


def stop(*_: int) -> None:
    """An interruption after the first block."""
    raise KeyboardInterrupt


def weights_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if path.name.startswith("weight_masks"):
                continue
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


@pytest.mark.parametrize("method", [Wanda, SparseGpt])
def test_streamed_weights_are_those_of_a_run_in_memory(
    dense: Path, text: Path, tmp_path: Path, method: type[SparseGpt]
) -> None:
    report = prune_streaming(dense, tmp_path / "out", method(**options(text)))
    loaded = load_model(dense)
    program = trace(loaded.model, tokenizer=loaded.tokenizer)
    program = method(**options(text))(build_pass("lift_linears", {})(program).program).program
    streamed = weights_of(tmp_path / "out")
    assert set(streamed) == set(weights_of(dense))
    for name in program.weight_masks:
        mine = get_attribute(program.graph_module, name).weight.detach()
        assert torch.equal(streamed[f"{name}.weight"], mine), name
        assert streamed[f"{name}.weight"].dtype is torch.bfloat16
    assert report["sparsity"]["removed_share"] == pytest.approx(0.5, abs=0.01)
    assert len(report["sparsity"]["linears"]) == len(program.weight_masks) == 21
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not (tmp_path / ".out.streaming").exists()
    assert {"work", "blocks", "activation_bytes"} <= report["sparsity"].keys()
    assert report["sparsity"]["work"].keys() == program.results["sparsity"]["work"].keys()
    assert report["sparsity"]["work"]["gram_tflop"] == program.results["sparsity"]["work"]["gram_tflop"]
    assert report["peak_rss_bytes"] > 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.kind, manifest.history[0]["name"]) == ("uniform", method.name)  # type: ignore[index, call-overload]
    assert set(manifest.files) == {p.name for p in (tmp_path / "out").glob("model-*.safetensors")}
    assert manifest.source.sha256 == hash_dense_weights(dense)
    reloaded = load(tmp_path / "out").state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in streamed.items())
    masks = read_masks(tmp_path / "out")
    assert set(masks) == {f"{name}.weight" for name in program.weight_masks}
    assert all(torch.equal(masks[f"{name}.weight"], mask) for name, mask in program.weight_masks.items())


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_goes_on_with_the_same_bits(dense: Path, text: Path, tmp_path: Path, after: int) -> None:
    prune_streaming(dense, tmp_path / "whole", SparseGpt(**options(text)))

    def interrupt(done: int, blocks: int) -> None:
        assert blocks == 3
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text)), on_block=interrupt)
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    report = prune_streaming(
        dense, tmp_path / "out", SparseGpt(**options(text)), on_block=lambda done, _: seen.append(done)
    )
    assert seen == list(range(after + 1, 4))
    whole, again = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert set(whole) == set(again)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(report["sparsity"]["linears"]) == 21


def test_unfinished_work_of_another_run_is_not_continued(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text)), on_block=stop)
    with pytest.raises(OutputError, match="other options"):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text, sparsity=0.4)))
    staging = tmp_path / ".out.streaming"
    shard = next(staging.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing or was changed"):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text)))
    prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text, sparsity=0.4)), restart=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_full_disk_leaves_what_was_finished(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_streaming(dense, tmp_path / "whole", Wanda(**options(text)))
    usage = shutil.disk_usage(tmp_path)
    calls = 0

    def full(_: Any) -> Any:
        nonlocal calls
        calls += 1
        return usage if calls < 4 else usage._replace(free=0)

    monkeypatch.setattr("fxprune.weights.streaming.shutil.disk_usage", full)
    with pytest.raises(CheckpointError, match="make room and run the same command again"):
        prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))
    staging = tmp_path / ".out.streaming"
    assert json.loads((staging / "progress.json").read_bytes())["next_stage"] > 0
    assert not list(staging.glob("*.partial"))
    monkeypatch.undo()
    prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))
    whole, again = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_cannot_be_streamed_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name a text file"):
        prune_streaming(dense, tmp_path / "out", SparseGpt())
    with pytest.raises(UsageError, match="allocation=loss"):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text, allocation="loss")))
    with pytest.raises(UsageError, match="needs no calibration"):
        prune_streaming(dense, tmp_path / "out", Magnitude())
    with pytest.raises(PlanError, match=r"down_proj has 56 inputs.*groups of 16"):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text, pattern="4:16")))


def test_a_missing_shard_is_named(dense: Path, text: Path, tmp_path: Path) -> None:
    victim = sorted(dense.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text)))


def test_a_shard_with_a_wrong_hash_is_named_when_it_is_read(dense: Path, text: Path, tmp_path: Path) -> None:
    describe(dense)
    weight_map = json.loads((dense / "model.safetensors.index.json").read_bytes())["weight_map"]
    victim = dense / weight_map["model.layers.2.mlp.down_proj.weight"]
    assert victim.name != weight_map["model.layers.0.mlp.down_proj.weight"]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of a number: the header is as it was
    seen: list[int] = []
    with pytest.raises(CheckpointError, match=rf"{victim.name} has SHA-256 .* or remove fxprune\.json"):
        prune_streaming(dense, tmp_path / "out", Wanda(**options(text)), on_block=lambda done, _: seen.append(done))
    assert seen  # blocks in other shards were done, and are not done again
    victim.write_bytes(whole)
    again: list[int] = []
    prune_streaming(dense, tmp_path / "out", Wanda(**options(text)), on_block=lambda done, _: again.append(done))
    assert seen + again == [1, 2, 3]
    load(tmp_path / "out")


def test_a_mixed_model_that_transformers_saved_is_refused_too(mixed_dir: Path, text: Path, tmp_path: Path) -> None:
    load(mixed_dir).save_pretrained(tmp_path / "saved")
    with pytest.raises(PreconditionError, match="mixed checkpoint.*prune it in memory"):
        prune_streaming(tmp_path / "saved", tmp_path / "out", Wanda(**options(text)))
    assert not (tmp_path / "out").exists()


def test_a_manifest_must_know_every_shard_and_say_every_shape(dense: Path, text: Path, tmp_path: Path) -> None:
    describe(dense, "mixed")
    with pytest.raises(PreconditionError, match="mixed checkpoint.*prune it in memory"):
        prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))
    describe(dense)
    record = json.loads((dense / "fxprune.json").read_bytes())
    lost = min(record["files"])
    del record["files"][lost]
    (dense / "fxprune.json").write_text(json.dumps(record))
    reseal(dense)
    with pytest.raises(CheckpointError, match=f"no hash of {lost}"):
        prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))


def test_experts_that_are_stored_one_by_one_stream(
    tmp_path: Path, text: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=len(tiny_tokenizer), **sizes, **experts))
    model.save_pretrained(tmp_path / "single")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in weights_of(tmp_path / "dense")
    prune_streaming(tmp_path / "dense", tmp_path / "out", Wanda(**options(text, exclude=["*.down_proj_linear"])))
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    old = model.state_dict()
    assert set(weights_of(tmp_path / "out")) == set(streamed) == set(old)
    both = "model.layers.0.mlp.experts.gate_up_proj"
    kept = streamed[both] != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(read_masks(tmp_path / "out")[both], kept)
    for name, tensor in streamed.items():  # what Wanda keeps stays as it is
        assert torch.equal(tensor[tensor != 0], old[name][tensor != 0]), name
    assert torch.equal(streamed["model.layers.0.mlp.experts.down_proj"], old["model.layers.0.mlp.experts.down_proj"])
    with pytest.raises(
        PreconditionError, match="is in float32, and this model can be traced without weights in bfloat"
    ):
        prune_streaming(tmp_path / "single", tmp_path / "again", Wanda(**options(text)))


def test_the_old_output_is_whole_until_the_end(dense: Path, text: Path, tmp_path: Path) -> None:
    prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))
    before = weights_of(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text)))

    with pytest.raises(KeyboardInterrupt):
        prune_streaming(dense, tmp_path / "out", SparseGpt(**options(text)), overwrite=True, on_block=stop)
    after = weights_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_transposed_and_parallel_layouts_stream(
    tmp_path: Path, text: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """GPT-2's Conv1D weights are (in, out); they come back that way."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=24, n_layer=2, n_head=3, n_inner=40, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    prune_streaming(tmp_path / "gpt2", tmp_path / "out", Wanda(**options(text)))
    old, new = weights_of(tmp_path / "gpt2"), weights_of(tmp_path / "out")
    name = "transformer.h.0.attn.c_attn.weight"
    assert new[name].shape == old[name].shape
    assert float((new[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    kept = new[name] != 0
    assert torch.equal(new[name][kept], old[name][kept])


def test_output_lies_beside_its_target(tmp_path: Path) -> None:
    output = StreamingOutput(tmp_path / "x", None, "")  # type: ignore[arg-type]
    assert output.staging == tmp_path / ".x.streaming"


def test_a_failure_at_the_very_end_loses_nothing(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_streaming(dense, tmp_path / "whole", Wanda(**options(text)))

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxprune.weights.streaming.shutil.copy2", fails)
    with pytest.raises(CheckpointError, match="make room"):
        prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))
    monkeypatch.undo()
    (tmp_path / ".out.streaming" / "activations-99.safetensors").write_bytes(b"left by a killed run")
    seen: list[int] = []
    prune_streaming(dense, tmp_path / "out", Wanda(**options(text)), on_block=lambda done, _: seen.append(done))
    assert not seen  # all blocks were done
    whole, again = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_norms_in_float32_beside_bfloat16_weights_stream(dense: Path, text: Path, tmp_path: Path) -> None:
    for path in dense.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        save_file({name: t.float() if "norm" in name else t for name, t in tensors.items()}, path, {"format": "pt"})
    prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))
    new = weights_of(tmp_path / "out")
    assert new["model.norm.weight"].dtype is torch.float32
    assert new["model.layers.0.self_attn.q_proj.weight"].dtype is torch.bfloat16


def test_a_tensor_of_another_shape_is_named(dense: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_bytes())
    (dense / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight is .* where the model class wants"):
        prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))


def test_what_was_pruned_before_stays_pruned_when_it_is_streamed_again(dense: Path, text: Path, tmp_path: Path) -> None:
    prune_streaming(dense, tmp_path / "out", Wanda(**options(text)))
    first = read_masks(tmp_path / "out")
    more = options(text) | {"sparsity": 0.75, "exclude": ["*.layers.0.*"]}
    more.pop("pattern", None)
    prune_streaming(tmp_path / "out", tmp_path / "again", Wanda(**more))
    second, model = read_masks(tmp_path / "again"), load_model(tmp_path / "again").model
    assert set(second) == set(first)
    for name, mask in second.items():
        assert not bool((mask & ~first[name]).any())
        assert not bool(model.get_parameter(name).detach()[~mask].any())
        if ".layers.0." in name:
            assert torch.equal(mask, first[name])
        else:
            assert float((~mask).float().mean()) == pytest.approx(0.75, abs=0.02)

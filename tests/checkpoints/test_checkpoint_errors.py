"""Damaged, changed or hostile checkpoint directories are refused with the file and the remedy."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.loader_fuzz import Subject, fuzz_one, reseal, subjects
from fxprune.checkpoints.checkpoint import load, load_skeleton, save
from fxprune.core.errors import CheckpointError
from fxprune.models.mixed_model import stock_model_class
from tests.slices import SMALL, Keep, cut, cuts_of, make_model, save_slim, source_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(name="written", scope="module")
def _written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed checkpoint that no test may change: layer 0 has 16 of 24 channels, layer 1 all of them."""
    model = make_model("llama", **{**SMALL, "num_hidden_layers": 2})
    tensors = cut(model.state_dict(), cuts_of(model, [Keep(mlp=range(16)), Keep()]))
    directory = tmp_path_factory.mktemp("written") / "out"
    assert save_slim(tensors, model, directory).kind == "mixed"
    return directory


@pytest.fixture(name="damaged")
def _damaged(written: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(written, tmp_path / "damaged")


def edit(name: str, *keys: str, value: object) -> Callable[[Path], None]:
    """Set one entry of a JSON file, and make the hashes fit, so that the loader's other checks are reached."""

    def change(directory: Path) -> None:
        tamper(name, *keys, value=value)(directory)
        with suppress(ValueError):  # the record breaks the schema
            reseal(directory)

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Replace a file, and make the hashes fit, so that the loader's other checks are reached."""

    def change(directory: Path) -> None:
        (directory / name).write_bytes(content)
        with suppress(ValueError, CheckpointError):  # what is not even JSON or safetensors has no hash that would fit
            reseal(directory)

    return change


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_last_byte(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


HASH = "0" * 64


def forget_shapes(directory: Path) -> None:
    for key in ("parameters", "layer_overrides"):
        edit("fxprune.json", key, value={})(directory)


BAD_INPUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda d: (edit("config.json", "model_type", value="llama")(d), (d / "fxprune.json").unlink()),
        r"fxprune\.json is missing",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "truncated weights": (truncate, r"model\.safetensors is missing, truncated or damaged"),
    "weights of garbage": (write("model.safetensors", b"\xff" * 300), r"model\.safetensors is missing, truncated"),
    "changed weights": (flip_last_byte, r"model\.safetensors has SHA-256 .* copy the checkpoint again"),
    "manifest not JSON": (write("fxprune.json", b"{"), r"fxprune\.json cannot be read as JSON"),
    "manifest not text": (write("fxprune.json", b"\xff\xfe"), r"fxprune\.json cannot be read as JSON"),
    "manifest a list": (write("fxprune.json", b"[]"), r"schema version None is unknown"),
    "newer schema": (edit("fxprune.json", "schema_version", value=3), r"schema version 3 is unknown"),
    "unknown key": (edit("fxprune.json", "surprise", value=1), r"surprise: Extra inputs"),
    "wrong type": (edit("fxprune.json", "kind", value=3), r"kind: Input should be"),
    "text for a number": (
        edit("fxprune.json", "layer_overrides", "0", "intermediate_size", value="16"),
        "breaks the schema",
    ),
    "no files": (edit("fxprune.json", "files", value={}), r"files: "),
    "file elsewhere": (edit("fxprune.json", "files", value={"../x.safetensors": HASH}), r"breaks the schema: files"),
    "absolute file": (edit("fxprune.json", "files", value={"/x.safetensors": HASH}), r"breaks the schema: files"),
    "file of another kind": (edit("fxprune.json", "files", value={"model.bin": HASH}), r"breaks the schema: files"),
    "other shape": (
        edit("fxprune.json", "parameters", DOWN, "slim", value=[32, 15]),
        r"gives model\.layers\.0\.mlp\.down_proj\.weight the shape \[32, 15\], the weight files have \[32, 16\]",
    ),
    "other dense shape": (edit("fxprune.json", "parameters", DOWN, "dense", value=[32, 25]), "its dense shape"),
    "shape not mentioned": (forget_shapes, r"do not belong together: .*stored\)"),
    "unknown override": (
        edit("fxprune.json", "layer_overrides", "0", value={"no_field": 2}),
        "does not fit LlamaConfig",
    ),
    "override of no layer": (edit("fxprune.json", "layer_overrides", "7", value={"head_dim": 8}), "with 2 layers"),
    "wrong override": (
        edit("fxprune.json", "layer_overrides", "0", "head_dim", value=4),
        "do not belong",
    ),
    "constant of no module": (edit("fxprune.json", "constants", value={"model.nothing": {"eps": 1.0}}), "no module"),
    "constant of no number": (
        edit("fxprune.json", "constants", value={"model.norm": {"weight": 1.0}}),
        "model.norm .* has no number called weight",
    ),
    "constant of another type": (
        edit("fxprune.json", "constants", value={"model.norm": {"variance_epsilon": 1}}),
        "has no number called variance_epsilon",
    ),
    "constant of text": (edit("fxprune.json", "constants", value={"model.norm": {"x": "y"}}), "breaks the schema"),
    "constant that is no number": (
        edit("fxprune.json", "constants", value={"model.norm": {"variance_epsilon": math.nan}}),
        "breaks the schema",
    ),
    "override of everything with text": (
        edit("fxprune.json", "config_overrides", value={"_attn_implementation": "someone/kernel"}),
        "has no number _attn_implementation",
    ),
    "override of a switch": (edit("fxprune.json", "config_overrides", value={"attention_bias": 1}), "has no number"),
    "override of nothing": (edit("fxprune.json", "config_overrides", value={"no_field": 2}), "no number no_field"),
    "override that does not fit": (
        edit("fxprune.json", "config_overrides", value={"hidden_size": 31}),
        "do not belong together",
    ),
    "other depth": (edit("fxprune.json", "kept_layers", value={"model.layers": [0, 2, 5]}), "has 3 layers"),
    "no depth": (edit("fxprune.json", "kept_layers", value={"model.layers": []}), "breaks the schema: kept_layers"),
    "layers of nothing": (edit("fxprune.json", "kept_layers", value={"model.norm": [0]}), "model.norm has 1 layers"),
    "wrong kind": (edit("fxprune.json", "kind", value="uniform"), "has no layer overrides"),
    "config not JSON": (write("config.json", b"nothing"), r"config\.json cannot be read as JSON"),
    "unknown model type": (edit("config.json", "model_type", value="no_such_model"), "no model_type 'no_such_model'"),
    "unknown class": (edit("config.json", "architectures", value=["os.system"]), "no model class called 'os.system'"),
    "no class": (edit("config.json", "architectures", value=[]), "names no class in `architectures`"),
    "refused config": (edit("config.json", "num_attention_heads", value=5), "refuses these values"),
    "other config": (edit("config.json", "vocab_size", value=62), r"do not belong together.*lm_head\.weight"),
}


@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_by_name(case: tuple[Callable[[Path], object], str], damaged: Path) -> None:
    load(damaged)
    damage, message = case
    damage(damaged)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(damaged)
    assert (
        str(damaged) in str(caught.value)
        or "layer override" in str(caught.value)
        or "transformers maps" in str(caught.value)
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit("fxprune.json", "added_biases", value=["model.layers.0.bias"]),
            "adds model.layers.0.bias to no projection",
        ),
        (edit("fxprune.json", "added_biases", value=["model.norm.bias"]), r"model\.norm\.bias \(None built"),
        (
            edit("fxprune.json", "parameters", "model.norm.weight", value={"dense": [32], "slim": [31]}),
            r"model\.norm\.weight \(\(32,\) built, \(31,\) stored",
        ),
        (edit("config.json", "intermediate_size", value=25), "does not give .* its dense shape"),
    ],
    ids=["bias of nothing", "bias of a norm", "narrow norm", "other config"],
)
def test_a_skeleton_is_refused_where_its_two_files_do_not_agree(
    damage: Callable[[Path], None], message: str, damaged: Path
) -> None:
    load_skeleton(damaged)
    damage(damaged)
    for file in damaged.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=message):
        load_skeleton(damaged)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        load(tmp_path / "nothing")


def test_changed_weights_load_without_the_hash(damaged: Path) -> None:
    flip_last_byte(damaged)
    load(damaged, verify_hash=False)
    load(damaged, verify_hash="headers")  # which says nothing of the weights themselves
    with pytest.raises(CheckpointError, match="has SHA-256"):
        load(damaged)


# ── Seal and hashes ───────────────────────────────────────────────────────────────────────────────────────────────


def tamper(name: str, *keys: str, value: object) -> Callable[[Path], None]:
    """Set one entry of a JSON file and leave the hashes as they are."""

    def change(directory: Path) -> None:
        values = json.loads((directory / name).read_text())
        entry: Any = values
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value
        (directory / name).write_text(json.dumps(values))

    return change


def swap_tensors(directory: Path) -> None:
    """Give two tensors of one shape each other's data, by the header alone."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    first, second = (header[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(content[:8] + text.ljust(end - 8) + content[end:])


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "source hash": (tamper("fxprune.json", "source", "sha256", value=HASH), r"fxprune\.json was changed after"),
    "plan": (tamper("fxprune.json", "plan", value={"kept": {}}), r"fxprune\.json was changed after"),
    "number of a module": (
        tamper("fxprune.json", "constants", value={"model.norm": {"variance_epsilon": 1e-3}}),
        r"fxprune\.json was changed after .* restore the file",
    ),
    "no seal": (tamper("fxprune.json", "seal", value=None), r"fxprune\.json was changed after"),
    "no hashes": (tamper("fxprune.json", "companions", value={}), r"companions or headers do not name config\.json"),
    "older schema": (tamper("fxprune.json", "schema_version", value=1), "version 1 has no seal"),
    "epsilon": (tamper("config.json", "rms_norm_eps", value=0.1), r"config\.json has SHA-256 .*(restore|copy)"),
    "activation": (tamper("config.json", "hidden_act", value="relu"), r"config\.json has SHA-256"),
    "layers without end": (edit("config.json", "num_hidden_layers", value=10**30), "no model has as many layers"),
    "too many layers": (
        edit("config.json", "num_hidden_layers", value=9_999),
        "far more parameters than the 21 tensors",
    ),
}


@pytest.mark.parametrize("case", TAMPERED.values(), ids=TAMPERED.keys())
def test_what_shapes_do_not_show_is_found_by_hashes(case: tuple[Callable[[Path], object], str], damaged: Path) -> None:
    damage, message = case
    damage(damaged)
    for loader in (load, load_skeleton):
        with pytest.raises(CheckpointError, match=message):
            loader(damaged)


def test_swapped_tensors_are_found_without_reading_the_weights(damaged: Path) -> None:
    swap_tensors(damaged)
    load(damaged, verify_hash=False)  # shapes are right, so nothing else can tell
    with pytest.raises(CheckpointError, match=r"model\.safetensors has another size or header .* swapped"):
        load(damaged, verify_hash="headers")


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    model = make_model("llama", **{**SMALL, "num_hidden_layers": 2})
    tensors = cut(model.state_dict(), cuts_of(model, [Keep(mlp=range(16))] * 2))
    save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[], max_shard_size=20_000)
    first, second = sorted((tmp_path / "out").glob("model-*.safetensors"))[:2]
    for old, new in ((first, tmp_path / "kept"), (second, first), (tmp_path / "kept", second)):
        old.rename(new)
    with pytest.raises(CheckpointError, match=r"model-00001-of-.*another size or header"):
        load(tmp_path / "out")
    second.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*is missing"):
        load(tmp_path / "out")


def test_an_earlier_checkpoint_without_a_seal_is_read(damaged: Path) -> None:
    before = load(damaged).state_dict()
    path = damaged / "fxprune.json"
    record = {k: v for k, v in json.loads(path.read_text()).items() if k not in {"headers", "companions", "seal"}}
    path.write_text(json.dumps(record | {"schema_version": 1}))
    after = load(damaged).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    flip_last_byte(damaged)
    with pytest.raises(CheckpointError, match="has SHA-256"):  # it has no hashes of headers, so all is compared
        load(damaged, verify_hash="headers")


def test_changes_that_were_meant_are_taken_without_hashes(damaged: Path) -> None:
    tamper("config.json", "rms_norm_eps", value=0.25)(damaged)
    loaded: Any = load(damaged, verify_hash=False)
    assert loaded.model.norm.variance_epsilon == 0.25


@pytest.fixture(name="sound", scope="module")
def _sound(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return subjects(tmp_path_factory.mktemp("sound"), {"uniform", "sharded"})


@pytest.mark.parametrize("sealed", [False, True])
def test_mutations_give_an_error_or_the_right_model(sealed: bool, sound: list[Subject], tmp_path: Path) -> None:
    """A few of the mutations of `benchmarks/loader_fuzz.py`, which runs a thousand of each kind."""
    outcomes = [fuzz_one(sound, seed, tmp_path, sealed=sealed) for seed in range(5000, 5025)]
    allowed = {"error", "same", "other"} if sealed else {"error", "same"}
    assert [outcome for outcome in outcomes if outcome.result not in allowed] == []
    assert sum(outcome.result == "error" for outcome in outcomes) > len(outcomes) / 2


def test_a_checkpoint_cannot_choose_kernels_or_code(damaged: Path) -> None:
    edit("config.json", "attn_implementation", value="someone/kernel")(damaged)
    edit("config.json", "auto_map", value={"AutoModelForCausalLM": "code.Model"})(damaged)
    loaded = load(damaged)
    assert loaded.config._attn_implementation == "sdpa"
    assert stock_model_class(type(loaded)) is LlamaForCausalLM

"""Kept evaluation results: found again by content alone, never served for other content, harmless when damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from fxprune.core.errors import CheckpointError, ExportError
from fxprune.evaluation.eval_cache import EvaluationCache, form_files

if TYPE_CHECKING:
    from pathlib import Path


def test_a_value_comes_back_under_its_own_key_only(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path / "made" / "on demand")
    key = {"form": "aa", "text": "bb", "window": 16, "names": ("a", "b")}
    assert cache.get(key) is None
    cache.put(key, {"ppl": math.inf, "items": [1, 0.5]})
    assert cache.get(dict(reversed(key.items()))) == {"ppl": math.inf, "items": [1, 0.5]}
    for name, other in (("form", "ab"), ("text", ""), ("window", 17), ("names", ["a"])):
        assert cache.get({**key, name: other}) is None
    assert cache.get({**key, "more": 1}) is None


def test_without_a_directory_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = EvaluationCache(None)
    cache.put({"a": 1}, 2)
    assert cache.get({"a": 1}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_renamed_entry_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = EvaluationCache(tmp_path)
    cache.put({"a": 1}, {"value": 1.25})
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    for text in (whole[:-10], whole.replace("1.25", "1.26"), "[]", "null", '{"key": 1}', ""):
        file.write_text(text)
        assert cache.get({"a": 1}) is None
        assert "not used" in caplog.text
        caplog.clear()
    cache.put({"a": 2}, {"value": 2})
    other = next(path for path in tmp_path.iterdir() if path != file)
    other.rename(file)  # a whole entry under a name that is not its own
    assert cache.get({"a": 1}) is None
    cache.put({"a": 1}, {"value": 3})
    assert cache.get({"a": 1}) == {"value": 3}


def test_a_cache_that_cannot_be_written_loses_no_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = EvaluationCache(tmp_path / "file" / "below")
    cache.put({"a": 1}, 1)
    assert "not kept" in caplog.text


def test_the_users_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    assert EvaluationCache.of_user().directory == tmp_path / "evaluations"


# ---- files ---------------------------------------------------------------------------------------------------------


def test_content_counts_and_place_and_dates_do_not(tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    original = form_files(str(tiny_llama_dir))
    assert form_files(str(copy)).sha256 == original.sha256
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= original.hashes.keys()
    (copy / "report.md").write_text("no loader reads this")
    assert form_files(str(copy)).sha256 == original.sha256
    weights = copy / "model.safetensors"
    before, dates = weights.read_bytes(), (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # one bit, with the old size and the old date
    os.utime(weights, ns=dates)
    assert form_files(str(copy)).sha256 != original.sha256
    weights.write_bytes(before)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert form_files(str(copy)).sha256 != original.sha256


def test_files_that_change_meanwhile_are_noticed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    files = form_files(str(copy))
    files.check_unchanged()
    (copy / "chat_template.jinja").write_text("new")
    with pytest.raises(CheckpointError, match="changed while"):
        files.check_unchanged()


def test_an_onnx_form_includes_its_external_data(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y], [weight])), tmp_path / "model.onnx",
        save_as_external_data=True, location="weights.bin", size_threshold=0,
    )  # fmt: skip
    (tmp_path / "unrelated.bin").write_bytes(b"1")
    files = form_files(str(tmp_path))
    assert set(files.hashes) == {"model.onnx", "weights.bin"}
    assert form_files(str(tmp_path / "model.onnx")).sha256 == files.sha256
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert form_files(str(tmp_path)).sha256 != files.sha256
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ExportError, match=r"weights\.bin with the weights of w is missing"):
        form_files(str(tmp_path))


def test_a_constant_in_a_subgraph_may_not_point_outside(tmp_path: Path) -> None:
    helper, float_ = onnx.helper, onnx.TensorProto.FLOAT
    far = onnx.TensorProto(name="far", data_type=float_, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    far.external_data.add(key="location", value="../far.bin")
    y = helper.make_tensor_value_info("y", float_, [1])
    branch = helper.make_graph([helper.make_node("Constant", [], ["y"], value=far)], "branch", [], [y])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition], [y])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(ExportError, match=r"weights of far are said to be in '\.\./far\.bin', outside"):
        form_files(str(tmp_path))


def test_forms_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        form_files(str(tmp_path / "none"))
    with pytest.raises(ExportError, match="no ONNX file"):
        form_files(str(tmp_path / "none.onnx"))
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="cannot be read as an ONNX graph"):
        form_files(str(tmp_path))

"""ONNX Runtime: the runner, its cache, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fxprune.core.errors import ExportError
from fxprune.exporters.onnx import export_onnx
from fxprune.exporters.ort import OrtRunner, run_onnx
from fxprune.runtimes.runners import Runner, position_ids_from_mask
from tests.onnx_models import bert, exported, lifted, tokens

if TYPE_CHECKING:
    from pathlib import Path


def test_the_runner_is_a_runner() -> None:
    _, export = exported("llama_with_mixed_heads")
    runner = OrtRunner(export.path, threads=1, name="deployed")
    assert isinstance(runner, Runner)
    assert runner.name == "deployed"
    assert runner.load_seconds > 0
    assert runner.providers == ("CPUExecutionProvider",)
    assert [tuple(tensor.shape) for tensor in runner.empty_past(3)] == [(3, 2, 0, 8)] * 2 + [(3, 3, 0, 8)] * 2


def test_a_cache_can_be_continued_twice() -> None:
    _, export = exported("llama")
    runner = OrtRunner(export.path, threads=1)
    ids, mask = tokens(1, 6)
    _, past = runner.step(ids[:, :5], mask[:, :5], position_ids_from_mask(mask[:, :5], 5), None)
    before = [tensor.clone() for tensor in past]
    results = [runner.step(ids[:, 5:], mask, position_ids_from_mask(mask, 1), past)[0].clone() for _ in range(2)]
    del runner
    assert torch.equal(*results)
    assert all(torch.equal(*pair) for pair in zip(past, before, strict=True))


def test_a_cache_that_is_a_view_can_be_given() -> None:
    _, export = exported("llama")
    runner = OrtRunner(export.path, threads=1)
    ids, mask = tokens(2, 6)
    _, past = runner.step(ids[:, :5], mask[:, :5], position_ids_from_mask(mask[:, :5], 5), None)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in past]
    outputs = [runner.step(ids[:, 5:], mask, position_ids_from_mask(mask, 1), cache)[0] for cache in (past, strided)]
    assert torch.equal(*outputs)


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no ONNX file at"):
        OrtRunner(tmp_path / "missing.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"damaged\.onnx.*export the graph again"):
        OrtRunner(damaged)
    with pytest.raises(ExportError, match="NoSuchProvider"):
        OrtRunner(damaged, providers=["NoSuchProvider"])


def test_a_graph_that_is_no_language_model(tmp_path: Path) -> None:
    export = export_onnx(lifted(bert()), tmp_path)
    with pytest.raises(ExportError, match="no 'logits'"):
        OrtRunner(export.path)
    ids, mask = tokens(2, 4)
    with pytest.raises(ExportError, match="was given"):
        run_onnx(export.path, {"input_ids": ids, "mask": mask})


def test_inputs_that_do_not_fit() -> None:
    _, export = exported("llama")
    runner = OrtRunner(export.path, threads=1)
    ids, mask = tokens(2, 4)
    with pytest.raises(ExportError, match="onnxruntime failed on inputs"):
        runner.step(ids.float(), mask, position_ids_from_mask(mask, 4), None)

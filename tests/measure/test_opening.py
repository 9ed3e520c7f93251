"""Runtimes of the benchmark, what a form costs to have, and `fxprune bench` over several of each."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from fxprune.checkpoints.checkpoint import load
from fxprune.core.errors import ExportError, UsageError
from fxprune.exporters.report_bench import bench_markdown
from fxprune.measure.footprint import form_bytes, measure_footprint
from fxprune.measure.opening import RUNTIMES, open_in, runtime_of
from fxprune.measure.speed import decode, interleaved_times, prefill
from fxprune.runtimes.compiled import CompiledRunner
from fxprune.runtimes.runners import EagerRunner, Past, greedy
from tests.commands import run_command
from tests.measure.test_speed import pair
from tests.onnx_models import exported

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

pytestmark = pytest.mark.xdist_group("tests/measure/test_bench_gate.py")  # they share what is exported once a process


# ---- timing --------------------------------------------------------------------------------------------------------


def test_three_forms_run_forwards_and_backwards_in_turn() -> None:
    a, b, clock, log = pair(0.2, 0.1)
    c, *_ = pair(0.4)
    c.name, c.clock, c.log = "third", clock, log
    (times,) = interleaved_times([a, b, c], [prefill(4)], threads=1, repeats=2, warmup=0, clock=clock)
    assert log[3:] == ["dense", "slim", "third", "third", "slim", "dense"]
    assert [each[0] for each in times] == pytest.approx([200, 100, 400])


def test_a_runtime_that_keeps_its_cache_is_asked_to_go_back() -> None:
    class Keeps:
        """Its past is a number of tokens; a step on another past than the present one would compute it again."""

        name = "keeps"
        present = 0
        forks = 0

        def step(self, ids: Tensor, mask: Tensor, positions: Tensor, past: Past | None) -> tuple[Tensor, Past]:
            del mask, positions
            seen = 0 if past is None else int(past[0])
            assert seen in {0, self.present}
            self.present = seen + ids.shape[1]
            return torch.zeros(*ids.shape, 5), [torch.tensor(self.present)]

        def fork(self, past: Past) -> Past:
            self.present = int(past[0])
            self.forks += 1
            return past

    runner = Keeps()
    interleaved_times([runner], [decode(3, past=4)], threads=1, repeats=2, warmup=1)
    assert runner.forks == 3


# ---- runtimes ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_compiled_text_is_that_of_eager(tiny_llama: LlamaForCausalLM) -> None:
    """Dynamo's own backend: the graph is captured and guarded as with Inductor, and not turned into C++."""
    compiled, eager = CompiledRunner(tiny_llama, backend="eager"), EagerRunner(tiny_llama)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for length in (5, 9, 12):
        tokens = torch.randint(4, 90, (1, length), generator=torch.Generator().manual_seed(length))
        assert torch.equal(greedy(compiled, tokens, 4), greedy(eager, tokens, 4))
    assert (
        counter["stats"]["unique_graphs"] <= 4
    )  # prompt and single token, static and dynamic: not one for each length
    assert not counter["graph_break"]


def test_what_cannot_be_compiled_is_an_error_and_not_eager(tiny_llama: LlamaForCausalLM) -> None:
    def broken(**inputs: Tensor) -> object:
        torch._dynamo.graph_break()
        return tiny_llama(**inputs)

    tokens = torch.tensor([[5, 6]])
    with pytest.raises(ExportError, match=r"torch\.compile failed on function: .*--runtime torch"):
        CompiledRunner(broken, backend="eager").step(tokens, torch.ones_like(tokens), torch.tensor([[0, 1]]), None)


def test_forms_open_in_their_runtimes(tiny_llama_dir: Path) -> None:
    graph = exported("llama")[1].path
    assert (runtime_of(str(graph)), runtime_of(str(graph.parent))) == ("onnxruntime", "onnxruntime")
    assert runtime_of(str(tiny_llama_dir)) == "torch"
    form = open_in(str(graph), "onnxruntime", threads=1)
    assert (form.kind, form.path, form.scratch) == ("onnxruntime", graph, None)
    form = open_in(str(tiny_llama_dir), "torch.compile", threads=1)
    assert isinstance(form.runner, CompiledRunner)
    assert form.cost is not None
    for runtime in ("torch", "torch.compile"):
        with pytest.raises(UsageError, match=f"which {runtime} does not run"):
            open_in(str(graph), runtime, threads=1)
    with pytest.raises(UsageError, match="unknown"):
        open_in(str(graph), "tvm", threads=1)
    assert list(RUNTIMES) == ["torch", "torch.compile", "onnxruntime", "genai"]


def test_a_mixed_model_that_was_saved_and_loaded_runs_in_every_runtime(mixed_dir: Path) -> None:
    tokens = torch.tensor([[5, 8, 13, 21, 34]])
    model = load(mixed_dir)
    expected = greedy(EagerRunner(model), tokens, 4)
    assert torch.equal(greedy(CompiledRunner(model, backend="eager"), tokens, 4), expected)
    for runtime in ("torch", "onnxruntime"):
        form = open_in(str(mixed_dir), runtime, threads=1)
        assert torch.equal(greedy(form.runner, tokens, 4), expected), runtime


def test_a_runtime_that_is_not_installed_names_its_extra(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ExportError, match=r"fxprune\[genai\]"):
        open_in(str(tiny_llama_dir), "genai", threads=1)


# ---- footprint -----------------------------------------------------------------------------------------------------


def test_a_footprint_is_taken_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "psutil.py").write_text("raise SystemExit('code of the working directory was run')")
    monkeypatch.chdir(tmp_path)
    graph = Path(shutil.copy(exported("llama")[1].path, tmp_path / "other-name.onnx"))
    (tmp_path / "model.onnx").write_bytes(b"another graph")
    held = torch.ones(2**27)  # 512 MiB here, which must not count there
    found = measure_footprint(graph, "onnxruntime", [prefill(4), decode(2, past=3)], threads=1)
    assert held.numel()
    assert found.file_bytes == form_bytes(graph) == graph.stat().st_size
    assert 0 < found.load_seconds < 60
    assert 10e6 < found.base_rss_bytes <= found.peak_rss_bytes
    assert found.peak_rss_bytes - found.base_rss_bytes < held.numel() * 4


def test_a_process_that_fails_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'CheckpointError: no weights' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ExportError, match="could not be measured: CheckpointError: no weights"):
        measure_footprint(tmp_path, "torch", [prefill(2)], threads=1)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_bench_of_three_forms_in_two_settings(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "fxprune.measure.speed.gc", SimpleNamespace(collect=int)
    )  # it takes longer than what is timed here
    figures, markdown = tmp_path / "figures.json", tmp_path / "bench.md"
    status, shown, err = run_command(
        monkeypatch, capsys, "bench", tiny_llama_dir, tiny_llama_dir, tiny_llama_dir, "--prefill", 4, "--decode", 2,
        "--past", 3, "--batch", 1, "--batch", 2, "--repeats", 2, "--threads", 1, "--threads", 2, "--no-footprint",
        "--target-speedup", 90, "--json", figures, "--markdown", markdown,
    )  # fmt: skip
    assert status == 1, err  # nothing is 90 times as fast as itself
    data = json.loads(figures.read_text())
    cases = {"prefill-4", "prefill-4-b2", "decode-2@3", "decode-2@3-b2"}
    names = [f"tiny-llama ({count})" for count in (2, 3)]
    expected = {(case, name, threads) for case in cases for name in names for threads in (1, 2)}
    assert {(each["case"], each["form"], each["threads"]) for each in data["speed"]} == expected
    assert all(each["ci"][0] <= each["speedup"] <= each["ci"][1] for each in data["speed"])
    assert {each["bound"] for each in data["speed"]} == {1.0}
    assert len(data["forms"]) == 6
    assert len(data["gate"]["cases"]) == 16
    assert data["gate"]["cases"][0]["name"] == "torch, 1 threads, tiny-llama (2), prefill-4"
    assert {"cpu", "torch", "cpu_capability", "memory_bytes"} <= data["machine"].keys()
    assert "Speed in torch, 2 threads" in shown
    text = markdown.read_text()
    assert text == bench_markdown(data)
    assert "Gate: **failed**" in text
    assert "| decode-2@3-b2 | tiny-llama (3) | torch | 2 |" in text

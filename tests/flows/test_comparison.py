"""`fxprune compare`: forms alike on the same texts and tasks, tests against the first, kept results, its reports."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CalibrationError, CheckpointError, ExportError, UsageError
from fxprune.core.pipeline import build_pass
from fxprune.core.stopwatch import Stopwatch
from fxprune.evaluation.eval_cache import EvaluationCache
from fxprune.evaluation.form_names import form_names
from fxprune.evaluation.harness_tasks import TASK_FILES, load_tasks, task_key
from fxprune.exporters.chart_kit import TIMES
from fxprune.exporters.report_comparison import comparison_markdown, comparison_page, write_comparison
from fxprune.flows import comparison as module
from fxprune.flows.comparison import run_comparison
from fxprune.flows.evaluation import Evaluation
from tests.commands import run_command
from tests.comparisons import COMPARISON
from tests.evaluation.test_harness_tasks import QUESTIONS, SENTENCES, write_lines
from tests.exporters.test_report import Page

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def forms(
    tiny_llama_dir: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The tiny model, one with other weights, and the tiny model in ONNX without a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("forms")
    config = tiny_llama.config
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = type(tiny_llama)(config)
        for parameter in other.parameters():
            parameter.data *= 3 if parameter.dim() > 1 else 1
    other.save_pretrained(folder / "other")
    tiny_tokenizer.save_pretrained(folder / "other")
    build_pass("export_onnx", {"out": str(folder / "onnx"), "fusions": "none"})(
        front_end(load_model(tiny_llama_dir), Stopwatch())
    )
    (folder / "onnx" / "tokenizer.json").unlink(missing_ok=True)
    return {"dense": tiny_llama_dir, "other": folder / "other", "onnx": folder / "onnx"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    folder = tmp_path / "data"
    write_lines(folder / TASK_FILES["lambada_openai"]["test"], [{"text": text} for text in SENTENCES])
    write_lines(folder / TASK_FILES["arc_easy"]["test"], QUESTIONS)
    (folder / "text.txt").write_text("a small graph computes what the masked graph does. " * 30)
    return folder


def entry(result: dict[str, Any], text: str, metric: str) -> dict[str, Any]:
    return next(each for each in result["quality"] if (each["text"], each["metric"]) == (text, metric))


def test_forms_are_compared_kept_and_shown(
    forms: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=int))  # it takes longer than all the rest
    command = [
        "compare", forms["dense"], forms["other"], forms["onnx"], "--tokenizer", forms["dense"],
        "--ppl", data / "text.txt", "--window", 16, "--windows", 12, "--batch-size", 2,
        "--tasks", "lambada_openai,arc_easy", "--data", data, "--json", tmp_path / "figures.json",
    ]  # fmt: skip
    out, markdown = tmp_path / "out", tmp_path / "pull-request.md"
    status, shown, err = run_command(monkeypatch, capsys, *command, "--out", out, "--markdown", markdown)
    assert status == 0, err
    result = json.loads((tmp_path / "figures.json").read_text())
    assert [form["runtime"] for form in result["forms"]] == ["torch", "torch", "onnxruntime"]
    assert [form["cached"] for form in result["forms"]] == [0, 0, 0]
    assert result["settings"]["max_length"] == 128  # the shortest of the forms' limits, for all

    text = entry(result, "text.txt", "perplexity")
    dense, other, onnx = (figure["value"] for figure in text["figures"])
    changed, exported = text["differences"]
    assert (changed["form"], exported["form"], changed["test"]) == ("other", "onnx", "paired t")
    assert changed["ratio"] == pytest.approx(other / dense)
    assert changed["difference"] == pytest.approx(math.log(other / dense))
    assert changed["p_holm"] < 0.01
    assert exported["ratio"] == pytest.approx(1, abs=1e-4)
    assert onnx == pytest.approx(dense, rel=1e-4)

    assert {each["test"] for each in entry(result, "arc_easy", "acc")["differences"]} == {"exact McNemar"}
    lambada = entry(result, "lambada_openai", "perplexity")
    assert {each["test"] for each in lambada["differences"]} == {"approximate randomization"}
    assert lambada["differences"][0]["difference"] == pytest.approx(
        lambada["figures"][1]["value"] - lambada["figures"][0]["value"]
    )
    assert set(result["tests"]) == {"paired t", "exact McNemar", "approximate randomization"}
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert markdown.read_text() == (out / "report.md").read_text()
    assert "| text.txt | perplexity | other |" in markdown.read_text()
    assert "worse" in shown

    # Again: everything is known, no form is opened, and the figures are the same.
    monkeypatch.setattr(module, "open_evaluated", lambda *_: pytest.fail("a form was opened"))
    status, _, err = run_command(monkeypatch, capsys, *command)
    assert status == 0, err
    again = json.loads((tmp_path / "figures.json").read_text())
    assert [form["cached"] for form in again["forms"]] == [3, 3, 3]
    assert again["quality"] == result["quality"]


def test_other_content_is_measured_again(
    forms: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=int))  # as above
    cache = EvaluationCache(tmp_path / "cache")
    first, second = (shutil.copytree(forms["dense"], tmp_path / name) for name in ("first", "second"))
    tasks: dict[str, Any] = {"tasks": ["lambada_openai"], "data": data}
    what = Evaluation(ppl=[data / "text.txt"], window=16, windows=4, batch_size=2)

    def cached(**changes: Any) -> list[int]:
        found = run_comparison([str(first), str(second)], Evaluation(**{**vars(what), **changes}), print, cache=cache)
        return [form["cached"] for form in found["forms"]]

    assert cached() == [0, 1]  # the second has the content of the first
    assert cached(window=17) == [0, 1]
    assert cached(batch_size=1) == [0, 1]
    assert cached(dtype="bfloat16") == [0, 1]
    (data / "text.txt").write_text((data / "text.txt").read_text() + " and more")
    assert cached() == [0, 1]
    assert cached(**tasks) == [1, 2]  # the text is known, the task is not
    shutil.copy(forms["other"] / "model.safetensors", second / "model.safetensors")
    assert cached() == [1, 0]


def test_a_form_that_changes_while_it_is_measured_is_not_kept(
    forms: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = shutil.copytree(forms["dense"], tmp_path / "form")
    measure = module.measure_perplexity

    def measured(*args: Any) -> Any:
        (form / "generation_config.json").write_text("{}")
        return measure(*args)

    monkeypatch.setattr(module, "measure_perplexity", measured)
    what = Evaluation(ppl=[data / "text.txt"], window=16, batch_size=2)
    with pytest.raises(CheckpointError, match="changed while"):
        run_comparison([str(form), str(forms["other"])], what, print, cache=EvaluationCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_tasks_key_is_its_content(data: Path) -> None:
    (task,) = load_tasks(["arc_easy"], data)
    key = task_key(task, None)
    assert json.loads(json.dumps(key)) == key
    assert task_key(task, 2)["documents"] != key["documents"]
    assert task_key(task, None) == key
    file = data / TASK_FILES["arc_easy"]["test"]
    assert file.read_text().count("?") > 0
    file.write_text(file.read_text().replace("?", "!", 1))
    other = task_key(load_tasks(["arc_easy"], data)[0], None)
    assert {name for name in key if key[name] != other[name]} == {"documents"}


def test_what_cannot_be_compared_is_refused(forms: dict[str, Path], data: Path, tmp_path: Path) -> None:
    dense, other, text = str(forms["dense"]), str(forms["other"]), data / "text.txt"
    nothing = EvaluationCache(None)
    for where, what, error, match in (
        ([dense], Evaluation(ppl=[text]), UsageError, "at least two forms"),
        ([dense, dense], Evaluation(ppl=[text]), UsageError, "named twice"),
        ([dense, other], Evaluation(), UsageError, "nothing to measure"),
        ([dense, other], Evaluation(ppl=[tmp_path / "none.txt"]), CalibrationError, "cannot read"),
        ([dense, other], Evaluation(tasks=["winogrande"], data=data), CalibrationError, "is missing"),
        ([dense, str(tmp_path / "none")], Evaluation(ppl=[text]), CheckpointError, "does not exist"),
        ([dense, str(tmp_path / "x.onnx")], Evaluation(ppl=[text]), ExportError, "no ONNX file"),
        ([str(forms["onnx"]), dense], Evaluation(ppl=[text], window=16), CheckpointError, "--tokenizer"),
    ):
        with pytest.raises(error, match=match):
            run_comparison(where, what, print, cache=nothing)


def test_names_tell_forms_apart() -> None:
    assert form_names(["models/a", "org/b"]) == ["a", "b"]
    assert form_names(["x/slim", "y/slim"]) == ["x/slim", "y/slim"]
    assert form_names(["a", "a", "b"]) == ["a", "a (2)", "b"]


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_escaped() -> None:
    html = comparison_page(COMPARISON)
    page = Page(html)
    assert page.sections == ["forms", "differences", "figures", "method", "settings", "machine", "versions", "files"]
    assert len(page.ids) == len(set(page.ids))
    assert "<b>no</b>" not in html
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe"})
    assert any("slim · wiki.test.raw" in text for text in page.text)
    (label,) = {attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"}
    assert "perplexity (lower is better), slim  ·  wiki.test.raw: 1.707, 95% interval 1.649 to 1.768" in (label or "")
    assert "#0102" not in html


def test_the_verdict_follows_the_corrected_test_and_what_is_better() -> None:
    text = comparison_markdown(COMPARISON)
    assert f"| slim | {TIMES}1.707 (1.649 to 1.768) | &lt; 0.0001 | &lt; 0.0001 | worse | paired t |" in text
    assert f"| int4 | {TIMES}1.0200 (0.9800 to 1.0620) | 0.3 | 0.6 | none shown | paired t |" in text
    assert "| 0.0001 | 0.0003 | worse | exact McNemar: 12 gained, 40 lost |" in text
    assert "&lt;b&gt;no" in text


def test_a_wrong_comparison_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="forms"):
        write_comparison({**COMPARISON, "forms": COMPARISON["forms"][:1]}, tmp_path)
    with pytest.raises(ExportError, match="more"):
        write_comparison({**COMPARISON, "more": 1}, tmp_path)
    assert list(tmp_path.iterdir()) == []

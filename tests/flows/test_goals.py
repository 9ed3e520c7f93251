"""Several budgets from one calibration: what is written, what is done again, and what users are told."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CalibrationError, OutputError, UsageError
from fxprune.core.pipeline import build_pass
from fxprune.core.stopwatch import Stopwatch
from fxprune.exporters.report import read_report
from fxprune.flows import goals, steps
from fxprune.flows.recipe import Destination, Recipe
from fxprune.flows.slim_speed import speed_plan
from fxprune.flows.wanted import Wanted
from fxprune.measure.bench_gate import JUDGED_PRECISION, GatedCase, Verdict
from fxprune.measure.latency_build import Measurement, table_of, variants_of
from fxprune.measure.latency_table import identity_of, save_table
from fxprune.measure.speed import Bound, SpeedResult, prefill
from fxprune.models.manifest import read_manifest
from fxprune.structured.base import StructuredPass
from fxprune.structured.timed_plans import PlanTimer
from tests.commands import done, run_command

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

OPTIONS = {"samples": 8, "seq_len": 12, "min_keep": 0.1, "reconstruct": "ridge"}
RATIOS = [0.15, 0.3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """One layer of four query heads on two KV heads, 48 channels, with a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        path = tmp_path_factory.mktemp("budgets") / "model"
        LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    path = model.parent / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 60)
    return path


def options(text: Path, **changes: Any) -> dict[str, Any]:
    return OPTIONS | {"ratio": RATIOS, "calibration": str(text)} | changes


@pytest.fixture(scope="module")
def wanted(text: Path) -> Wanted:
    return Wanted(ppl=[str(text)], windows=1)


@pytest.fixture(scope="module")
def pruned(model: Path, text: Path, wanted: Wanted) -> Path:
    """Two budgets; read-only, copy it to change."""
    out = model.parent / "out"
    done(str(model), "wanda-sp", options(text), Destination(out), wanted)
    return out


def test_every_budget_is_a_checkpoint_with_its_own_report(pruned: Path) -> None:
    sizes = []
    for ratio in RATIOS:
        where = pruned / f"ratio-{ratio}"
        report = read_report(where / "report.json")
        assert abs(report["params"]["removed_share_blocks"] - ratio) < 0.1
        assert all(rung["passed"] for rung in report["verify"])
        assert "reloaded checkpoint = slim" in {rung["rung"] for rung in report["verify"]}
        slim = fxprune.load(where)
        sizes.append(sum(parameter.numel() for parameter in slim.parameters()))
        html = (where / "report.html").read_text()
        assert 'id="structured"' in html
        assert "Error of every consumer" in html
        assert 'id="guard"' in html
    assert sizes[0] > sizes[1]


def test_the_history_of_a_budget_has_the_pass_once_with_its_own_target(pruned: Path) -> None:
    for ratio in RATIOS:
        where = pruned / f"ratio-{ratio}"
        report = read_report(where / "report.json")
        (event,) = (event for event in report["history"] if event["name"] == "wanda-sp")
        assert event["options"]["ratio"] == ratio
        assert event["details"]["budgets_of_one_calibration"] == 2
        parts = report["structured"]["seconds"]
        assert set(parts) >= {"text", "curves", "allocate", "reconstruct"}
        assert event["seconds"] >= sum(parts.values())
        assert report["seconds"]["calibrate"] == pytest.approx(parts["text"])
        names = [entry["name"] for entry in json.loads((where / "fxprune.json").read_bytes())["history"]]
        assert names.count("wanda-sp") == 1


def test_the_report_over_all_has_a_curve_and_nested_plans(pruned: Path) -> None:
    report = read_report(pruned / "report.json")
    section = report["budgets"]
    assert section["nested"]
    assert [entry["name"] for entry in section["entries"]] == ["ratio-0.15", "ratio-0.3"]
    plans = [read_manifest(pruned / entry["name"]).plan["kept"] for entry in section["entries"]]
    assert all(set(plans[1][group]) <= set(plans[0][group]) for group in plans[0])
    for entry in section["entries"]:
        own = read_report(pruned / entry["name"] / "report.json")
        assert entry["params"] == own["params"]
        assert entry["quality"] == own["quality"]
        assert len(entry["guard"]["texts"]) == 2
    html = (pruned / "report.html").read_text()
    assert 'id="budgets"' in html
    assert "Plans are nested" in html
    assert "Perplexity by size" in html


def test_plans_that_are_not_nested_are_not_called_so() -> None:
    assert goals._nested([{"a": [0, 1, 2]}, {"a": [0, 2], "b": [1]}])
    assert not goals._nested([{"a": [0, 1]}, {"a": [2]}])
    assert not goals._nested([{"a": [0, 1]}, {}])


def test_what_is_finished_is_not_done_again(
    pruned: Path, model: Path, text: Path, wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("ratio-*/*")}
    (out / "ratio-0.3" / "budget.json").unlink()  # as if it had been interrupted
    kept = {path: time for path, time in before.items() if path.parent.name == "ratio-0.15"}
    done(str(model), "wanda-sp", options(text), Destination(out), wanted)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = read_report(out / "ratio-0.3" / "report.json")
    assert again["groups"] == read_report(pruned / "ratio-0.3" / "report.json")["groups"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("everything is finished: no model is needed")

    monkeypatch.setattr(steps, "load_model", refuse)
    report = done(str(model), "wanda-sp", options(text), Destination(out), wanted)
    assert [entry["name"] for entry in report["budgets"]["entries"]] == ["ratio-0.15", "ratio-0.3"]
    # Other options, or another text under the same name, give other results.
    with pytest.raises(OutputError, match="ratio-0.15 was made with other options"):
        done(str(model), "wanda-sp", options(text, seed=1), Destination(out), wanted)
    text2 = dataclasses.replace(wanted, windows=2)
    with pytest.raises(OutputError, match="allow it to be replaced"):
        done(str(model), "wanda-sp", options(text), Destination(out), text2)
    with pytest.raises(AssertionError, match="no model is needed"):
        done(str(model), "wanda-sp", options(text, seed=1), Destination(out, overwrite=True), wanted)


def test_a_tighter_budget_leaves_those_before_it_as_they_are(model: Path, text: Path, wanted: Wanted) -> None:
    def digests(**changes: Any) -> list[str]:
        step = build_pass("wanda-sp", options(text, **changes))
        assert isinstance(step, StructuredPass)
        facts = goals._facts(Recipe(str(model), (step,), Destination(text.parent), wanted))
        return [wish.digest for wish in goals._wishes(step, facts)]

    one = digests()
    assert digests(ratio=[0.15, 0.3, 0.45])[:2] == one
    assert digests(ratio=[0.2, 0.3])[1] != one[1]  # nested in another plan
    assert set(digests(samples=9)).isdisjoint(one)
    before = text.read_text()
    text.write_text(before + "more")
    try:
        assert set(digests()).isdisjoint(one)
    finally:
        text.write_text(before)


def test_another_output_is_left_alone(model: Path, text: Path, wanted: Wanted, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            done(str(model), "wanda-sp", options(text), Destination(tmp_path, overwrite=overwrite), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": [0.3, 0.2]}, "ratio must grow, got 0.3, 0.2"),
        ({"ratio": [0.2, 0.2]}, "must grow"),
        ({"ratio": None, "target_params": [1e3, 2e3]}, "target_params must shrink"),
        ({"ratio": [0.1, 0.10000001]}, "too close together"),
        ({"ratio": [0.1, 1.2]}, "between 0 and 1"),
    ],
)
def test_budgets_in_the_wrong_order_are_told_before_any_work(
    changes: dict[str, Any], message: str, text: Path, wanted: Wanted, tmp_path: Path
) -> None:
    given = {name: value for name, value in options(text, **changes).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        done("nowhere", "wanda-sp", given, Destination(tmp_path / "out"), wanted)
    assert list(tmp_path.iterdir()) == []


def test_texts_and_methods_are_checked_before_any_work(text: Path, tmp_path: Path) -> None:
    place = Destination(tmp_path / "out")
    with pytest.raises(CalibrationError, match="cannot read"):
        done("nowhere", "wanda-sp", options(text), place, Wanted(guard=str(tmp_path / "missing.txt")))
    with pytest.raises(CalibrationError, match="cannot read"):
        done("nowhere", "wanda-sp", options(text, ratio=0.2), place, wanted=Wanted(ppl=["missing.txt"]))
    with pytest.raises(UsageError, match="say where they go"):
        done("nowhere", "wanda-sp", options(text), Destination(None))
    far = dataclasses.replace(place, device="meta")
    with pytest.raises(UsageError, match="leave --device meta out"):
        done("nowhere", "wanda-sp", options(text, ratio=0.2), far, wanted=Wanted(speed=True))


# ---- the command line ------------------------------------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `fxprune prune` in this process; gives exit status, standard output, standard error."""

    def command(*args: object) -> tuple[int, str, str]:
        return run_command(monkeypatch, capsys, "prune", *args)

    return command


@pytest.fixture(scope="module")
def table(model: Path) -> Path:
    """A latency table of this model and machine, of a noiseless clock: three quarters of the time goes to channels."""
    program = front_end(load_model(str(model)), Stopwatch())
    blocks = tuple(group for group in program.groups if group.kind in {"attention", "mlp"})
    found = []
    for variant in variants_of(blocks):
        width = variant.width
        saved = 0.75 * (1 - width.sets / 48)
        share = saved if variant.shape.startswith("mlp") else 0.05 * (1 - width.sets * width.per_set / 4)
        found.append(Measurement(variant, "prefill-16", (10.0,) * 3, (10.0 * (1 - share),) * 3))
    made = table_of(identity_of(program, threads=1), blocks, (prefill(16),), found)
    save_table(made, model.parent / "table.json")
    return model.parent / "table.json"


def test_a_target_speed_up_is_measured_judged_and_told(
    run: Run, model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forms are exported and proved; the clock alone is a given: no faster at all."""
    asked = []

    def clock(dense: Any, slim: Any, cases: Any, **options: Any) -> list[SpeedResult]:
        asked.append((dense.kind, slim.kind, [case.name for case in cases], options["repeats"], options["precision"]))
        threads = options["threads"]
        assert dense.cost.weight_bytes > slim.cost.weight_bytes
        times = tuple(10.0 + 0.01 * index for index in range(8))
        return [SpeedResult("onnxruntime", cases[0], threads, times, times, (0.99, 1.01), Bound(1.1, "macs"))]

    monkeypatch.setattr("fxprune.flows.slim_speed.measure_speed", clock)
    found = iter((1.4, 1.6))
    monkeypatch.setattr(PlanTimer, "time", lambda *_: next(found))
    out = tmp_path / "out"
    status, shown, err = run(
        model, "--method", "magnitude", "--target-speedup", 1.6, "--table", table, "--threads", 1, "--out", out
    )
    assert status == 1, err
    assert asked == [("onnxruntime", "onnxruntime", ["prefill-16"], 30, JUDGED_PRECISION)]
    assert "the speed gate failed (target 1.6x, within 5%)" in err
    assert "the macs bound is below what is wanted" in err
    report = read_report(out / "report.json")
    assert not report["gate"]["passed"]
    first, second = report["structured"]["timed_plans"]
    assert (first["wanted"], first["measured"], second["measured"]) == (1.6, 1.4, 1.6)
    assert second["predicted"] > first["predicted"] > 1.59  # what the table saves was worth less than it says
    assert re.search(r"1\.6\d.?, measured 1\.40.?, then \d\.\d\d.?, measured 1\.60", (out / "report.html").read_text())
    assert report["speed"][0]["case"] == "prefill-16"
    assert any("ONNX" in rung["rung"] for rung in report["verify"])
    assert "Speed gate: failed" in (out / "report.html").read_text()
    assert "1.00" in shown
    assert fxprune.load(out)  # the output stays
    step = build_pass("magnitude-units", {"target_speedup": 1.6, "table": str(table), "threads": 1})
    exact = speed_plan(step, 1, repeats=7)  # whoever says how many gets no more
    assert (exact.repeats, exact.precision) == (7, None)
    assert speed_plan(build_pass("magnitude-units", {"ratio": 0.2}), 1).repeats == 10


def test_bad_targets_are_told(run: Run, model: Path, table: Path, tmp_path: Path) -> None:
    timed = (model, "--method", "magnitude", "--out", tmp_path / "out", "--table", table)
    status, _, err = run(*timed, "--target-speedup", 1.3, "--threads", 2)
    assert status == 1
    assert "threads: 1 in the table, 2 here" in err
    status, _, err = run(*timed, "--target-speedup", 30, "--threads", 1)
    assert status == 1
    assert "a speed-up of" in err
    status, _, err = run(*timed, "--target-speedup", 1.3, "--threads", 1, "--option", "mix=decode=1")
    assert status == 2
    assert "'decode' names 0 of the measured cases" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--ratio", "0.2;0.3"), "--ratio 0.2;0.3: '0.2;0.3' is no number"),
        (("--ratio", "0.1,"), "'' is no number"),
        (("--target-params", "100X"), "is no number; write such as"),
        (("--target-params", "-5M"), "must be positive"),
        (("--target-macs", "nan"), "must be positive"),
        (("--ratio", "0.2", "--target-params", "1M"), "give one target, not --ratio and --target-params"),
        (("--target-speedup", "1.3"), "--target-speedup and --table go together"),
        (("--target-speedup", "1.3", "--table", "missing.json"), "cannot be read as a latency table"),
        (("--target-speedup", "0.9", "--table", "missing.json"), "larger than 1"),
        (("--ratio", "0.2", "--table", "t.json"), "--target-speedup and --table go together"),
        (("--ratio", "0.2", "--option", "mix=decode=1"), "mix weighs the cases of --target-speedup"),
        (("--target-speedup", "1.3", "--table", "t.json", "--option", "mix=decode"), "give mix=PATTERN=VALUE"),
        (("--ratio", "0.2", "--option", "keep=*.mlp"), "give keep=PATTERN=VALUE"),
        (("--ratio", "0.2", "--option", "keep=*.mlp=2"), "must lie in [0, 1]"),
        (("--ratio", "0.2", "--option", "keep=a=1", "--option", "keep=a=1"), "a is given twice"),
        (("--ratio", "0.2", "--option", "kinds=mlp,"), "there is an empty name between the commas"),
        (("--ratio", "0.2", "--option", "kinds=experts"), "kinds are attention and mlp"),
        (("--ratio", "0.2", "--option", "reconstruct=magic"), "reconstruct"),
        (("--ratio", "0.3,0.2"), "must grow"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    run: Run, given: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    status, _, err = run("nowhere", "--method", "magnitude", "--out", tmp_path / "x", *given)
    assert status == 2, err
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_one_budget_with_limits_by_module(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    status, _, err = run(
        model,
        "--method",
        "magnitude",
        "--target-params",
        "8.5k",
        "--option",
        "kinds=mlp",
        "--option",
        "keep=*mlp*=0.5",
        "--out",
        out,
    )
    assert status == 0, err
    report = read_report(out / "report.json")
    assert report["params"]["slim"] <= 8500
    kept = {group["kind"]: (group["kept"], group["dense"]) for group in report["groups"]}
    assert kept["attention"] == (4, 4)
    assert kept["mlp"][0] >= 24
    assert "guard" not in report


def test_what_users_are_told_of_gates_and_guards() -> None:
    from fxprune.flows.assessment import failed_gate, warnings_of

    failed = Verdict(False, 1.3, 1.235, (GatedCase("prefill-16", 1.1, (1.0, 1.2), False),), ("too slow",)).to_json()
    entries = [{"name": "a", "gate": failed}, {"name": "b", "guard": {"warning": "apart"}}]
    told = warnings_of({"budgets": {"entries": entries}})
    assert told == ["a: the speed gate failed (target 1.3x, within 5%)", "a: too slow", "b: apart"]
    assert failed_gate({"budgets": {"entries": entries}})
    assert not failed_gate({"budgets": {"entries": entries[1:]}})

"""The speed gate, its reasons, and `fxprune bench` around it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from fxprune.channels.accounting import MacCount
from fxprune.core.errors import ExportError, UsageError
from fxprune.exporters.onnx_cost import cost_of_onnx
from fxprune.flows import benchmarking
from fxprune.measure import latency_build
from fxprune.measure.bench_gate import JUDGED_PRECISION, JUDGED_REPEATS, gate, linear_shapes, merged, narrowed_widths
from fxprune.measure.latency_build import Measurement
from fxprune.measure.latency_table import load_table
from fxprune.measure.ratios import Precision, ratio_interval
from fxprune.measure.speed import Bound, Case, Cost, SpeedResult, cost_of, decode, prefill
from tests.commands import run_command
from tests.families import located
from tests.onnx_models import exported

if TYPE_CHECKING:
    from pathlib import Path


def result(
    speedup: float, *, case: Case | None = None, spread: float = 0.002, bound: Bound | None = None, dense: float = 100.0
) -> SpeedResult:
    """Twelve paired runs around a ratio."""
    noise = 1 + spread * np.random.default_rng(0).standard_normal((2, 12))
    times = (dense * noise[0]).tolist(), (dense / speedup * noise[1]).tolist()
    ci = ratio_interval(*times)
    return SpeedResult("test", case or prefill(512), 2, tuple(times[0]), tuple(times[1]), ci, bound)


def costs(blocks: int, slim_blocks: int, head: int) -> tuple[Cost, Cost]:
    return Cost(MacCount(blocks, head), 4 * (blocks + head)), Cost(
        MacCount(slim_blocks, head), 4 * (slim_blocks + head)
    )


# ---- the verdict ---------------------------------------------------------------------------------------------------


def test_a_clear_speed_up_passes_without_reasons() -> None:
    verdict = gate([result(1.2), result(1.1, case=decode(8, past=64))])
    assert verdict.passed
    assert verdict.reasons == ()
    assert [case.passed for case in verdict.cases] == [True, True]
    assert "target" not in verdict.to_json()


@pytest.mark.parametrize(("speedup", "passed"), [(1.30, True), (1.26, True), (1.20, False), (1.5, True)])
def test_a_target_holds_within_five_percent(speedup: float, passed: bool) -> None:
    verdict = gate([result(speedup)], 1.3)
    assert verdict.passed is passed
    assert verdict.threshold == pytest.approx(1.235)
    assert json.loads(json.dumps(verdict.to_json()))["target"] == 1.3


def test_a_small_target_still_needs_to_be_faster() -> None:
    assert gate([result(1.05)], 1.03).passed
    assert not gate([result(0.995)], 1.03).passed


def test_the_lower_bound_decides_not_the_median() -> None:
    noisy = result(1.1, spread=0.3)
    assert noisy.speedup > 1
    verdict = gate([noisy])
    assert not verdict.passed
    assert any("--repeats" in reason for reason in verdict.reasons)


def test_every_case_must_pass_unless_a_mix_is_judged_as_one() -> None:
    results = [result(1.6), result(0.9, case=decode(8, past=64), dense=5.0)]
    verdict = gate(results)
    assert [case.passed for case in verdict.cases] == [True, False]
    assert not any(reason.startswith("prefill") for reason in verdict.reasons)
    mixed = gate(results, 1.1, mix={"prefill": 1, "decode": 1})
    assert mixed.passed
    (case,) = mixed.cases
    assert case.name == "0.5 prefill-512 + 0.5 decode-8@64"
    assert case.speedup == pytest.approx(1 / (0.5 / results[0].speedup + 0.5 / results[1].speedup))
    assert case.ci[0] <= case.speedup <= case.ci[1]
    assert case.ci[1] - case.ci[0] < 0.02
    assert gate(results, mix={"prefill": 1}).passed
    assert not gate(results, mix={"decode": 1}).passed


def test_several_forms_are_told_apart_and_judged_together() -> None:
    good, bad = (replace(result(speedup), form=name) for speedup, name in ((1.4, "slim"), (0.9, "int4")))
    verdict = merged([gate([good], prefix="torch, 1 threads, "), gate([bad])])
    assert [case.name for case in verdict.cases] == ["torch, 1 threads, slim, prefill-512", "int4, prefill-512"]
    assert [case.passed for case in verdict.cases] == [True, False]
    assert not verdict.passed
    assert verdict.reasons[0].startswith("int4, prefill-512: measured 0.90x")
    assert merged([gate([good])]).passed
    with pytest.raises(UsageError, match="at least one measured case"):
        merged([])


def test_wrong_questions_are_refused() -> None:
    for target in (1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="must be a number above 1"):
            gate([result(1.2)], target)
    with pytest.raises(UsageError, match="at least one measured case"):
        gate([])
    with pytest.raises(UsageError, match="names 0 of the measured cases"):
        gate([result(1.2)], mix={"decode": 1})


# ---- the reasons ---------------------------------------------------------------------------------------------------


def test_a_bound_below_the_target_is_the_reason() -> None:
    (_, reason) = gate([result(1.1, bound=Bound(1.15, "macs"))], 1.3).reasons
    assert reason.startswith("prefill-512: the macs bound is below what is wanted")
    assert "1.15x only" in reason
    decoded = result(1.0, case=decode(8, past=64), bound=Bound(1.02, "bytes"))
    (_, reason) = gate([decoded]).reasons
    assert "bytes of weights and cache" in reason


def test_a_bound_that_would_do_blames_the_rest() -> None:
    (_, reason) = gate([result(1.1, bound=Bound(1.5, "macs"))], 1.3).reasons
    assert "bound is 1.50x, so the rest of the time" in reason


def test_a_large_output_projection_is_a_reason_and_a_small_one_is_not() -> None:
    (_, reason) = gate([result(0.99)], costs=costs(100, 60, 40)).reasons
    assert "40% of the slim form's products" in reason
    assert "3.50x" in reason  # 140 / 40
    assert len(gate([result(0.99)], costs=costs(100, 90, 5)).reasons) == 1


def test_ragged_widths_are_a_reason() -> None:
    widths = {"layers.0.mlp.up_proj.weight": 1021, "layers.1.mlp.up_proj.weight": 1024}
    (_, reason) = gate([result(0.99)], widths=widths).reasons
    assert reason.startswith("1 of 2 changed widths are no multiple of 8, such as 1021 in layers.0.mlp.up_proj.weight")
    assert len(gate([result(0.99)], widths={"a": 1024}).reasons) == 1
    assert not gate([result(1.2)], widths=widths).reasons


def test_only_changed_widths_are_looked_at() -> None:
    dense = nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 3))
    slim = nn.Sequential(nn.Linear(3, 13), nn.Linear(13, 3), nn.Linear(3, 7))
    found = narrowed_widths(linear_shapes(dense), linear_shapes(slim))
    assert found == {"0.weight": 13, "1.weight": 13}


# ---- counting an ONNX graph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_an_onnx_graph_counts_as_the_graph_it_came_from(name: str) -> None:
    program, export = exported(name)
    counted = cost_of_onnx(export.path)
    expected = cost_of(program.graph_module, program.interface)
    assert counted.cost.macs.blocks == expected.macs.blocks
    assert counted.cost.macs.lm_head == expected.macs.lm_head > 0
    assert not counted.cost.macs.uncounted
    assert counted.cost.cache_bytes == expected.cache_bytes > 0
    assert counted.cost.weight_bytes == pytest.approx(expected.weight_bytes, rel=0.02)  # and a few constants
    shapes = {name: shape for name, shape in linear_shapes(program.graph_module).items() if "lm_head" not in name}
    assert sorted(counted.shapes.values()) == sorted(shapes.values())


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="cannot be read as an ONNX graph"):
        cost_of_onnx(tmp_path / "x.onnx")


def test_a_transposed_gemm_counts_as_it_is_stored(tmp_path: Path) -> None:
    weight = ir.tensor(np.zeros((5, 3), dtype=np.float32), name="w")
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", shape=ir.Shape([5, 3]), type=ir.TensorType(ir.DataType.FLOAT), const_value=weight)
    node = ir.node("Gemm", [x, w], attributes={"transB": 1})
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20})
    node.outputs[0].name = "y"
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
    counted = cost_of_onnx(tmp_path / "g.onnx")
    assert counted.shapes == {"w": (3, 5)}
    assert (counted.cost.macs.blocks, counted.cost.weight_bytes) == (15, 60)


def test_packed_weights_count_as_products_with_the_bytes_they_have(tmp_path: Path) -> None:
    packed = ir.tensor(np.zeros((8, 2, 8), dtype=np.uint8), name="w_Q4")
    scales = ir.tensor(np.zeros(16, dtype=np.float32), name="w_scales")
    table = ir.tensor(np.zeros((100, 16), dtype=np.uint8), name="e_Q4")
    weights = [ir.Value(name=t.name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t) for t in
               (packed, scales, table)]  # fmt: skip
    x = ir.Value(name="x", shape=ir.Shape([2, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    sizes = {"K": 32, "N": 8, "bits": 4, "block_size": 16}
    product = ir.node("MatMulNBits", [x, *weights[:2]], attributes=sizes, domain="com.microsoft")
    lookup = ir.node("GatherBlockQuantized", [weights[2], x, weights[1]], domain="com.microsoft")
    product.outputs[0].name, lookup.outputs[0].name = "y", "z"
    outputs = [*product.outputs, *lookup.outputs]
    graph = ir.Graph([x], outputs, nodes=[lookup, product], initializers=weights, opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
    counted = cost_of_onnx(tmp_path / "g.onnx")
    assert counted.shapes == {"w_Q4": (32, 8)}
    assert (counted.cost.macs.blocks, counted.cost.weight_bytes) == (256, 8 * 2 * 8 + 16 * 4)  # the table is looked up


# ---- the command ---------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    return run_command(monkeypatch, capsys, "bench", *args)


FAST = ("--prefill", 4, "--decode", 0, "--repeats", 2, "--threads", 1, "--no-footprint")


def test_bench_of_onnx_forms_states_bounds_and_fails_a_target_that_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, export = exported("llama")
    figures = tmp_path / "f.json"
    where = export.path.parent
    status, shown, err = run(monkeypatch, capsys, where, where, *FAST, "--target-speedup", 50, "--json", figures)
    assert status == 1, err
    data = json.loads(figures.read_text())
    assert data["speed"][0]["bound"] == pytest.approx(1.0)
    assert data["gate"]["passed"] is False
    assert "gate: 50.00x within 5%: failed" in shown
    assert "macs bound is below what is wanted" in shown
    status, shown, _ = run(monkeypatch, capsys, where, where, *FAST)  # without the gate the same figures are no failure
    assert status == 0
    assert "gate" not in shown


@pytest.mark.parametrize(("speedup", "status"), [(1.4, 0), (0.9, 1)])
def test_the_gate_decides_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], speedup: float, status: int
) -> None:
    asked: list[tuple[int, Precision | None]] = []

    def measured(*args: Any, **options: Any) -> list[list[SpeedResult]]:
        del args
        asked.append((options["repeats"], options["precision"]))
        return [[result(speedup)]]

    monkeypatch.setattr(benchmarking, "measure_speeds", measured)
    where = exported("llama")[1].path
    found, shown, err = run(monkeypatch, capsys, where, where, "--gate", *FAST)
    assert found == status, err
    assert ("faster than dense: passed" in shown) is (status == 0)
    usual = [part for part in FAST if part not in {"--repeats", 2}]
    assert run(monkeypatch, capsys, where, where, "--gate", *usual)[0] == status
    assert run(monkeypatch, capsys, where, where, *usual)[0] == 0
    # What is judged is timed until it is known well, unless the number was given.
    assert asked == [(2, None), (JUDGED_REPEATS, JUDGED_PRECISION), (10, None)]


def test_bench_table_writes_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Loading and timing have tests of their own; here the clock's figures are made up."""

    def measured(program: object, variants: Any, setting: Any, progress: Any, say: object) -> None:
        del program, say
        assert (setting.threads, setting.repeats) == (1, 4)
        for variant in variants:
            progress.add([Measurement(variant, case.name, (10.0, 10.0), (9.0, 9.0)) for case in setting.cases])

    monkeypatch.setattr(benchmarking, "check_language", lambda *_: None)
    monkeypatch.setattr(benchmarking, "load_model", lambda *args, **options: (args, options))
    monkeypatch.setattr(benchmarking, "front_end", lambda loaded, watch: located("llama") if loaded and watch else None)
    monkeypatch.setattr(latency_build, "_measure_all", measured)
    out, copy = tmp_path / "table.json", tmp_path / "copy.json"
    args = ("--table", out, "--prefill", 4, "--decode", 2, "--past", 4, "--repeats", 4, "--threads", 1)
    status, shown, err = run(monkeypatch, capsys, "model", *args, "--json", copy)
    assert status == 0, err
    times = load_table(out)
    assert [case.case.name for case in times.cases] == ["prefill-4", "decode-2@4"]
    assert times.cases[0].dense_ms == 10
    assert times.identity.threads == 1
    assert json.loads(copy.read_text()) == json.loads(out.read_text())
    assert "Milliseconds a block" in shown


def test_bench_refuses_what_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "t.json"
    for args in (("a",), ("a", "b", "--table", table), ("a", "--table", table, "--gate")):
        status, _, err = run(monkeypatch, capsys, *args)
        assert status == 2
        assert "two forms to compare" in err
    for args, match in (
        (("a", "b", "--runtime", "tensorrt"), "'tensorrt' is unknown; use torch, torch.compile, onnxruntime, genai"),
        (("a", "b", "--runtime", "genai", "--batch", 2), "one sequence at a time"),
        (("a", exported("llama")[1].path), "cannot compare torch with onnxruntime; name the runtime"),
        (("a", "b", "--prefill", 0), "Invalid value for '--prefill'"),
        ((exported("llama")[1].path, "b", "--runtime", "torch"), "which torch does not run"),
        (("a", "--table", table, "--threads", 1, "--threads", 2), "one number of threads"),
    ):
        status, _, err = run(monkeypatch, capsys, *args)
        assert status == 2
        assert match in err
    status, _, err = run(monkeypatch, capsys, "a", "b", "--target-speedup", 0.9)
    assert status == 2
    assert "must be a number above 1" in err
    status, _, err = run(monkeypatch, capsys, "a", "--table", table, "--prefill", 8, "--repeats", 1)
    assert status == 2

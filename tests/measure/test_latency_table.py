"""Latency tables: costs by width, what they may be used for, and the builder on ONNX Runtime."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.core.errors import OutputError, PlanError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup
from fxprune.core.plan import Plan
from fxprune.measure import latency_build
from fxprune.measure.latency_build import Measurement, Variant, build_table, table_of, variants_of
from fxprune.measure.latency_table import (
    Identity,
    LatencyTable,
    Surface,
    Width,
    block_shape,
    case_weights,
    dense_width,
    has_width,
    identity_of,
    load_table,
    save_table,
    width_of,
)
from fxprune.measure.speed import SpeedResult, decode, prefill
from tests.families import located, random_plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.measure.speed import Case
    from fxprune.runtimes.runners import Runner

CASES = (prefill(16), decode(4, past=8))
BASE = {"prefill-16": 7.0, "decode-4@8": 3.0}
SPEED = {"prefill-16": 1.0, "decode-4@8": 0.25}


def program() -> Program:
    """Two layers of six query heads on two KV heads, 20 channels."""
    return located("llama")


def true_ms(group: Group, width: Width, case: str) -> float:
    """A cost that a table can hold exactly: linear in channels, in KV heads and in query heads."""
    if isinstance(group, AttentionGroup):
        return SPEED[case] * (0.5 * width.sets + 0.3 * width.sets * width.per_set)
    return SPEED[case] * 0.1 * width.sets


def true_total(groups: tuple[Group, ...], widths: dict[str, Width], case: str) -> float:
    blocks = (true_ms(g, widths.get(g.name, dense_width(g)), case) for g in groups)
    return BASE[case] + sum(blocks)


def measurements(groups: tuple[Group, ...]) -> list[Measurement]:
    """What a noiseless machine would measure, at another speed for every variant: the machine drifts."""
    found = []
    for index, variant in enumerate(variants_of(groups)):
        drift = 1 + 0.1 * (-1) ** index * (index > 0)
        for case in CASES:
            slim = {g.name: variant.width for g in groups if block_shape(g) == variant.shape}
            dense_ms, slim_ms = (drift * true_total(groups, widths, case.name) for widths in ({}, slim))
            found.append(Measurement(variant, case.name, (dense_ms,) * 3, (slim_ms,) * 3))
    return found


def table(found: Program | None = None) -> LatencyTable:
    found = found or program()
    return table_of(identity_of(found, threads=1), found.groups, CASES, measurements(found.groups))


# ---- widths and shapes ---------------------------------------------------------------------------------------------


def test_the_width_of_a_group_follows_from_its_kept_units() -> None:
    attention, mlp = (next(g for g in program().groups if g.kind == kind) for kind in ("attention", "mlp"))
    assert dense_width(attention) == Width(2, 3)
    assert width_of(attention, [0, 2, 3, 5]) == Width(2, 2)
    assert width_of(attention, [3, 4, 5]) == Width(1, 3)
    assert width_of(mlp, [1, 5, 19]) == Width(3)


def test_the_shape_of_a_block_knows_no_names_and_tells_sizes_apart() -> None:
    shapes = [block_shape(g) for g in program().groups if has_width(g)]
    assert len(shapes) == 4
    assert len(set(shapes)) == 2
    wider = {block_shape(g) for g in located("llama", intermediate_size=24).groups}
    assert len(wider & set(shapes)) == 1  # the attentions are alike


def test_a_few_widths_are_measured_and_the_dense_one_is_not() -> None:
    found = program()
    variants = variants_of(found.groups)
    attention, mlp = (next(g for g in found.groups if g.kind == kind) for kind in ("attention", "mlp"))
    widths = {shape: [v.width for v in variants if v.shape == shape] for shape in {v.shape for v in variants}}
    assert widths[block_shape(attention)] == [Width(1, 1), Width(1, 3), Width(2, 1)]
    assert widths[block_shape(mlp)] == [Width(2), Width(10), Width(15)]
    with pytest.raises(PreconditionError, match="nothing|none prunable"):
        variants_of([])


# ---- surfaces ------------------------------------------------------------------------------------------------------


def test_a_surface_is_linear_between_widths_and_zero_is_at_width_zero() -> None:
    surface = Surface.fit([10, 20, 40], [1], [[6.0], [4.0], [0.0]])  # saved: 0.2 ms a channel
    assert [surface.at(Width(w)) for w in (10, 15, 40)] == pytest.approx([2.0, 3.0, 8.0])
    assert surface.at(Width(3)) == pytest.approx(0.6)
    assert surface.at(Width(99)) == pytest.approx(8.0)


def test_noise_is_pooled_so_that_a_wider_block_never_costs_less() -> None:
    surface = Surface.fit([1, 2, 3, 4], [1], [[3.0], [1.9], [2.1], [0.0]])
    assert surface.ms[1] == surface.ms[2]
    assert surface.ms[3][0] - surface.ms[1][0] == pytest.approx(2.0)  # the mean of both, not either


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=2), min_size=1, max_size=5))
def test_a_surface_never_falls_and_is_never_negative(saved: list[list[float]]) -> None:
    ms = np.array(Surface.fit(range(1, len(saved) + 1), [1, 3], saved).ms)
    assert (np.diff(ms, axis=0) >= -1e-12).all()
    assert (np.diff(ms, axis=1) >= -1e-12).all()
    assert (ms >= 0).all()


# ---- predictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_costs_that_are_linear_are_predicted_exactly_whatever_the_drift(seed: int) -> None:
    found = program()
    plan = random_plan(tuple(g for g in found.groups if has_width(g)), seed)
    widths = {g.name: width_of(g, plan.kept_units(g)) for g in found.groups if has_width(g)}
    predicted = table().predict(found.groups, plan)
    dense = table().predict(found.groups, Plan({}))
    for case in CASES:
        true = true_total(found.groups, widths, case.name) / true_total(found.groups, {}, case.name)
        assert predicted[case.name] / dense[case.name] == pytest.approx(true)


def test_costs_of_a_mix_add_up_to_the_budget() -> None:
    found, times = program(), table()
    mix = {"prefill": 3, "decode": 1}
    assert times.weights(mix) == {"prefill-16": 0.75, "decode-4@8": 0.25}
    plan = random_plan(tuple(g for g in found.groups if has_width(g)), 1)
    predicted, dense = times.predict(found.groups, plan), times.predict(found.groups, Plan({}))
    cost = sum(times.cost(g, plan.kept_units(g), mix) for g in found.groups if has_width(g))
    share = 0.75 * predicted["prefill-16"] / dense["prefill-16"] + 0.25 * predicted["decode-4@8"] / dense["decode-4@8"]
    assert times.speedup(cost, mix) == pytest.approx(1 / share)
    assert times.budget(1 / share, mix) == pytest.approx(cost)
    whole = sum(times.cost(g, range(g.units), mix) for g in found.groups if has_width(g))
    assert times.speedup(whole, mix) == pytest.approx(1)


def test_what_the_table_does_not_know_is_refused() -> None:
    times = table()
    stranger = next(g for g in located("llama", intermediate_size=24).groups if g.kind == "mlp")
    with pytest.raises(PlanError, match=r"layers\.0\.mlp: the latency table has no times for mlp blocks like this"):
        times.ms(stranger, range(8))
    with pytest.raises(
        UsageError, match="'prefill-512' names 0 of the measured cases; they are prefill-16, decode-4@8"
    ):
        times.weights({"prefill-512": 1})
    for wrong in ({"prefill": -1.0}, {"prefill": float("nan")}, {"prefill": 0.0}):
        with pytest.raises(UsageError, match="number from 0 up|no case has a weight"):
            times.weights(wrong)
    with pytest.raises(UsageError, match="names 2 of the measured cases"):
        case_weights([prefill(4), prefill(8)], {"prefill": 1})
    for target in (1.0, 0.5, float("nan")):
        with pytest.raises(UsageError, match="must be a number above 1"):
            times.budget(target, {"prefill": 1})


# ---- identity and files --------------------------------------------------------------------------------------------


def test_a_table_holds_for_other_weights_of_the_same_structure() -> None:
    times, found = table(), program()
    other = dataclasses.replace(found, graph_module=_with_zeros(found))
    times.check(other, threads=1)


def _with_zeros(found: Program) -> Any:
    module = copy.deepcopy(found.graph_module)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cpu", "Another CPU", "processor: Another CPU in the table, .* here"),
        ("cores", 999, "usable cores: 999 in the table"),
        ("runtime_version", "0.1", r"onnxruntime version: 0\.1 in the table"),
        ("threads", 7, "threads: 7 in the table, 1 here"),
        ("model", "0" * 64, "model: .* parameters in float32 .* in the table, .* here"),
    ],
)
def test_a_table_of_something_else_says_what_differs_and_what_to_do(field: str, value: Any, message: str) -> None:
    times = table()
    foreign = dataclasses.replace(times, identity=dataclasses.replace(times.identity, **{field: value}))
    with pytest.raises(PreconditionError, match=f"{message}.*fxprune bench MODEL --table"):
        foreign.check(program(), threads=1)


def test_another_width_or_precision_is_another_model() -> None:
    own = identity_of(program(), threads=1)
    assert not own.differences(identity_of(program(), threads=1))
    for other in (located("llama", intermediate_size=24), located("qwen3")):
        assert own.differences(identity_of(other, threads=1))[0].startswith("model: ")
    with pytest.raises(PreconditionError, match="not installed"):
        identity_of(program(), threads=1, runtime="tensorrt")


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    times = table()
    save_table(times, tmp_path / "table.json")
    again = load_table(tmp_path / "table.json")
    assert (again.identity, again.cases) == (times.identity, times.cases)
    assert json.loads((tmp_path / "table.json").read_text())["measurements"][0]["repeats"] == 3


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(UsageError, match="cannot be read as a latency table"):
        load_table(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="is no latency table"):
        load_table(path)
    data = table().to_json()
    path.write_text(json.dumps(data | {"schema_version": 99}))
    with pytest.raises(UsageError, match="schema version 99"):
        load_table(path)
    surface = next(iter(data["cases"][0]["blocks"].values()))
    surface["ms"] = surface["ms"][:-1]
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="is damaged"):
        load_table(path)


# ---- the builder ---------------------------------------------------------------------------------------------------


def test_the_builder_times_exported_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_build, "_MLP_SHARES", (1 / 2,))
    monkeypatch.setattr(latency_build, "_ROUNDS", 1)
    found = located("llama")
    found = found.replace(groups=tuple(g for g in found.groups if g.kind == "mlp"))
    opened: list[Any] = []
    runner = latency_build.exported_runner

    def noting(program: Program, directory: Path, threads: int) -> Runner:
        opened.append(program.graph_module.get_submodule("model.layers.1.mlp.up_proj").out_features)
        return runner(program, directory, threads)

    monkeypatch.setattr(latency_build, "exported_runner", noting)
    times = build_table(found, tmp_path / "table.json", [prefill(4)], threads=1, repeats=2)
    assert opened == [20, 10]
    again = load_table(tmp_path / "table.json")
    again.check(found, threads=1)
    assert again.cases == times.cases
    (entry,) = again.measurements
    assert entry["dense_ms"] > 0
    assert entry["slim_ms"] > 0


class _Stop(Exception):  # noqa: N818 - no error of the code under test
    pass


def test_the_builder_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run and what is timed is made up; the plans, the slimming and the files are real."""
    timed: list[str] = []

    def runner(program: Program, directory: Path, threads: int) -> Any:
        del threads
        linear = program.graph_module.get_submodule("model.layers.0.mlp.up_proj")
        return f"{directory.name} {linear.out_features}"

    def bench(dense: str, slim: str, cases: Sequence[Case], **options: Any) -> list[SpeedResult]:
        assert options["threads"] == 1
        timed.append(slim)
        times = tuple(float(runner.split()[1]) for runner in (dense, slim))
        before, after = ((time,) * options["repeats"] for time in times)
        return [SpeedResult("none", case, 1, before, after, (1.0, 1.0)) for case in cases]

    monkeypatch.setattr(latency_build, "exported_runner", runner)
    monkeypatch.setattr(latency_build, "bench", bench)
    found = program().replace(groups=tuple(g for g in program().groups if g.kind == "mlp"))
    out = tmp_path / "table.json"
    lines: list[str] = []

    def stop_at_the_third(line: str) -> None:
        lines.append(line)
        if line.startswith("3 of 3"):
            raise _Stop

    with pytest.raises(_Stop):
        build_table(found, out, CASES[:1], threads=1, repeats=2, say=stop_at_the_third)
    assert not out.exists()
    assert len(json.loads((tmp_path / "table.json.partial").read_text())["done"]) == 2
    assert any("about" in line and "minutes" in line for line in lines)
    assert timed == ["dense 20", "slim 2", "slim 10"]  # the first is for the estimate
    timed.clear()
    times = build_table(found, out, CASES[:1], threads=1, repeats=2, say=lines.append)
    assert timed == ["dense 20", "slim 15"]
    assert any(line.startswith("2 of 3 variants were measured before") for line in lines)
    assert not (tmp_path / "table.json.partial").exists()
    assert load_table(out).cases == times.cases
    # "milliseconds" are the channels of one block, of which there are two
    mlp = found.groups[0]
    assert times.predict(found.groups, Plan.of({mlp.name: range(10)})) == pytest.approx({"prefill-16": 15})


def test_progress_of_another_setting_is_not_taken_up(tmp_path: Path) -> None:
    identity = identity_of(program(), threads=1)
    path = tmp_path / "t.partial"
    entry = Measurement(Variant("mlp-1", Width(1)), "prefill-16", (2.0, 2.0), (1.0, 1.0))
    latency_build._Progress(path, identity, CASES, 6).add([entry])
    assert latency_build._Progress(path, identity, CASES, 6).done == [entry]
    elsewhere: Identity = dataclasses.replace(identity, cpu="another")
    assert not latency_build._Progress(path, elsewhere, CASES, 6).done
    assert not latency_build._Progress(path, identity, CASES[:1], 6).done
    path.write_text("{")
    assert not latency_build._Progress(path, identity, CASES, 6).done


def test_the_builder_refuses_before_it_measures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one case, each once"):
        build_table(program(), tmp_path / "t.json", [prefill(4), prefill(4)], threads=1)
    with pytest.raises(OutputError, match="is a directory"):
        build_table(program(), tmp_path, [prefill(4)], threads=1)
    with pytest.raises(OutputError):
        build_table(program(), tmp_path / "missing" / "t.json", [prefill(4)], threads=1)

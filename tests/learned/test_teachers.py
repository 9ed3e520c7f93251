"""Teachers: which snapshots there are, which of them teaches, bounded memory, switching without copies, resuming."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fxprune.core.errors import CheckpointError, UsageError
from fxprune.learned.gates import ProgramGates
from fxprune.learned.teachers import Snapshot, Teachers, worn
from tests.families import located


def snapshot(sparsity: float, step: int = 0) -> Snapshot:
    return Snapshot(sparsity, {"mlp": torch.full((4,), 1 - sparsity)}, {"a": torch.full((3, 2), sparsity)}, step)


SIZE = 4 * 4 + 6 * 4


def pruned_to(target: float, steps: int = 100, **options: float) -> Teachers:
    """A student that gets sparser step by step."""
    teachers = Teachers(snapshot(0.0), **options)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        teachers.record(snapshot(target * step / steps, step))
    return teachers


def test_there_is_a_snapshot_for_every_interval() -> None:
    teachers = pruned_to(0.5, 500)
    assert [s.sparsity for s in teachers.snapshots] == pytest.approx([0.01 * i for i in range(1, 51)])
    # Coarse steps skip some, and falling back makes none.
    teachers = Teachers(snapshot(0.0), interval=0.1)
    assert [teachers.record(snapshot(s)) for s in (0.05, 0.12, 0.19, 0.35, 0.25, 0.39, 0.4)] == [0, 1, 0, 1, 0, 0, 1]


def test_the_first_stage_follows_with_the_gap_from_the_intact_model_on() -> None:
    teachers = pruned_to(0.5, 500)
    for sparsity, wanted in ((0.0, 0.0), (0.05, 0.0), (0.1, 0.0), (0.2, 0.1), (0.333, 0.23), (0.5, 0.4)):
        assert teachers.while_pruning(sparsity).sparsity == pytest.approx(wanted)
    assert teachers.while_pruning(0.0) is teachers.intact
    # Never one that is as sparse as the student, even when the nearest is.
    few = Teachers(snapshot(0.0), gap=0.01)
    few.record(snapshot(0.3))
    assert few.while_pruning(0.3) is few.intact


def test_the_second_stage_runs_back_from_weak_to_strong_and_ends_intact() -> None:
    teachers = pruned_to(0.5, 500)
    steps = [teachers.afterwards(i / 1000, 0.5).sparsity for i in range(1001)]
    assert steps[0] == pytest.approx(0.4)
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == 41
    assert teachers.afterwards(1.0, 0.5) is teachers.intact
    shares = [steps.count(value) for value in set(steps)]
    assert max(shares) <= min(shares) + 2
    with pytest.raises(UsageError, match="progress"):
        teachers.afterwards(1.1, 0.5)
    assert Teachers(snapshot(0.0)).afterwards(0.0, 0.05).sparsity == 0


@pytest.mark.parametrize("count", [4, 7, 20])
def test_memory_is_bounded_and_what_stays_is_spread_evenly(count: int) -> None:
    teachers = Teachers(snapshot(0.0), limit_bytes=SIZE * (count + 1))
    for step in range(1, 301):
        teachers.record(snapshot(step / 500, step))
        assert teachers.bytes <= SIZE * (count + 1)
        kept = [s.sparsity for s in teachers.snapshots]
        marks = [step // 5] if step < 10 else [1, step // 5]
        for mark in marks if step >= 5 else []:  # first and last
            assert any(value == pytest.approx(mark * 0.01) for value in kept)
    assert len(kept) == count
    spans = [b - a for a, b in itertools.pairwise(kept)]
    assert max(spans) <= 3 * 0.59 / (count - 1)


def test_snapshots_are_copies_on_the_cpu() -> None:
    live = {"a": nn.Parameter(torch.zeros(3, 2))}
    teachers = Teachers(Snapshot(0.0, {}, live))
    teachers.record(Snapshot(0.02, {}, live))
    with torch.no_grad():
        live["a"].add_(5)
    for kept in (teachers.intact, *teachers.snapshots):
        assert float(kept.adapters["a"].sum()) == 0
        assert not kept.adapters["a"].requires_grad
        assert kept.adapters["a"].device.type == "cpu"
    assert teachers.bytes == 2 * 6 * 4


def test_switching_copies_no_weights_and_leaves_no_trace() -> None:
    program = located("llama")
    gates = ProgramGates(program)
    examples = tuple(program.interface.example_inputs.values())
    weights = {name: p.data_ptr() for name, p in gates.graph_module.named_parameters()}
    adapter = nn.Parameter(torch.full((3, 2), 7.0))
    own = adapter.data_ptr()
    half = {name: 0.5 * value for name, value in gates.ones().items()}
    teacher = Snapshot(0.2, half, {"a": torch.ones(3, 2)})
    with worn(teacher, {"a": adapter}) as values, gates.applied(values) as model:
        assert adapter.data_ptr() == teacher.adapters["a"].data_ptr()
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights
        taught = model(*examples)[0]
    assert not taught.requires_grad
    assert adapter.data_ptr() == own
    assert adapter.requires_grad
    assert torch.equal(gates.graph_module(*examples)[0], program.graph_module(*examples)[0])
    with gates.applied(half) as model:
        assert torch.equal(model(*examples)[0], taught)


def test_a_students_gradients_survive_a_teacher_that_ran_between() -> None:
    adapter = nn.Parameter(torch.tensor([2.0, 3.0]))
    loss = (adapter**3).sum()
    with worn(Snapshot(0.1, {}, {"a": torch.zeros(2)}), {"a": adapter}):
        pass
    loss.backward()
    assert adapter.grad is not None
    assert adapter.grad.tolist() == [12, 27]


def test_resuming_gives_the_same_teachers() -> None:
    teachers = pruned_to(0.3)
    again = Teachers(snapshot(0.0))
    again.load_state_dict(teachers.state_dict())
    assert [(s.sparsity, s.step) for s in again.snapshots] == [(s.sparsity, s.step) for s in teachers.snapshots]
    assert torch.equal(again.afterwards(0.3, 0.3).adapters["a"], teachers.afterwards(0.3, 0.3).adapters["a"])
    with pytest.raises(CheckpointError, match="resume with the settings of the first run"):
        Teachers(snapshot(0.0), gap=0.2).load_state_dict(teachers.state_dict())
    other = Snapshot(0.0, {"mlp": torch.ones(5)}, {})
    with pytest.raises(CheckpointError, match="other gates or adapters"):
        Teachers(other).load_state_dict(teachers.state_dict())


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError, match="interval of teachers"):
        Teachers(snapshot(0.0), interval=0)
    with pytest.raises(UsageError, match="gap between teacher and student"):
        Teachers(snapshot(0.0), gap=1)
    with pytest.raises(UsageError, match=f"allow {3 * SIZE} bytes or more"):
        Teachers(snapshot(0.0), limit_bytes=3 * SIZE - 1)
    with pytest.raises(UsageError, match="training has diverged"):
        Teachers(snapshot(0.0)).record(snapshot(float("nan")))
    with pytest.raises(CheckpointError, match="load the same LoRA"), worn(snapshot(0.1), {}):
        pass

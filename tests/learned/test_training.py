"""The training loop of learned pruning: adapters, budgets in every step, teachers, resuming, divergence."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxprune.channels.lora_targets import lora_targets
from fxprune.core.errors import CheckpointError, OutputError, PlanError, PreconditionError, TrainingError, UsageError
from fxprune.core.plan import Plan
from fxprune.core.schedule import cosine
from fxprune.learned.finish import program_divergence
from fxprune.learned.gates import fold_gates
from fxprune.learned.hard_budget import BudgetProjector
from fxprune.learned.log import TrainingLog
from fxprune.learned.model import GatedModel
from fxprune.learned.options import L0Options, steps_of
from fxprune.learned.size import HardBudget, LagrangianBudget, expected_sparsity
from fxprune.learned.state import StateDirectory
from fxprune.learned.training import Learner, batch_of, divergence
from fxprune.passes.locate_layers import LocateLayers
from fxprune.structured.curves import Limits
from fxprune.structured.targets import Target, cost_model
from fxprune.tracing.nodes import get_attribute
from tests.families import located

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

RATIO = 0.4


@functools.cache
def program() -> Program:
    """Grouped queries, a gated MLP, RMSNorm; layers located."""
    return LocateLayers()(located("llama")).program


def groups() -> list[Group]:
    return [group for group in program().groups if group.kind in {"attention", "mlp"}]


def text(samples: int = 16, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(4, 61, (samples, length), generator=torch.Generator().manual_seed(seed))


def gated(**options: Any) -> GatedModel:
    return GatedModel(program(), groups(), **{"rank": 2, "drop_rate": 0.3, **options})


def learner(
    tokens: Tensor | None = None, state: StateDirectory | None = None, refit: Any = None, **options: Any
) -> Learner:
    """A small training with gates that do not start from scores."""
    made = L0Options(**{"steps": 10, "settle": 0.2, "warm_up": 0.5, "lora_rank": 2, "save_every": 4, **options})
    model = gated(rank=made.lora_rank, hidden=made.hidden, checkpointing=made.checkpointing)
    with torch.no_grad():  # some order of the units
        for parameter in model.gates.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected, sparsity = expected_sparsity(program(), groups(), Target("ratio", RATIO), None, None)
    costs = cost_model("ratio", program(), groups())
    limits = {group.name: Limits(4) for group in groups()}
    control: HardBudget | LagrangianBudget
    if made.budget == "hard":
        control = HardBudget(
            model.gates,
            costs,
            costs.budget(RATIO),
            limits=limits,
            uniform=False,
            expected=expected,
            options=made,
        )
    else:
        projector = BudgetProjector(model.gates, costs, costs.budget(RATIO), limits)
        control = LagrangianBudget(model.gates, expected, sparsity, made, projector)
    return Learner(model, control, text() if tokens is None else tokens, made, state, refit=refit)


# ---- the model -----------------------------------------------------------------------------------------------------


def test_merged_and_folded_weights_compute_what_gates_and_adapters_did() -> None:
    model = gated()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*model.adapters.values(), *model.gates.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        values = model.gates.deterministic()
        with model.gates.applied(values):
            wanted, states = model(text(2))
    assert model.layers == len(states) == 2
    folded = fold_gates(model.merged(), values)
    assert program_divergence(folded, folded, text(2), None, 2) == 0
    with torch.no_grad():
        runner = GatedModel(folded.replace(groups=program().groups), groups())
        found, _ = runner(text(2))
        dense, _ = GatedModel(program(), groups())(text(2))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert float((dense - wanted).abs().max()) > 0.1


def test_student_and_teachers_share_the_weights_which_stay_as_they_were() -> None:
    for parameter in program().graph_module.parameters():
        parameter.grad = None  # other tests share the program, and may have differentiated it
    before = {name: p.clone() for name, p in program().graph_module.named_parameters()}
    shared = {p.data_ptr() for p in program().graph_module.parameters()}
    one = learner()
    own = {p.data_ptr() for n, p in one.model.gates.graph_module.named_parameters() if ".lora_" not in n}
    assert own == shared
    with one.model.frozen():
        assert not any(p.requires_grad for p in program().graph_module.parameters())
        assert all(p.requires_grad for p in one.model.adapters.values())
    one.run()
    for name, parameter in program().graph_module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


def test_checkpoints_of_blocks_change_no_gradient_and_keep_less() -> None:
    grads, saved = [], []
    for checkpointing in (False, True):
        model = gated(checkpointing=checkpointing)
        with torch.no_grad():
            for name, parameter in model.adapters.items():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        held: set[int] = set()

        def keep(tensor: Tensor, held: set[int] = held) -> Tensor:
            held.add(tensor.untyped_storage().data_ptr())
            return tensor

        with model.frozen(), model.gates.applied(model.gates.sample(torch.Generator().manual_seed(0))):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(text(3))[0].square().mean()
            loss.backward()
        grads.append([p.grad for p in (*model.adapters.values(), *model.gates.parameters())])
        saved.append(len(held))
    for one, other in zip(*grads, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)
    assert saved[1] < saved[0] / 2


def test_targets_of_lora_are_found_by_the_ends_of_names_and_by_patterns() -> None:
    every = lora_targets(program(), ["all"])
    assert len(every) == 14
    assert "lm_head" not in every
    assert [name.rpartition(".")[2] for name in lora_targets(program(), ["q_proj", "*.1.mlp.up_proj"])] == [
        "q_proj",
        "q_proj",
        "up_proj",
    ]
    assert len(gated(targets=["q_proj"]).adapters) == 4
    with pytest.raises(UsageError, match="'query' matches no Linear; there are down_proj, gate_proj"):
        gated(targets=["q_proj", "query"])
    with pytest.raises(UsageError, match="matches lm_head, whose weight embedding reads too"):
        lora_targets(located("llama", tie_word_embeddings=True), ["lm_head"])
    with pytest.raises(PreconditionError, match="no stack of layers"):
        GatedModel(located("llama"), groups())


# ---- the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distillation", ["plain", "none"])
def test_training_lowers_the_divergence_of_the_plan_it_ends_with(distillation: str) -> None:
    """Eight fixed sequences can be learned by heart; on them the intact model is what to come near to."""
    one = learner(text(8), steps=40, lora_lr=3e-2, distillation=distillation, layer_weight=0.1)
    start = one.control.decided(one.options.steps).values
    before = divergence(one.model, start, one.tokens, one.teachers.intact, 4)
    if distillation == "none":
        one.run()
        rows = [row["lm"] for row in one.rows]
        assert sum(rows[-5:]) < 0.8 * sum(rows[:5])
        return
    one.run()
    after = divergence(one.model, one.settled().values, one.tokens, one.teachers.intact, 4)
    assert after < 0.8 * before


def test_no_step_exceeds_its_budget_and_teachers_go_from_dense_to_sparse_and_back() -> None:
    one = learner(steps=20, gap=0.15, warm_up=0.5, settle=0.25)
    one.run()
    for row in one.rows:
        assert row["sparsity"] >= row["target"] - 1e-6
    assert one.rows[0]["sparsity"] == 0
    assert one.rows[-1]["sparsity"] >= RATIO
    taught = [row["teacher"] for row in one.rows]
    assert taught[0] == 0
    assert taught[-1] == 0
    assert 0 < max(taught) < RATIO
    assert all(row["teacher"] <= row["sparsity"] for row in one.rows)
    top = taught.index(max(taught))
    assert taught[top:] == sorted(taught[top:], reverse=True)
    # The expected size of what is drawn is the budget too, and widths are legal.
    assert isinstance(one.control, HardBudget)
    for step in (3, 7, 12):
        one.control.draw(step, one.generator)
        expected = float(one.control._expected(one.model.gates.open_units()).detach())
        assert expected == pytest.approx(one.control.schedule.at(step), abs=5e-3)
    widths = one.rows[-1]["widths"]
    assert all(
        widths[group.name] % 4 == 0 or widths[group.name] == group.units for group in groups() if group.kind == "mlp"
    )


def test_gates_stop_when_they_are_decided_and_adapters_go_on() -> None:
    one = learner(steps=10, settle=0.5, warm_up=0.2)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    step = one.optimizer.step

    def watched(*arguments: Any) -> None:
        step(*arguments)
        seen.append(
            (
                [p.detach().clone() for p in one.model.gates.parameters()],
                [p.detach().clone() for p in one.model.adapters.values()],
            )
        )

    one.optimizer.step = watched  # type: ignore[method-assign, assignment]
    one.run()
    gates = [state[0] for state in seen]
    assert all(torch.equal(a, b) for a, b in zip(gates[4], gates[9], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(gates[1], gates[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[4][1], seen[8][1], strict=True))
    assert all(set(value.unique().tolist()) <= {0, 1} for value in one.settled().values.values())
    # Decided gates need no weak teachers: adapters are held to the intact model to the end.
    taught = [row["teacher"] for row in one.rows]
    assert max(taught) > 0
    assert taught[4:] == [0.0] * 6


def test_masks_alone_learn_to_the_end() -> None:
    one = learner(lora_rank=0)
    assert one.options.learning_steps == 10
    before = [p.detach().clone() for p in one.model.gates.parameters()]
    one.run()
    assert not one.model.adapters
    assert any(not torch.equal(a, b) for a, b in zip(before, one.model.gates.parameters(), strict=True))


def test_a_lagrangian_draws_the_size_to_its_target() -> None:
    rates: dict[str, Any] = {"mask_lr": 0.3, "multiplier_lr": 0.1, "tolerance": 0.2, "lora_lr": 1e-3}
    one = learner(text(4, 6), budget="lagrangian", steps=120, warm_up=0.3, settle=0.1, distillation="none", **rates)
    with torch.no_grad():
        for parameter in one.model.gates.parameters():
            parameter.add_(3.0)
    one.run()
    assert one.rows[0]["sparsity"] < 0.05
    assert abs(one.rows[-1]["sparsity"] - RATIO) < 0.2
    assert one.rows[-1]["lambda_linear"] < 0 < one.rows[-1]["lambda_quadratic"]
    values = one.control.soft(120)
    plan = Plan.of({name: torch.nonzero(value).flatten().tolist() for name, value in values.items()})
    plan.validate(groups())
    removed = sum(group.parameters_removed(plan.kept_units(group)) for group in groups())
    assert removed >= 0.999 * RATIO * sum(group.parameters_removed(()) for group in groups())


def test_a_lagrangian_that_misses_its_target_is_an_error_with_the_checkpoint_before(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "teacher-intact.safetensors").write_bytes(b"of a run that was killed before its first one")
    state = StateDirectory(tmp_path / "state", {})
    one = learner(state=state, budget="lagrangian", tolerance=0.001, steps=6, settle=0.0)
    with pytest.raises(TrainingError, match=r"budget is not met: .* target is 0\.400"):
        one.run()
    found = state.read()
    assert found is not None
    assert found["step"] == 4
    assert state.tensors("teacher-intact.safetensors")


# ---- resuming ------------------------------------------------------------------------------------------------------


FITTED = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")


def halved(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stands for a fit: two consumers have half their weights."""
    assert all(set(value.unique().tolist()) <= {0, 1} for value in values.values())
    return {name: get_attribute(program().graph_module, name).weight / 2 for name in FITTED}


def test_behind_a_fit_the_student_has_its_weights_and_lora_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: p.clone() for name, p in program().graph_module.named_parameters()}
    one = learner(refit=halved, settle=0.3)
    kept = one.options.learning_steps
    assert kept == 7
    seen: list[tuple[int, float, bool]] = []
    step = Learner._one

    def watched(self: Learner, index: int) -> Any:
        with torch.no_grad(), self.model.gates.applied(self.model.gates.ones()):
            plain, _ = self.model(text(2))
            with self.model.as_refit():
                own, _ = self.model(text(2))
        made = {name: p.detach().clone() for name, p in self.model.adapters.items()}
        anew = all(torch.equal(made[name], value) for name, value in self.teachers.intact.adapters.items())
        seen.append((index, float((plain - own).abs().max()), anew))
        return step(self, index)

    monkeypatch.setattr(Learner, "_one", watched)
    one.run()
    assert [(index, change > 0.01) for index, change, _ in seen] == [(index, index >= kept) for index in range(10)]
    # The first step has nothing to learn: nothing is closed yet.
    assert [index for index, _, anew in seen if anew] == [0, 1, kept]
    # From its start, in a training of its own length, and held to the intact model.
    assert [row["teacher"] for row in one.rows[kept:]] == [0.0] * 3
    assert one.optimizer.state[next(iter(one.model.adapters.values()))]["step"] == 3
    assert one.optimizer.param_groups[1]["lr"] == pytest.approx(one.options.lora_lr * cosine(2, 3))
    assert not any(torch.equal(p, one.teachers.intact.adapters[n]) for n, p in one.model.adapters.items() if "_B" in n)
    # The program is the dense one still; LoRA is merged into the fitted weights.
    for name, parameter in program().graph_module.named_parameters():
        assert torch.equal(parameter, before[name]), name
    merged = one.model.merged()
    ids, values = text(2, seed=3), one.settled().values
    assert divergence(one.model, values, ids, one.teachers.intact, 2) == pytest.approx(
        program_divergence(fold_gates(merged, values), program(), ids, None, 2), rel=1e-3
    )


def test_lora_goes_on_where_nothing_was_fitted() -> None:
    one = learner(settle=0.3, refit=lambda _: {})
    one.run()
    assert not one.model.refit
    # All ten steps are behind these moments: they were not thrown away at the seventh.
    assert one.optimizer.state[next(iter(one.model.adapters.values()))]["step"] == 10


def trained(path: Path, **options: Any) -> tuple[Learner, StateDirectory]:
    state = StateDirectory(path, {"steps": 10})
    return learner(state=state, **options), state


@pytest.mark.parametrize(
    ("options", "end"),
    [({"budget": "hard"}, 6), ({"budget": "lagrangian", "tolerance": 1.0}, 6), ({"refit": halved, "settle": 0.4}, 9)],
    ids=["hard", "lagrangian", "refit"],
)
def test_a_resumed_training_ends_with_the_same_bits(
    options: dict[str, Any], end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, kept = trained(tmp_path / "whole", **options)
    whole.run()
    broken, _ = trained(tmp_path / "broken", **options)
    one = Learner._one

    def fails(self: Learner, step: int) -> Any:
        if step == end:
            raise KeyboardInterrupt
        return one(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_one", fails)
        with pytest.raises(KeyboardInterrupt):
            broken.run()
    again, _ = trained(tmp_path / "broken", **options)
    again.run()
    assert again.rows[0]["step"] == 0
    strip = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in again.rows]
    assert strip == whole.rows
    first, second = (json.loads((tmp_path / name / "state.json").read_text()) for name in ("whole", "broken"))
    assert first == second
    tensors = [StateDirectory(tmp_path / name, {"steps": 10}).tensors(first["tensors"]) for name in ("whole", "broken")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert [s.step for s in again.teachers.snapshots] == [s.step for s in whole.teachers.snapshots]
    names = {file.suffix for file in (tmp_path / "whole").iterdir()}
    assert names <= {".json", ".jsonl", ".safetensors", ""}
    # What is finished is not done again.
    done, _ = trained(tmp_path / "whole", **options)
    done.run()
    assert done.step == 10
    assert len(done.rows) == 10
    assert all(
        torch.equal(a, b) for a, b in zip(done.model.adapters.values(), whole.model.adapters.values(), strict=True)
    )
    assert kept.log.is_file()


def test_other_settings_damaged_files_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    one, state = trained(tmp_path / "state")
    one.run()
    with pytest.raises(CheckpointError, match="other settings .steps was 10, is 20.*first run"):
        StateDirectory(tmp_path / "state", {"steps": 20}).read()
    found = json.loads((tmp_path / "state" / "state.json").read_text())
    (tmp_path / "state" / found["tensors"]).write_bytes(b"no tensors")
    again, _ = trained(tmp_path / "state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        again.run()
    (tmp_path / "state" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="start anew"):
        state.read()
    state.clear()
    assert state.read() is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        StateDirectory(tmp_path / "other", {})
    StateDirectory(tmp_path / "missing", {}).clear()


def test_a_training_that_diverges_says_so_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    one, state = trained(tmp_path / "state", save_every=2)
    step = one.optimizer.step

    def poisoned(*arguments: Any) -> None:
        step(*arguments)
        if one.step == 4:
            with torch.no_grad():
                next(iter(one.model.adapters.values())).fill_(float("nan"))

    one.optimizer.step = poisoned  # type: ignore[method-assign, assignment]
    with pytest.raises(TrainingError, match=r"step 5: the loss is not finite; the last good checkpoint, of step 4"):
        one.run()
    found = state.read()
    assert found is not None
    assert all(bool(t.isfinite().all()) for t in state.tensors(found["tensors"]).values() if t.is_floating_point())
    gates = learner()
    with torch.no_grad():
        next(gates.model.gates.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"no checkpoint was made.*mask_lr"):
        gates.run()


# ---- small things --------------------------------------------------------------------------------------------------


def test_every_epoch_reads_all_sequences_in_an_order_of_its_own() -> None:
    tokens = torch.arange(12)[:, None]
    epochs = [torch.cat([batch_of(tokens, 3 * epoch + i, 4, 7) for i in range(3)]).flatten() for epoch in range(2)]
    assert all(sorted(one.tolist()) == list(range(12)) for one in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    rates = [cosine(step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.5)
    assert max(rates) > 0.98
    assert rates[-1] < 0.01


def test_what_cannot_be_trained_is_refused() -> None:
    good = L0Options(steps=10)
    for changes in (
        {"mode": "paper"},
        {"budget": "soft"},
        {"steps": 0},
        {"lora_lr": 0.0},
        {"warm_up": 1.5},
        {"lora_rank": -1},
        {"layer_weight": -1.0},
        {"lora_targets": ()},
    ):
        with pytest.raises(UsageError):
            dataclasses.replace(good, **changes)
    with pytest.raises(UsageError, match="training ends at step 7 .* before the 0.4 .* Use 8 steps or more"):
        L0Options(steps=10, warm_up=0.7, settle=0.3).schedule_to(0.4)
    with pytest.raises(UsageError, match="not both"):
        steps_of(8, 4, 10, 2.0)
    with pytest.raises(UsageError, match="less than a batch"):
        steps_of(3, 4, None, None)
    assert (steps_of(9, 4, None, 3.0), steps_of(9, 4, None, None), steps_of(9, 4, 7, None)) == (6, 2, 7)
    with pytest.raises(UsageError, match="asks? for less|already"):
        expected_sparsity(program(), groups(), Target("params", 1e12), None, None)


def test_uniform_budgets_keep_the_same_widths_everywhere() -> None:
    model = gated(rank=0, hidden=False)
    with torch.no_grad():
        for parameter in model.gates.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    costs = cost_model("ratio", program(), groups())
    limits = {group.name: Limits(2) for group in groups()}
    limits[groups()[1].name] = Limits(2, 1.0)
    free = BudgetProjector(model.gates, costs, costs.budget(0.3), limits).project()
    assert bool(free.kept[groups()[1].name].all())
    same = BudgetProjector(model.gates, costs, costs.budget(0.4), Limits(2), uniform=True)
    found = same.project()
    assert found.cost <= costs.budget(0.4)
    Plan.of({name: torch.nonzero(kept).flatten().tolist() for name, kept in found.kept.items()}).validate(groups())
    for kind in ("attention", "mlp"):
        assert len({int(found.kept[group.name].sum()) for group in groups() if group.kind == kind}) == 1
    assert same.dense > found.cost
    with pytest.raises(PlanError, match="uniform widths need"):
        BudgetProjector(model.gates, costs, costs.budget(0.4), limits, uniform=True)


def test_the_log_is_a_line_a_step_and_drops_what_was_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with TrainingLog(path, 3) as log:
        for step in range(3):
            log.add(step, {"loss": 1.0 / (step + 1), "kl": float("nan")}, {"mlp": 8} if step == 2 else None)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["loss"] == 0.5
    assert rows[1]["kl"] is None
    assert rows[2]["widths"] == {"mlp": 8}
    path.write_text(path.read_text() + '{"step": 3, "widths": {"mlp": 8}')  # killed in the middle of a line
    with TrainingLog(path, 4, resumed_at=2) as log:
        assert [row["step"] for row in log.rows] == [0, 1]
        log.add(2, {"loss": 0.0})
    assert len(path.read_text().splitlines()) == 3


def test_tensorboard_gets_the_figures_and_forgets_what_was_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer's interface is TensorBoard's; without the package nothing is written."""
    made: list[Any] = []

    class Writer:
        def __init__(self, path: str, purge_step: int | None) -> None:
            self.path, self.purge_step, self.scalars, self.closed = path, purge_step, [], False
            made.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

        def close(self) -> None:
            self.closed = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with TrainingLog(tmp_path / "log.jsonl", 2) as log:
        log.add(0, {"loss": 2.0, "kl": 0.5})
        log.add(1, {"loss": 1.0, "kl": 0.25})
    with TrainingLog(tmp_path / "log.jsonl", 3, resumed_at=1):
        pass
    first, second = made
    shown = [scalar for scalar in first.scalars if scalar[0] != "steps_per_second"]
    assert shown == [("loss", 2.0, 0), ("kl", 0.5, 0), ("loss", 1.0, 1), ("kl", 0.25, 1)]
    assert (first.path, first.purge_step, second.purge_step) == (str(tmp_path / "tensorboard"), None, 1)
    assert first.closed
    assert second.closed
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with TrainingLog(tmp_path / "log.jsonl", 2) as log:
        log.add(0, {"loss": 2.0})
    assert len(made) == 2

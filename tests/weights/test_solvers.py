"""Layer solvers against plain references, and on inputs that break naive ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fxprune.calibration.gram import Gram, gram_of
from fxprune.core.errors import CalibrationError, PlanError, PreconditionError, UsageError
from fxprune.passes.alps import AlpsPrepared, AlpsSolver, admm, interpolate_inverse
from fxprune.passes.magnitude import MagnitudeSolver
from fxprune.passes.sparsegpt import SparseGptSolver
from fxprune.passes.wanda import WandaSolver
from fxprune.weights.solvers import Damping, conjugate_gradients, inverse_factor, prepare_hessian
from fxprune.weights.sparsity import Sparsity, keep_largest

if TYPE_CHECKING:
    from torch import Tensor

    from fxprune.weights.solvers import Solved, Solver

SPARSITIES = ["0.5", "0.37", "2:4", "4:8"]
SOLVERS = [MagnitudeSolver, WandaSolver, SparseGptSolver, AlpsSolver]


def problem(
    rows: int = 48, columns: int = 64, tokens: int = 512, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns), and inputs (tokens, columns) that are correlated and of unequal size, as real ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    latent = torch.randn(tokens, columns // 4, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns // 4, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    size = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.2
    return weight.to(dtype), ((latent @ mixing + noise) * size).to(dtype)


def run(solver: Solver, weight: Tensor, inputs: Tensor, text: str) -> Solved:
    return solver.solve(weight, solver.prepare(gram_of(inputs, inputs.dtype)), Sparsity.parse(text))


def output_error(weight: Tensor, pruned: Tensor, inputs: Tensor) -> float:
    dense = inputs.double() @ weight.double().T
    return float((inputs.double() @ pruned.double().T - dense).square().sum() / dense.square().sum())


def textbook_sparsegpt(weight: Tensor, hessian: Tensor, sparsity: Sparsity, block_size: int) -> Tensor:
    """The authors' loops: all columns to the right are updated after each column."""
    weight = weight.clone()
    columns = weight.shape[1]
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, upper = weight[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.zeros_like(block)
        removed = torch.zeros_like(block, dtype=torch.bool)
        if sparsity.m is None:
            scores = block**2 / upper.diagonal() ** 2
            removed = scores <= scores.flatten().sort().values[round(scores.numel() * sparsity.share) - 1]
        for column in range(end - start):
            if sparsity.n is not None and sparsity.m is not None and column % sparsity.m == 0:
                group = slice(column, column + sparsity.m)
                scores = block[:, group] ** 2 / upper.diagonal()[group] ** 2
                worst = scores.topk(sparsity.m - sparsity.n, dim=1, largest=False).indices
                removed.scatter_(1, column + worst, value=True)
            new = torch.where(removed[:, column], 0.0, block[:, column])
            error = (block[:, column] - new) / upper[column, column]
            block[:, column:] -= error[:, None] * upper[column, column:]
            block[:, column] = new
            errors[:, column] = error
        weight[:, start:end] = block
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def textbook_admm(weight: Tensor, hessian: Tensor, sparsity: Sparsity, penalties: list[float]) -> tuple[Tensor, Tensor]:
    """ADMM with all its variables and an exact inverse in each step, on scaled weights."""
    sparse = weight * keep_largest(weight.abs(), sparsity)
    multiplier = torch.zeros_like(weight)
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    for rho in penalties:
        dense = (weight @ hessian - multiplier + rho * sparse) @ torch.linalg.inv(hessian + rho * identity)
        merged = dense + multiplier / rho
        sparse = merged * keep_largest(merged.abs(), sparsity)
        multiplier = multiplier + rho * (dense - sparse)
    return sparse, sparse != 0


@pytest.mark.parametrize("text", ["0.5", "0.25", "2:4", "1:2", "4:8"])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_sparsegpt_equals_the_textbook(text: str, block_size: int) -> None:
    sparsity = Sparsity.parse(text)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        weight, inputs = problem(columns=160, dtype=dtype)
        solver = SparseGptSolver(block_size=block_size, dtype=dtype)
        prepared = solver.prepare(gram_of(inputs, dtype))
        assert prepared.hessian is not None
        solved = solver.solve(weight, prepared, sparsity)
        expected = textbook_sparsegpt(weight.double(), prepared.hessian.double(), sparsity, block_size)
        assert torch.equal(solved.mask, expected != 0)
        torch.testing.assert_close(solved.weight.double(), expected, rtol=tolerance, atol=tolerance)


def test_magnitude_and_wanda_masks() -> None:
    weight, inputs = problem()
    magnitude = run(MagnitudeSolver(), weight, inputs, "0.5")
    kept = magnitude.mask
    assert weight[kept].abs().min() >= weight[~kept].abs().max()
    assert torch.equal(magnitude.weight, weight * kept)
    wanda = run(WandaSolver(), weight, inputs, "0.5")
    scores = weight.abs() * inputs.norm(dim=0)
    assert torch.equal(wanda.mask, scores > scores.sort(dim=1).values[:, 31:32])
    assert torch.equal(wanda.weight, weight * wanda.mask)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("text", SPARSITIES)
def test_what_is_removed_is_zero_and_counts_are_exact(solver_class: type[Solver], text: str) -> None:
    sparsity = Sparsity.parse(text)
    weight, inputs = problem(rows=37, columns=72)
    before = weight.clone()
    solved = run(solver_class(), weight, inputs, text)
    assert torch.equal(weight, before)
    assert solved.weight.dtype == weight.dtype
    assert solved.mask.dtype == torch.bool
    assert torch.equal(solved.weight != 0, solved.mask)
    if sparsity.m is not None:
        assert solved.mask.view(37, -1, sparsity.m).sum(-1).unique().tolist() == [sparsity.n]
    elif solver_class is WandaSolver:
        assert (~solved.mask).sum(1).unique().tolist() == [round(sparsity.share * 72)]
    else:
        assert int((~solved.mask).sum()) == round(sparsity.share * 37 * 72)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_outputs(solver_class: type[Solver], dtype: torch.dtype) -> None:
    weight, inputs = problem()
    weight = weight.to(dtype)
    solved = run(solver_class(), weight, inputs, "0.5")
    assert solved.weight.dtype == dtype
    assert solved.error == pytest.approx(output_error(weight, solved.weight, inputs), rel=1e-4)


@pytest.mark.parametrize("text", SPARSITIES)
@pytest.mark.parametrize("seed", range(3))
def test_stronger_methods_have_less_error(text: str, seed: int) -> None:
    weight, inputs = problem(seed=seed)
    errors = [run(solver(), weight, inputs, text).error for solver in (AlpsSolver, SparseGptSolver, WandaSolver)]
    assert errors[0] < 0.9 * errors[1] < 0.9 * errors[2]


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_admm_equals_the_textbook(text: str) -> None:
    weight, inputs = problem(dtype=torch.float64)
    sparsity = Sparsity.parse(text)
    solver = AlpsSolver(refine_steps=15, dtype=torch.float64)
    prepared = solver.prepare(gram_of(inputs, torch.float64))
    assert prepared.hessian is not None
    assert prepared.scale is not None
    scaled = weight * prepared.scale
    expected, mask = textbook_admm(scaled, prepared.hessian, sparsity, solver.penalties)
    identity = torch.eye(64, dtype=torch.float64)
    inverses = [torch.linalg.inv(prepared.hessian + rho * identity) for rho in solver.penalties]
    schedule = zip(solver.penalties, identity[: solver.steps, : solver.steps].tolist(), strict=True)
    found, kept = admm(scaled, inverses, schedule, sparsity)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(found, expected)
    # With interpolated inverses the mask is much the same, and so is the error on it.
    solved = solver.solve(weight, prepared, sparsity)
    assert (solved.mask == mask).double().mean() > 0.95
    best = conjugate_gradients(expected, scaled @ prepared.hessian, prepared.hessian, mask, 15) / prepared.scale
    assert solved.error == pytest.approx(output_error(weight, best, inputs), rel=0.02)


def test_alps_scales_the_inverse_to_a_diagonal_of_ones() -> None:
    _, inputs = problem(dtype=torch.float64)
    prepared = AlpsSolver(dtype=torch.float64).prepare(gram_of(inputs, torch.float64))
    assert prepared.hessian is not None
    diagonal = torch.linalg.inv(prepared.hessian).diagonal()
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal))


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_alps_is_optimal_on_its_mask(text: str) -> None:
    weight, inputs = problem(rows=6, columns=16, dtype=torch.float64)
    solver = AlpsSolver(refine_steps=40, dtype=torch.float64)
    solved = run(solver, weight, inputs, text)
    hessian = prepare_hessian(gram_of(inputs, torch.float64), solver.damping, torch.float64, "test").hessian
    assert hessian is not None
    gradient = (solved.weight - weight) @ hessian
    assert gradient[solved.mask].abs().max() < 1e-9
    assert gradient[~solved.mask].abs().max() > 1e-2
    for row, kept in enumerate(solved.mask):
        exact = torch.linalg.solve(hessian[kept][:, kept], (weight[row] @ hessian)[kept])
        torch.testing.assert_close(solved.weight[row, kept], exact)


def test_conjugate_gradients_never_raise_the_error() -> None:
    weight, inputs = problem(dtype=torch.float64)
    gram = gram_of(inputs, torch.float64)
    mask = keep_largest(weight.abs(), Sparsity(0.5))
    errors = []
    for steps in range(6):
        solution = conjugate_gradients(weight * mask, weight @ gram.matrix, gram.matrix, mask, steps)
        assert not solution[~mask].any()
        errors.append(gram.energy(weight - solution))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("rho", [(0.7, 2.0), (0.1, 10.0), (1.0, 1.0), (3e-3, 3.0)])
def test_inverses_are_interpolated_to_ten_percent(rho: tuple[float, float]) -> None:
    solver = AlpsSolver(rho=rho, steps=7)
    assert solver.penalties[0] == pytest.approx(rho[0])
    assert solver.penalties[-1] == pytest.approx(rho[1])
    x = torch.logspace(-8, 8, 500, dtype=torch.float64)
    for penalty, coefficients in zip(solver.penalties, solver.coefficients, strict=True):
        found = sum(c / (x + anchor) for anchor, c in zip(solver.anchors, coefficients, strict=True))
        assert ((found * (x + penalty)) - 1).abs().max() < 0.1
    with pytest.raises(UsageError, match="closer together"):
        interpolate_inverse([1e-9, 1e9])


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_a_weight_that_is_sparse_enough_stays(solver_class: type[Solver], text: str) -> None:
    weight, inputs = problem()
    weight = torch.where(weight.abs() < 0.1, 0.1, weight)
    weight[:, 1::2] = 0
    solved = run(solver_class(), weight, inputs, text)
    torch.testing.assert_close(solved.weight, weight, atol=1e-4, rtol=1e-4)
    assert solved.error < 1e-8


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_no_sparsity_changes_nothing(solver_class: type[Solver]) -> None:
    weight, inputs = problem()
    solved = run(solver_class(), weight, inputs, "0")
    assert bool(solved.mask.all())
    torch.testing.assert_close(solved.weight, weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver_class", [SparseGptSolver, AlpsSolver])
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_dead_inputs(solver_class: type[Solver], text: str) -> None:
    weight, inputs = problem()
    inputs[:, [3, 17, 18, 19]] = 0
    solved = run(solver_class(), weight, inputs, text)
    assert solved.notes["dead_inputs"] == 4
    assert not solved.weight[:, [3, 17, 18, 19]].any()
    assert solved.error == pytest.approx(output_error(weight, solved.weight, inputs), rel=1e-4)
    # What the dead inputs' weights are must not matter.
    other = weight.clone()
    other[:, [3, 17]] = 100.0
    assert torch.equal(run(solver_class(), other, inputs, text).weight, solved.weight)


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_all_inputs_dead(solver_class: type[Solver]) -> None:
    weight, inputs = problem()
    solved = run(solver_class(), weight, torch.zeros_like(inputs), "2:4")
    assert solved.error == 0
    assert bool(torch.isfinite(solved.weight).all())


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_rows_of_zeros(solver_class: type[Solver], text: str) -> None:
    weight, inputs = problem()
    weight[[0, 5]] = 0
    solved = run(solver_class(), weight, inputs, text)
    assert not solved.weight[[0, 5]].any()
    assert bool(torch.isfinite(solved.weight).all())
    empty = run(solver_class(), torch.zeros_like(weight), inputs, text)
    assert empty.error == 0
    assert not empty.weight.any()


@pytest.mark.parametrize("solver_class", [SparseGptSolver, AlpsSolver])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_tokens_than_inputs(solver_class: type[SparseGptSolver | AlpsSolver], dtype: torch.dtype) -> None:
    weight, inputs = problem(tokens=20)
    solved = run(solver_class(dtype=dtype), weight, inputs, "0.5")
    assert solved.notes["rank_at_most"] == 20
    assert bool(torch.isfinite(solved.weight).all())
    assert solved.error < run(WandaSolver(), weight, inputs, "0.5").error


def test_damping_escalates_until_there_is_a_factor() -> None:
    ones = Gram(torch.ones(8, 8), 1)
    prepared = prepare_hessian(ones, Damping(0.0), torch.float32, "test")
    assert prepared.notes["damping_escalations"] > 0
    assert 0 < prepared.notes["damping"] <= 1e-3
    assert prepared.factor is not None
    assert prepared.hessian is not None
    assert float(prepared.hessian[0, 0]) == pytest.approx(1 + prepared.notes["damping"])
    indefinite = torch.ones(8, 8)
    indefinite[0, 1] = indefinite[1, 0] = 5.0
    with pytest.raises(CalibrationError, match=r"no Cholesky factor.*more calibration samples"):
        prepare_hessian(Gram(indefinite, 1), Damping(0.01), torch.float32, "test")
    assert "damping_escalations" not in prepare_hessian(ones, Damping(0.01), torch.float32, "test").notes


def test_damping_rules() -> None:
    gram = Gram(torch.diag(torch.tensor([0.0, 1.0, 2.0, 9.0])) * 10, 10)
    expected = {"mean": [1, 1.4, 2.4, 9.4], "median": [1, 1.2, 2.2, 9.2], "channel": [1, 1.1, 2.2, 9.9]}
    for rule, diagonal in expected.items():
        hessian = prepare_hessian(gram, Damping(0.1, rule), torch.float64, "test").hessian
        assert hessian is not None
        torch.testing.assert_close(hessian.diagonal(), torch.tensor(diagonal, dtype=torch.float64))
    with pytest.raises(UsageError):
        Damping(0.1, "mode")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        Damping(2.0)


@pytest.mark.parametrize("size", [1, 5, 128, 300])
def test_inverse_factor(size: int) -> None:
    _, inputs = problem(columns=max(size, 4), tokens=2 * size + 8, dtype=torch.float64)
    hessian = (inputs.T @ inputs)[:size, :size]
    factor = inverse_factor(hessian)
    assert factor is not None
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(size, dtype=torch.float64))
    assert inverse_factor(-hessian) is None


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(solver_class: type[Solver], bad: float) -> None:
    weight, inputs = problem()
    broken = weight.clone()
    broken[3, 4] = bad
    with pytest.raises(PreconditionError, match="NaN or infinity"):
        run(solver_class(), broken, inputs, "0.5")
    matrix = inputs.T @ inputs
    matrix[3, 4] = bad
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        solver_class().prepare(Gram(matrix, 512))


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_what_does_not_fit_is_refused(solver_class: type[Solver]) -> None:
    weight, inputs = problem()
    solver = solver_class()
    prepared = solver.prepare(gram_of(inputs))
    with pytest.raises(PreconditionError, match="cannot read 64 inputs"):
        solver.solve(weight[:, :32], prepared, Sparsity(0.5))
    with pytest.raises(PreconditionError, match="one at a time"):
        solver.solve(weight[None], prepared, Sparsity(0.5))
    with pytest.raises(PlanError, match="groups of 6"):
        solver.solve(weight, prepared, Sparsity.pattern(3, 6))


def test_data_is_needed_or_not() -> None:
    weight, _ = problem()
    for solver in (WandaSolver(), SparseGptSolver(), AlpsSolver()):
        with pytest.raises(CalibrationError, match=f"{solver.name} needs"):
            solver.prepare(None)
    magnitude = MagnitudeSolver()
    solved = magnitude.solve(weight, magnitude.prepare(None), Sparsity(0.5))
    assert solved.error == pytest.approx(float(weight[~solved.mask].square().sum() / weight.square().sum()))


def test_options_are_checked() -> None:
    with pytest.raises(UsageError):
        SparseGptSolver(block_size=0)
    for options in ({"steps": 0}, {"refine_steps": -1}, {"rho": (2.0, 1.0)}, {"rho": (0.0, 1.0)}):
        with pytest.raises(UsageError):
            AlpsSolver(**options)  # type: ignore[arg-type]


def test_alps_refuses_what_another_solver_prepared() -> None:
    weight, inputs = problem()
    with pytest.raises(PreconditionError, match="another solver"):
        AlpsSolver().solve(weight, SparseGptSolver().prepare(gram_of(inputs)), Sparsity(0.5))
    assert isinstance(AlpsSolver().prepare(gram_of(inputs)), AlpsPrepared)


@pytest.mark.parametrize("solver_class", [SparseGptSolver, AlpsSolver])
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_low_precision_weights(solver_class: type[Solver], text: str) -> None:
    weight, inputs = problem()
    rounded = weight.bfloat16()
    full, low = run(solver_class(), rounded.float(), inputs, text), run(solver_class(), rounded, inputs, text)
    assert torch.equal(full.mask, low.mask)
    assert torch.equal(full.weight.bfloat16(), low.weight)
    assert low.error == pytest.approx(full.error, rel=0.01)


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_the_same_again(solver_class: type[Solver]) -> None:
    weight, inputs = problem()
    first, second = (run(solver_class(), weight, inputs, "2:4") for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.error == second.error


def test_units_of_the_inputs_do_not_matter() -> None:
    weight, inputs = problem()
    for solver in (SparseGptSolver(), AlpsSolver()):
        plain, scaled = run(solver, weight, inputs, "0.5"), run(solver, weight, inputs * 2**10, "0.5")
        assert torch.equal(plain.mask, scaled.mask)
        torch.testing.assert_close(plain.weight, scaled.weight)


def test_gram() -> None:
    weight, inputs = problem()
    gram = gram_of(inputs.view(4, 128, 64), torch.float64)
    assert (gram.tokens, gram.features) == (512, 64)
    assert gram.energy(weight.double()) == pytest.approx(float((inputs.double() @ weight.double().T).square().sum()))
    with pytest.raises(CalibrationError, match="square"):
        Gram(inputs, 512)
    with pytest.raises(CalibrationError, match="no tokens"):
        Gram(gram.matrix, 0)
    with pytest.raises(CalibrationError, match="negative diagonal"):
        Gram(-gram.matrix, 512).require_finite()

"""A sample's answer depends on that sample alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deqzoo.equilibrium import Rows, Segments, Solution, Status, fixed_point, make_solver

from .cases import PerRow, mixed_batch

SOLVERS = [
    {"name": "fixed_point"},
    {"name": "fixed_point", "damping": 0.7},
    {"name": "anderson"},
    {"name": "anderson", "damping": 0.7, "patience": 8},
    {"name": "broyden"},
    {"name": "broyden", "damping": 0.7, "memory": 5, "patience": 8},
]
IDS = ["plain", "plain damped", "anderson", "anderson damped", "broyden", "broyden damped"]
SPECIAL = {20: "diverging", 30: "nan", 40: "inf"}

pytestmark = pytest.mark.parametrize("settings", SOLVERS, ids=IDS)


def solve(f: PerRow, settings: dict, compact: bool = False, **more: float) -> Solution:
    solver = make_solver({"max_steps": 60, "tol": 1e-4, **settings, **more})
    z0 = torch.zeros(f.x.shape, dtype=f.x.dtype)
    return solver.solve(f, z0, Rows(), compact=compact)


def same(a: Solution, i: int, b: Solution, j: int) -> None:
    assert a.status[i] == b.status[j], i
    assert a.n_steps[i] == b.n_steps[j], i
    if a.converged[i]:
        torch.testing.assert_close(a.state[i], b.state[j], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_alone_as_in_the_batch(settings: dict, compact: bool) -> None:
    f = mixed_batch(torch.float64)
    together = solve(f, settings, compact)
    for i in range(64):
        same(together, i, solve(f.row(i), settings), 0)
    ordinary = [i for i in range(45) if i not in SPECIAL]
    assert together.converged[ordinary].all()
    assert len(set(together.n_steps.tolist())) > 5  # the batch is heterogeneous indeed


@pytest.mark.parametrize("compact", [False, True])
def test_among_easy_ones_and_beside_a_diverging_one(settings: dict, compact: bool) -> None:
    f = mixed_batch()
    hard, easy = f.row(44), f.row(3)
    alone = solve(hard, settings)
    assert alone.converged.all() and alone.n_steps[0] > solve(easy, settings).n_steps[0]

    def batch(rows: list[PerRow]) -> PerRow:
        return PerRow(f.weight, torch.cat([r.s for r in rows]), torch.cat([r.x for r in rows]))

    same(solve(batch([hard] + [easy] * 63), settings, compact), 0, alone, 0)
    same(solve(batch([f.row(20), hard]), settings, compact), 1, alone, 0)
    same(solve(batch([f.row(30), hard, f.row(40)]), settings, compact), 1, alone, 0)


@pytest.mark.parametrize("compact", [False, True])
def test_failing_rows_are_reported_and_finite(settings: dict, compact: bool) -> None:
    solution = solve(mixed_batch(), settings, compact)
    for i in (30, 40):
        assert solution.status[i] == Status.NONFINITE
        assert torch.equal(solution.state[i], torch.zeros(24))  # the last finite state: the start
        assert solution.residual[i] == math.inf
    assert not solution.converged[20] and torch.isfinite(solution.state[20]).all()
    assert torch.isfinite(solution.state).all()


def test_overflow_on_the_way_keeps_the_finite_best(settings: dict) -> None:
    """Row 0 grows without bound, overflows, is tried once more and then stops."""
    cycle = torch.eye(24).roll(1, 0) * torch.linspace(0.5, 2, 24)
    f = PerRow(cycle, torch.tensor([1e4, 0.3]), torch.ones(2, 24))
    kept: list[tuple[int, float]] = []
    solver = make_solver({"max_steps": 60, "tol": 1e-4, **settings, "patience": None})
    solution = solver.solve(
        f, torch.zeros(2, 24), callback=lambda k, z, r: kept.append((k, r[0].item()))
    )
    assert torch.isfinite(solution.state).all()
    assert solution.converged.tolist()[1]
    before = [r for k, r in kept if k <= solution.n_steps[0]]
    assert solution.residual[0].item() == pytest.approx(min(before))
    if settings["name"] == "fixed_point":
        assert solution.status[0] == Status.NONFINITE
        assert sum(r == math.inf for r in before) == 2


def test_compaction_saves_rows_and_changes_nothing(settings: dict) -> None:
    f = mixed_batch()
    full, compact = solve(f, settings), solve(f, settings, compact=True)
    assert full.row_evals == 64 * full.n_evals
    assert compact.row_evals < 0.8 * full.row_evals
    assert torch.equal(full.status, compact.status)
    assert torch.equal(full.n_steps, compact.n_steps)
    settled = full.converged
    torch.testing.assert_close(full.state[settled], compact.state[settled], rtol=1e-5, atol=1e-5)


def test_compaction_through_inputs_of_a_plain_function(settings: dict) -> None:
    f = mixed_batch()

    def g(h: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return PerRow(f.weight, s, x)(h)

    settings = {"max_steps": 60, "tol": 1e-4, **settings}
    with torch.no_grad():
        full = fixed_point(g, torch.zeros(64, 24), f.s, f.x, solver=settings)
        left = fixed_point(g, torch.zeros(64, 24), f.s, f.x, solver=settings, compact=True)
    assert full.row_evals == 64 * full.n_evals > left.row_evals
    assert torch.equal(full.n_steps, left.n_steps)


def test_segments_are_independent(settings: dict) -> None:
    """Graphs in one batch: each gets its own answer, in any order of the rows."""
    f = mixed_batch(torch.float64)
    rows = torch.tensor([1, 1, 44, 10, 10, 30, 5])
    index = torch.tensor([0, 0, 2, 1, 1, 4, 2])  # cell 3 is empty, cell 4 fails

    def pick(which: Tensor) -> PerRow:
        return PerRow(f.weight, f.s[which], f.x[which])

    solver = make_solver({"max_steps": 80, "tol": 1e-4, **settings})
    solution = solver.solve(
        pick(rows), torch.zeros(7, 24, dtype=torch.float64), Segments(index, 5), compact=True
    )
    assert solution.n_steps.shape == (5,)
    assert solution.converged.tolist() == [True, True, True, True, False]
    for cell in (0, 1, 2):
        mine = index == cell
        zero = torch.zeros(int(mine.sum()), 24, dtype=torch.float64)
        alone = solver.solve(pick(rows[mine]), zero, Segments(index[mine] * 0, 1))
        assert alone.n_steps[0] == solution.n_steps[cell]
        torch.testing.assert_close(solution.state[mine], alone.state, rtol=1e-8, atol=1e-8)
        assert alone.rel_residual[0].item() == pytest.approx(
            solution.rel_residual[cell].item(), rel=1e-4
        )

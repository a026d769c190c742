"""Solvers against worked numbers, and the field's known failures."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deqzoo.equilibrium import (
    Anderson,
    Broyden,
    Equilibrium,
    FixedPointIteration,
    Solver,
    Status,
    fixed_point,
    make_gradient,
    make_solver,
)

from .cases import F64, H_STAR, A, affine, convolution, dense

NAMES = ["fixed_point", "anderson", "broyden"]
ZERO = torch.zeros(1, 3, dtype=F64)


def iterates(solver: Solver, f: Callable[[Tensor], Tensor] = affine) -> list[Tensor]:
    """States after 1, 2, … updates from zero."""
    seen: list[Tensor] = []
    solver.solve(f, ZERO, callback=lambda k, z, residual: seen.append(z[0].clone()))
    return seen


def norm(h: Tensor) -> float:
    return (affine(h) - h).norm().item()


def close(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), atol=1e-9, rtol=0)


def test_plain_iteration_has_the_worked_residuals() -> None:
    solution = FixedPointIteration(max_steps=19, tol=0).solve(affine, ZERO, trace=True)
    expected = {3: 0.089236138570, 10: 5.497259883766e-4, 20: 8.035840491e-7}
    for evaluation, value in expected.items():
        assert solution.trace[0, evaluation - 2].item() == pytest.approx(value, rel=1e-8)


def test_damped_iteration_reports_the_residual_of_the_map() -> None:
    seen = iterates(FixedPointIteration(max_steps=19, tol=0, damping=0.5))
    expected = {2: 1.626929623555, 10: 0.068331238432, 20: 1.364767073755e-3}
    for evaluation, value in expected.items():
        assert norm(seen[evaluation - 2]) == pytest.approx(value, rel=1e-9)


def test_tolerance_is_not_loosened_by_damping() -> None:
    solver = FixedPointIteration(max_steps=500, tol=1e-4, damping=0.1, stop_mode="abs")
    solution = solver.solve(affine, ZERO)
    assert solution.converged.all() and norm(solution.state[0]) <= 1e-4
    assert solution.abs_residual.item() == pytest.approx(norm(solution.state[0]), rel=1e-12)


def test_anderson_has_the_worked_iterates() -> None:
    seen = iterates(Anderson(max_steps=10, tol=0, window=2, ridge=0))
    close(seen[1], -0.0823557925, 2.5206010664, 2.7029568589)
    close(seen[2], -0.1704460967, 2.4081456374, 2.7670894380)
    assert norm(seen[1]) == pytest.approx(0.1611105, abs=1e-7)
    assert norm(seen[2]) == pytest.approx(0.08436341, abs=1e-8)
    assert norm(seen[6]) == pytest.approx(2.884179e-3, abs=1e-9)


def test_anderson_with_a_full_window_ends_an_affine_problem() -> None:
    seen = iterates(Anderson(max_steps=4, tol=0, window=5, ridge=0))
    close(seen[2], -0.2257138966, 2.3257275162, 2.7975257638)
    assert norm(seen[3]) < 1e-13


def test_damped_anderson_has_the_worked_iterates() -> None:
    seen = iterates(Anderson(max_steps=6, tol=0, window=2, ridge=0, damping=0.5))
    close(seen[1], 0.0348036840, 2.5519873970, 2.6431652933)
    close(seen[3], -0.2240417917, 2.3439872532, 2.7936937826)


def test_anderson_with_window_one_is_the_plain_iteration() -> None:
    for damping in (1, 0.5):
        plain = iterates(FixedPointIteration(max_steps=5, tol=0, damping=damping))
        mixed = iterates(Anderson(max_steps=5, tol=0, damping=damping, window=1))
        assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_broyden_has_the_worked_iterates() -> None:
    seen = iterates(Broyden(max_steps=6, tol=0))
    close(seen[1], -0.0846889952, 2.5311004785, 2.7157894737)
    close(seen[2], -0.1723723895, 2.4053126956, 2.7681830080)
    close(seen[4], -0.1713234985, 2.2778732087, 2.8059651716)
    torch.testing.assert_close(seen[5], H_STAR, atol=1e-12, rtol=0)


def test_damped_broyden_follows_the_textbook_update() -> None:
    """Against the inverse Jacobian kept as a matrix."""
    damping, z = 0.7, torch.zeros(3, dtype=F64)
    inverse, expected = -torch.eye(3, dtype=F64), []
    r = affine(z) - z
    for _ in range(6):
        s = -damping * inverse @ r
        z = z + s
        change, r = affine(z) - z - r, affine(z) - z
        v = inverse.T @ s
        inverse = inverse + torch.outer((s - inverse @ change) / (v @ change), v)
        expected.append(z)
    seen = iterates(Broyden(max_steps=6, tol=0, damping=damping))
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=1e-10, rtol=0)


@pytest.mark.parametrize("memory", range(3, 41))
def test_broyden_never_ends_in_nan_with_a_bounded_history(memory: int) -> None:
    f = dense("A2", n=4, size=128)
    solution = Broyden(max_steps=200, tol=1e-6, memory=memory).solve(f, torch.zeros(4, 128))
    assert torch.isfinite(solution.state).all() and solution.converged.all()


@pytest.mark.parametrize(("kind", "limit"), [("A1", 24), ("A2", 34), ("A4", 70), ("B", 44)])
def test_accelerated_solvers_are_not_slower_than_plain_iteration(kind: str, limit: int) -> None:
    f = convolution() if kind == "B" else dense(kind)
    z0 = torch.zeros(4, 32, 12, 12) if kind == "B" else torch.zeros(64, 512)
    evals = {}
    for name in NAMES:
        solver = make_solver({"name": name, "max_steps": 120, "tol": 1e-6})
        solution = solver.solve(f, z0)
        assert solution.converged.all(), name
        evals[name] = solution.n_evals
    assert evals["anderson"] <= min(limit, evals["fixed_point"])
    assert evals["broyden"] <= evals["fixed_point"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_steps", [1, 2])
def test_the_start_is_never_returned(name: str, max_steps: int) -> None:
    start = H_STAR.unsqueeze(0) + 1e-3  # a far better point than those that a bad map leads to

    def away(h: Tensor) -> Tensor:
        return 3 * (h - H_STAR) + H_STAR

    solution = make_solver({"name": name, "max_steps": max_steps, "tol": 0}).solve(away, start)
    assert not torch.equal(solution.state, start)
    assert solution.n_evals == max_steps + 1 and solution.n_steps.tolist() == [max_steps]


@pytest.mark.parametrize("name", NAMES)
def test_the_best_iterate_comes_back_with_its_own_residual(name: str) -> None:
    def away(h: Tensor) -> Tensor:
        return 1.5 * torch.tanh(h @ (3 * A.T)) + 1

    solver = make_solver({"name": name, "max_steps": 25, "tol": 0})
    solution = solver.solve(away, ZERO, trace=True)
    h = solution.state[0]
    r, fh = away(h) - h, away(h)
    assert solution.residual.item() == pytest.approx(solution.trace.min().item())
    assert solution.abs_residual.item() == pytest.approx(r.norm().item(), rel=1e-9)
    assert solution.rel_residual.item() == pytest.approx((r.norm() / fh.norm()).item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_counts_and_stopping(name: str, stop_mode: str) -> None:
    calls = []

    def f(h: Tensor) -> Tensor:
        calls.append(h.shape[0])
        return affine(h)

    solver = make_solver({"name": name, "max_steps": 60, "tol": 1e-5, "stop_mode": stop_mode})
    solution = solver.solve(f, ZERO.expand(4, 3))
    assert solution.converged.all() and (solution.residual <= 1e-5).all()
    assert solution.n_evals == len(calls) and solution.row_evals == sum(calls)
    assert solution.n_evals == solution.n_evals_per_sample.max()
    chosen = solution.abs_residual if stop_mode == "abs" else solution.rel_residual
    assert torch.equal(solution.residual, chosen)


@pytest.mark.parametrize("name", NAMES)
def test_an_exact_start_converges_after_one_update(name: str) -> None:
    solution = make_solver(name).solve(lambda h: h * 0 + H_STAR, H_STAR.repeat(2, 1))
    assert solution.converged.all() and solution.n_steps.tolist() == [1, 1]
    assert torch.equal(solution.state, H_STAR.repeat(2, 1))


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_how_often_flags_are_read(name: str) -> None:
    f = dense("A1", n=8, size=64)
    results = [
        make_solver({"name": name, "max_steps": 50, "tol": 1e-5, "check_every": every}).solve(
            f, torch.zeros(8, 64), compact=True
        )
        for every in (1, 3, 7)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.state, results[0].state, rtol=1e-5, atol=1e-6)
        assert torch.equal(other.n_steps, results[0].n_steps)
        assert torch.equal(other.status, results[0].status)
        torch.testing.assert_close(other.residual, results[0].residual, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_solve_ends_at_the_next_look(name: str, every: int) -> None:
    settings = {"name": name, "tol": 1e-5, "check_every": every}
    solution = make_solver({**settings, "max_steps": 50}).solve(affine, ZERO)
    stopped = solution.n_steps.item()
    assert solution.converged.all() and norm(solution.state[0]) < 1e-4
    assert solution.n_evals == math.ceil(stopped / every) * every + 1
    # The budget is a bound between looks too.
    short = make_solver({**settings, "max_steps": stopped}).solve(affine, ZERO)
    assert short.converged.all() and short.n_evals == stopped + 1


@pytest.mark.parametrize(("every", "lost"), [(1, []), (3, [5, 6]), (4, []), (7, [5, 6, 7])])
def test_a_broken_cell_goes_back_at_the_next_look(every: int, lost: list[int]) -> None:
    seen: list[bool] = []

    def f(h: Tensor) -> Tensor:
        seen.append(bool(h.isfinite().all()))
        return affine(h) * (math.nan if len(seen) == 5 else 1.0)  # at evaluation 4

    FixedPointIteration(max_steps=12, tol=0, check_every=every).solve(f, ZERO)
    assert len(seen) == 13 and [k for k, finite in enumerate(seen) if not finite] == lost


def test_patience_falls_back_to_plain_steps_and_then_stops() -> None:
    def cycle(h: Tensor) -> Tensor:
        return torch.where(h > 0, h - 2.0, h + 3.0)

    start = torch.ones(1, 1, dtype=F64)
    solution = Anderson(max_steps=90, tol=0, patience=4).solve(cycle, start)
    assert solution.status.tolist() == [Status.STALLED] and solution.n_steps.item() < 90
    endless = Anderson(max_steps=90, tol=0).solve(cycle, start)
    assert endless.status.tolist() == [Status.MAX_STEPS]


@pytest.mark.parametrize("name", NAMES)
def test_patience_does_not_hurt_where_residuals_fall(name: str) -> None:
    f = dense("A1", n=4, size=64)
    settings = {"name": name, "max_steps": 50, "tol": 1e-5}
    with_it = make_solver({**settings, "patience": 10}).solve(f, torch.zeros(4, 64))
    without = make_solver(settings).solve(f, torch.zeros(4, 64))
    assert torch.equal(with_it.state, without.state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    def f(h: Tensor) -> Tensor:
        return affine(h.to(F64)).to(dtype)

    solution = make_solver({"name": name, "tol": 2e-2}).solve(f, torch.zeros(2, 3, dtype=dtype))
    assert solution.state.dtype == dtype and solution.converged.all()
    assert solution.residual.dtype == torch.float32
    torch.testing.assert_close(solution.state[0].to(F64), H_STAR, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_the_dtype_of_the_state(name: str) -> None:
    f = dense("A1", n=4, size=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = make_solver({"name": name, "tol": 2e-2}).solve(f, torch.zeros(4, 64))
    assert solution.state.dtype == torch.float32 and solution.converged.all()
    exact = make_solver({"name": name, "tol": 1e-6, "max_steps": 90}).solve(f, torch.zeros(4, 64))
    assert (solution.state - exact.state).norm() < 0.1 * exact.state.norm()


@pytest.mark.parametrize("kind", ["solver", "gradient"])
def test_unknown_names_and_options_are_refused_with_the_valid_ones(kind: str) -> None:
    make = make_solver if kind == "solver" else make_gradient
    name, option = ("anderson", "window") if kind == "solver" else ("upg", "damping")
    with pytest.raises(ValueError, match=f"unknown {kind} 'nothing'.*{name}"):
        make("nothing")
    with pytest.raises(ValueError, match=f"no option 'depth'.*{option}"):
        make({"name": name, "depth": 3})
    with pytest.raises(TypeError):
        make(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no option 'depth'"):
        fixed_point(affine, ZERO, **{kind: {"name": name, "depth": 3}})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 0},
        {"max_steps": 2.5},
        {"max_steps": True},
        {"tol": -1.0},
        {"tol": math.nan},
        {"tol": True},
        {"damping": True},
        {"ridge": math.inf},
        {"stop_mode": "relative"},
        {"damping": 0},
        {"damping": 1.1},
        {"check_every": 0},
        {"patience": 0},
        {"window": 0},
        {"ridge": -1e-3},
    ],
)
def test_values_out_of_range_are_refused(settings: dict) -> None:
    (field,) = settings
    with pytest.raises(ValueError, match=f"anderson: {field} must be"):
        make_solver({"name": "anderson", **settings})


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_json_and_callers_dicts_are_left_alone(name: str) -> None:
    settings = {"name": name, "max_steps": 7, "tol": 1e-2, "damping": 1}
    before = dict(settings)
    solver = make_solver(settings)
    assert settings == before and make_solver(solver.to_dict()) == solver
    assert iterates(solver)  # an integer damping works too


@pytest.mark.parametrize("name", NAMES)
def test_equilibrium_modules_can_be_pickled(name: str) -> None:
    layer = Equilibrium(torch.nn.Linear(3, 3).double(), solver=name, gradient="npg")
    with torch.no_grad():
        layer.f.weight.mul_(0.3)
    again = pickle.loads(pickle.dumps(layer))
    found, expected = again(ZERO), layer(ZERO)
    assert torch.equal(found.state, expected.state)
    assert again.solver == layer.solver and again.gradient == layer.gradient
    assert name in repr(layer).lower() or "FixedPoint" in repr(layer)


@pytest.mark.parametrize("name", NAMES)
def test_callback_sees_every_iterate(name: str) -> None:
    seen: list[tuple[int, float]] = []

    def note(k: int, z: Tensor, residual: Tensor) -> None:
        seen.append((k, residual.item()))

    solver = make_solver({"name": name, "max_steps": 5, "tol": 0})
    solution = solver.solve(affine, ZERO, trace=True, callback=note)
    assert [k for k, _ in seen] == [1, 2, 3, 4, 5]
    assert solution.trace.shape == (1, 5)
    assert [value for _, value in seen] == solution.trace[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_start_and_the_maps_outputs_are_not_written_to(name: str) -> None:
    outputs: list[tuple[Tensor, Tensor]] = []

    def f(h: Tensor) -> Tensor:
        out = affine(h)
        outputs.append((out, out.clone()))
        return out

    start = torch.ones(2, 3, dtype=F64)
    solution = make_solver({"name": name, "max_steps": 15, "tol": 1e-4}).solve(f, start)
    assert torch.equal(start, torch.ones(2, 3, dtype=F64))
    assert all(torch.equal(out, copy) for out, copy in outputs)
    assert all(solution.state.data_ptr() != out.data_ptr() for out, _ in outputs)

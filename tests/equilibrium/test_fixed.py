"""Solves with a fixed number of steps: what `fixed_point` gives, traced as one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deqzoo.equilibrium import (
    Causal,
    Equilibrium,
    fixed_point,
    jacobian_penalty,
    make_gradient,
    make_solver,
)
from deqzoo.equilibrium.fixed import (
    difference_penalty,
    fixed_point_of_steps,
    fixed_steps,
    mixing_weights,
)

GRADIENTS = ({"name": "upg", "steps": 3, "damping": 0.7}, {"name": "npg", "steps": 3}, "jfb")


def problem(dtype: torch.dtype = torch.float64):
    """A contraction on states of two tensors, with a weight that is trained."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 20, generator=generator, dtype=dtype)
    weight = (0.6 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    shift = torch.randn(7, 20, generator=generator, dtype=dtype)

    def f(state):
        z = torch.tanh(torch.cat([state[0], state[1].flatten(1)], 1) @ weight.T + shift)
        return z[:, :8], z[:, 8:].reshape(-1, 3, 4)

    start = torch.zeros(7, 8, dtype=dtype), torch.zeros(7, 3, 4, dtype=dtype)
    return f, start, weight


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_steps_are_those_of_anderson(steps: int, window: int, damping: float) -> None:
    f, start, _ = problem()
    settings = {"max_steps": steps, "tol": 0.0, "window": window, "damping": damping}
    with torch.no_grad():
        found = fixed_point(f, start, solver={"name": "anderson", **settings})
        mine = fixed_steps(f, start, steps, window=window, damping=damping)
    for a, b in zip(mine, found.state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("name", ["anderson", "fixed_point"])
def test_state_residual_and_gradient_are_those_of_fixed_point(name: str, gradient) -> None:
    f, start, weight = problem()
    solver = make_solver({"name": name, "max_steps": 6, "tol": 0.0})
    found = []
    for solve in (fixed_point, fixed_point_of_steps):
        solution = solve(f, start, solver=solver, gradient=make_gradient(gradient))
        loss = sum(t.square().sum() for t in solution.state)
        found.append((solution, loss, torch.autograd.grad(loss, weight)[0]))
    (theirs, their_loss, their_gradient), (mine, my_loss, my_gradient) = found
    torch.testing.assert_close(my_loss, their_loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(my_gradient, their_gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(mine.residual, theirs.residual, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(mine.n_steps, theirs.n_steps)
    assert mine.n_evals < theirs.n_evals + 3 and not mine.converged.any()


@pytest.mark.parametrize("padded", [False, True])
def test_positions_of_a_sequence_mix_by_what_precedes_them(padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(3, 9, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 6
    weight.requires_grad_()
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, :4] = not padded

    def f(z):
        seen = z * valid.unsqueeze(2)  # nothing reads padding
        return torch.tanh((z + seen.cumsum(1) / 9) @ weight.T + shift)

    solver = make_solver({"name": "anderson", "max_steps": 5, "tol": 0.0})
    gradient = make_gradient({"name": "upg", "steps": 2})
    start = torch.zeros(3, 9, 6, dtype=torch.float64)
    found = []
    for solve in (fixed_point, fixed_point_of_steps):
        layout = Causal(valid if padded else None)
        solution = solve(f, start, solver=solver, gradient=gradient, layout=layout)
        loss = solution.state[valid].square().sum()
        found.append((solution, torch.autograd.grad(loss, weight)[0]))
    (theirs, their_gradient), (mine, my_gradient) = found
    torch.testing.assert_close(mine.state[valid], theirs.state[valid], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(my_gradient, their_gradient, rtol=1e-6, atol=1e-8)
    assert mine.residual.shape == mine.n_steps.shape == (3, 9)
    shift[:, 6:] += 1  # what comes later
    with torch.no_grad():
        other = fixed_point_of_steps(f, start, solver, gradient, Causal())
        plain = fixed_point_of_steps(f, start, solver, gradient)
    if not padded:
        torch.testing.assert_close(other.state[:, :6], mine.state[:, :6], rtol=0, atol=1e-12)
    assert (plain.state[:, :6] - mine.state[:, :6]).abs().max() > 1e-9


def test_evaluations_are_counted() -> None:
    f, start, _ = problem()
    calls = []

    def counted(z):
        calls.append(1)
        return f(z)

    solver = make_solver({"name": "anderson", "max_steps": 5, "tol": 0.0})
    solution = fixed_point_of_steps(counted, start, solver, make_gradient({"name": "upg"}))
    assert len(calls) == solution.n_evals == 10  # none that only measures


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        ({"name": "anderson", "tol": 1e-3}, "upg"),
        ({"name": "broyden", "tol": 0.0}, "upg"),
        ({"name": "anderson", "tol": 0.0}, "implicit"),
    ],
    ids=str,
)
def test_other_settings_are_refused(solver, gradient) -> None:
    f, start, _ = problem()
    with pytest.raises(ValueError, match="a fixed number of steps needs"):
        fixed_point_of_steps(f, start, make_solver(solver), make_gradient(gradient))


class Writing:
    """h ↦ tanh(h) / 2 + x in place, or in one buffer for every answer."""

    def __init__(self, kind: str) -> None:
        self.kind, self.buffer, self.x = kind, torch.zeros(2, 3), torch.ones(2, 3)
        self.x.requires_grad_()

    def __call__(self, h: Tensor) -> Tensor:
        if self.kind == "plain":
            return h.tanh().mul_(0.5) + self.x
        if self.kind == "in place":
            return h.tanh_().mul(0.5) + self.x
        self.buffer = self.buffer.detach()
        return self.buffer.copy_(h.tanh() / 2 + self.x)


@pytest.mark.parametrize("gradient", [{"name": "upg", "steps": 2}, "npg"], ids=str)
@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "in place", "buffer"])
def test_maps_that_write_into_states_are_refused(kind, window, damping, gradient) -> None:
    settings = {"max_steps": 30, "tol": 0.0, "window": window, "damping": damping}
    solver, gradient = make_solver({"name": "anderson", **settings}), make_gradient(gradient)
    try:
        state = fixed_point_of_steps(Writing(kind), torch.zeros(2, 3), solver, gradient).state
    except ValueError as error:
        assert kind != "plain" and "let it return new tensors" in str(error)
    else:  # damped plain steps keep no answer
        assert kind == "plain" or (kind, window, damping) == ("buffer", 1, 0.6)
        torch.testing.assert_close(state, state.tanh() / 2 + 1, rtol=1e-5, atol=0)


def test_recorded_answers_in_one_buffer_are_refused() -> None:
    solver = make_solver({"name": "fixed_point", "max_steps": 1, "tol": 0.0})
    with pytest.raises(ValueError, match="let it return new tensors"):
        gradient = make_gradient({"name": "upg", "steps": 2})
        fixed_point_of_steps(Writing("buffer"), torch.zeros(2, 3), solver, gradient)


def test_derivatives_of_a_fixed_number_of_steps() -> None:
    """One backward pass after another; twice or in forward mode there is none through npg."""
    solver = make_solver({"name": "anderson", "max_steps": 20, "tol": 0.0})
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)

    def state(x: Tensor, name: str) -> Tensor:
        gradient = make_gradient({"name": name, "steps": 60, "damping": 1.0})
        start = torch.zeros_like(x)
        return fixed_point_of_steps(lambda h: h.tanh() / 2 + x, start, solver, gradient).state

    tracked = x.clone().requires_grad_()
    loss = state(tracked, "npg").sum()
    slope = 1 / (1 - (1 - state(x, "upg").tanh().square()) / 2)
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, tracked, retain_graph=True)
        torch.testing.assert_close(found, slope)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, tracked, create_graph=True)
    with pytest.raises(RuntimeError, match="torch.func; choose gradient 'upg'"):
        torch.func.jvp(lambda x: state(x, "npg"), (x,), (x,))
    dual = torch.autograd.forward_ad
    with dual.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives"):
        state(dual.make_dual(x, x), "npg")
    tangent = torch.func.jvp(lambda x: state(x, "upg"), (x,), (x,))[1]
    torch.testing.assert_close(tangent, slope * x)


def test_unsolvable_systems_take_the_newest_evaluation() -> None:
    bad = torch.tensor([float("nan"), 1.0])
    weights = mixing_weights([[bad], [torch.zeros(2), torch.ones(2)]], 1e-8)
    assert [float(w[0]) for w in weights] == [0.0, 1.0]
    torch.testing.assert_close(weights[0][1] + weights[1][1], torch.tensor(1.0))


def test_a_whole_solve_is_one_graph() -> None:
    f, start, _ = problem(torch.float32)

    def solve(z):
        return fixed_steps(f, z, 4, window=3, damping=0.9)

    torch._dynamo.reset()
    with torch.no_grad():
        traced = torch.compile(solve, backend="eager", fullgraph=True, dynamic=False)(start)
        expected = solve(start)
    for a, b in zip(traced, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_difference_penalty_is_the_jacobians() -> None:
    torch.manual_seed(0)
    weight, state = torch.randn(6, 6) / 6, torch.randn(4000, 6)

    def f(z):
        return torch.tanh(z @ weight.T)

    exact = jacobian_penalty(f, state, n_probes=4)
    found = difference_penalty(f, state, 0.03)
    assert float(found) == pytest.approx(float(exact), rel=0.05)


def test_series_keeps_nothing_alive() -> None:
    """The graph of npg is gone with the state, without the cyclic collector."""
    import gc
    import weakref

    f, start, weight = problem()
    solver = make_solver({"name": "anderson", "max_steps": 3, "tol": 0.0})
    gc.collect()
    gc.disable()
    try:
        solution = fixed_point_of_steps(f, start, solver, make_gradient("npg"))
        node = weakref.ref(solution.state[0].grad_fn)
        solution.state[0].sum().backward()
        del solution
        assert node() is None
    finally:
        gc.enable()


class Exported(torch.nn.Module):
    def __init__(self, solver: dict) -> None:
        super().__init__()
        self.layer = Equilibrium(lambda h, x: torch.tanh(0.9 * h.roll(1, 1) + x), solver=solver)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.layer(torch.zeros_like(x), x)
        return found.state, found.residual, found.converged


@pytest.mark.parametrize("settings", [{"name": "fixed_point"}, {"name": "anderson", "window": 2}])
def test_an_exported_program_does_all_steps(settings: dict) -> None:
    """For every batch size, what the solver has after as many steps, with its residual."""
    module = Exported({**settings, "max_steps": 5, "tol": 1e-9}).eval()
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(3, 6),), dynamic_shapes=({0: batch},), strict=False
        )
        x = torch.randn(4, 6)
        found, expected = program.module()(x), module(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="looks at values"), torch.no_grad():
        torch.export.export(Exported({"name": "broyden"}), (x,), strict=False)


def test_a_modules_own_names_change_nothing() -> None:
    """`dtype` and `layout` of somebody's module are none of the solver's business."""

    class Named(torch.nn.Module):
        dtype, layout = torch.bfloat16, "rows"

        def forward(self, z: Tensor) -> Tensor:
            return torch.tanh(z * 0.3 + 0.7)

    solver = make_solver({"name": "fixed_point", "max_steps": 3, "tol": 0.0})
    start = torch.full((2, 3), 1 / 3)
    found = [
        fixed_point_of_steps(f, start, solver, make_gradient("jfb")).state
        for f in (Named(), lambda z: torch.tanh(z * 0.3 + 0.7))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)

"""Maps, scales and modes that must give the right answer or a clear error, never a wrong answer."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from deqzoo.equilibrium import (
    GRADIENTS,
    NPG,
    SOLVERS,
    UPG,
    Causal,
    Gradient,
    Implicit,
    Rows,
    Segments,
    Unrolled,
    attach_cotangent,
    fixed_point,
    gradient_fidelity,
    jacobian_penalty,
    make_gradient,
    make_solver,
    spectral_radius,
)

NAMES = list(SOLVERS)
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Buffered:
    """h ↦ h / 2 + x, answered in the same one or two buffers again and again."""

    def __init__(self, x: Tensor, n: int = 1) -> None:
        self.x = x
        self.buffers = [torch.empty_like(x) for _ in range(n)]
        self.calls = 0

    def __call__(self, h: Tensor) -> Tensor:
        self.calls += 1
        return torch.add(self.x, h, alpha=0.5, out=self.buffers[self.calls % len(self.buffers)])


IN_PLACE = {
    "on its argument": lambda x: lambda h: h.mul_(0.5).add_(x),
    "then a new tensor": lambda x: lambda h: h.mul_(0.5) + x,
    "in one buffer": Buffered,
}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("kind", list(IN_PLACE))
@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_maps_that_work_in_place(name: str, damping: float, kind: str, mode: str) -> None:
    x, start = randn(4, 6), torch.zeros(4, 6)
    settings = {"name": name, "tol": 1e-5, "max_steps": 80, "damping": damping}
    with MODES[mode]():
        found = fixed_point(IN_PLACE[kind](x), start, solver=settings)
        again = fixed_point(IN_PLACE[kind](x), start.clone(), solver=settings)
    assert found.converged.all() and not start.any()
    torch.testing.assert_close(found.state, 2 * x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.state, found.state)


def test_maps_that_work_in_place_on_a_part_of_the_state() -> None:
    x = randn(4, 6)

    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": state["a"].mul_(0.5).add_(x), "b": 0.5 * state["a"] + 0.1 * state["b"]}

    with torch.no_grad():
        found = fixed_point(f, {"a": torch.zeros(4, 6), "b": torch.zeros(4, 6)}, solver="anderson")
    torch.testing.assert_close(found.state["a"], 2 * x, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.state["b"], x / 0.9, rtol=1e-2, atol=1e-2)


def test_two_buffers_in_turns_are_refused_where_they_would_do_harm() -> None:
    x = randn(4, 6)
    settings = {"name": "fixed_point", "tol": 1e-5, "max_steps": 60}
    with torch.no_grad(), pytest.raises(ValueError, match="return new tensors"):
        fixed_point(Buffered(x, n=2), torch.zeros(4, 6), solver=settings)


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_gradients_of_maps_that_work_in_place(name: str) -> None:
    found = []
    for in_place in (False, True):
        layer = nn.Linear(5, 5)
        with torch.no_grad():
            layer.weight.copy_(0.3 * randn(5, 5, seed=1))
            layer.bias.copy_(randn(5, seed=2))
        relu = nn.ReLU(inplace=in_place)
        solution = fixed_point(
            lambda h, layer=layer, relu=relu: layer(relu(h)),
            torch.zeros(3, 5),
            solver={"name": "anderson", "tol": 1e-6, "max_steps": 60},
            gradient=name,
        )
        solution.state.square().sum().backward()
        found.append((solution.state.detach(), layer.weight.grad, layer.bias.grad))
        penalty = jacobian_penalty(lambda h: layer(relu(h)), solution.state)  # noqa: B023
        assert penalty > 0
        assert spectral_radius(lambda h: layer(relu(h)), solution.state).max() > 0  # noqa: B023
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other)


def test_ordinary_maps_get_two_copies_per_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    clone, copies = Tensor.clone, []
    monkeypatch.setattr(Tensor, "clone", lambda t, **k: copies.append(t) or clone(t, **k))
    x = randn(4, 6)
    with torch.no_grad():
        fixed_point(lambda h: 0.9 * h + x, torch.zeros(4, 6), solver={"name": "fixed_point"})
    assert len(copies) <= 3  # first argument, first answer, result


SCALES = [
    (torch.float32, 1e-30),
    (torch.float32, 1e-12),
    (torch.float32, 1e30),
    (torch.bfloat16, 1e-30),
    (torch.float16, 1e-4),
    (torch.float64, 1e-250),
    (torch.float64, 1e-12),
    (torch.float64, 1e250),
]


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_scale_is_solved_like_scale_one(
    name: str, dtype: torch.dtype, scale: float, stop_mode: str
) -> None:
    """A rescaled problem takes the same steps to the same relative error."""
    weight = 0.7 * torch.linalg.qr(randn(6, 6, dtype=torch.float64))[0]
    x = randn(4, 6, seed=1, dtype=torch.float64)
    exact = torch.linalg.solve((torch.eye(6, dtype=x.dtype) - weight).T, x.T).T
    half = dtype in (torch.bfloat16, torch.float16)
    tol = 2e-2 if half else 1e-4
    found = {}
    for s in (1.0, scale):
        shift = (x * s).to(dtype)
        settings = make_solver(
            {
                "name": name,
                "tol": tol * (s if stop_mode == "abs" else 1),
                "max_steps": 60,
                "stop_mode": stop_mode,
            }
        )
        w = weight.to(dtype)
        found[s] = settings.solve(lambda h, w=w, b=shift: h @ w + b, torch.zeros_like(shift))
        assert found[s].converged.all()
        error = (found[s].state.double() / s - exact).norm() / exact.norm()
        assert error < 5 * tol
    if not half:
        assert (found[scale].n_steps - found[1.0].n_steps).abs().max() <= 1
        rel = found[scale].rel_residual / found[1.0].rel_residual
        assert (rel.log().abs() < 1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compact", [False, True])
def test_samples_of_every_scale_share_a_batch(name: str, compact: bool) -> None:
    scale = torch.tensor([1e-30, 1e-12, 1.0, 1e12, 1e30, 0.0]).unsqueeze(1)
    weight = 0.7 * torch.linalg.qr(randn(6, 6))[0]
    x = randn(6, 6, seed=1) * scale
    settings = {"name": name, "tol": 1e-4, "max_steps": 60}
    with torch.no_grad():
        found = fixed_point(
            lambda h, x: h @ weight + x, torch.zeros_like(x), x, solver=settings, compact=compact
        )
    exact = torch.linalg.solve((torch.eye(6) - weight).T.double(), x.T.double()).T
    assert found.converged.all()
    error = (found.state.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-300)
    assert (error[:5] < 1e-3).all() and not found.state[5].any()


@pytest.mark.parametrize("layout", [Causal(), Segments(torch.tensor([0, 1, 0, 1]), 2)])
@pytest.mark.parametrize("name", NAMES)
def test_every_scale_in_every_layout(name: str, layout: object) -> None:
    causal = isinstance(layout, Causal)
    shape = (2, 4, 6) if causal else (4, 6)
    weight = 0.7 * torch.linalg.qr(randn(6, 6))[0]
    x = randn(*shape, seed=1)
    results = []
    for scale in (1.0, 2.0**-100, 2.0**100):
        solution = make_solver({"name": name, "tol": 1e-4, "max_steps": 60}).solve(
            lambda h, b=x * scale: h @ weight + b, torch.zeros(shape), layout
        )
        assert solution.converged.all()
        results.append(solution.state / scale)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_start_far_above_the_answer(name: str) -> None:
    x = 1e-25 * randn(4, 6)
    found = make_solver({"name": name, "tol": 1e-4, "max_steps": 300}).solve(
        lambda h: 0.5 * h + x, torch.full((4, 6), 1e10)
    )
    assert found.converged.all()
    assert (found.state - 2 * x).double().norm() < 1e-3 * (2 * x).double().norm()


@pytest.mark.parametrize("mode", list(MODES))
def test_diagnostics_without_grad_mode(mode: str) -> None:
    weight = torch.diag(torch.tensor([0.5, 0.2, 0.9]))
    layer = nn.Linear(3, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, solver: object, gradient: object) -> object:
            solution = fixed_point(
                lambda h: torch.tanh(0.5 * self.layer(h) + x),
                torch.zeros_like(x),
                solver=solver or "anderson",
                gradient=gradient,
            )
            solution.loss = solution.state.square().sum()  # type: ignore[attr-defined]
            return solution

    x = randn(4, 3)
    expected = gradient_fidelity(Model(), {"x": x}, ["jfb"])[0]
    with MODES[mode]():
        state = torch.ones(1, 3)  # an inference tensor in inference mode
        radius = spectral_radius(lambda h: h @ weight, state)
        penalty = jacobian_penalty(lambda h: h @ weight, state, n_probes=400)
        found = gradient_fidelity(Model(), {"x": x}, ["jfb"])[0]
    assert float(radius) == pytest.approx(0.9, abs=1e-2)
    assert float(penalty) == pytest.approx(float(weight.square().sum()) / 3, rel=0.2)
    assert found.cosine == expected.cosine and found.cosine["all"] > 0


def alive() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(o, Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("name", list(GRADIENTS))
def test_finished_steps_leave_no_tensor_behind(
    name: str, structured: bool, checkpoint: bool
) -> None:
    if checkpoint and not make_gradient(name).can_checkpoint:
        return
    weight, x = 0.3 * randn(8, 8), randn(4, 8, seed=1)

    def step() -> None:
        w = weight.clone().requires_grad_()
        start = torch.zeros(4, 8)
        if structured:
            f = lambda h: {"a": torch.tanh(h["b"] @ w + x), "b": 0.5 * h["a"]}  # noqa: E731
            start = {"a": start, "b": start.clone()}
        else:
            f = lambda h: torch.tanh(h @ w + x)  # noqa: E731
        solution = fixed_point(
            f, start, gradient=name, checkpoint=checkpoint, sample_steps=(1, 2), trace=True
        )
        state = solution.state["a"] if structured else solution.state
        (state.sum() + sum(s["a"].sum() if structured else s.sum() for s in solution.samples)
         ).backward()  # fmt: skip

    step()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(3):
            step()
        assert alive() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", NAMES)
def test_live_tensors_do_not_grow_with_the_steps_of_a_solve(name: str) -> None:
    calls, counts = [], []
    x = (randn(4, 8), randn(4, 3, seed=1))

    def f(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) in (8, 14, 20):
            counts.append(alive())
        return torch.tanh(2 * state[0].roll(1, 0)) + x[0], 0.9 * state[1].sin() + x[1]

    gc.collect()
    gc.disable()
    try:
        make_solver({"name": name, "max_steps": 40, "tol": 0.0}).solve(
            f, (torch.zeros(4, 8), torch.zeros(4, 3))
        )
    finally:
        gc.enable()
    assert len(counts) == 3 and len(set(counts)) == 1


class Counted(torch.autograd.Function):
    """Identity that counts the tensors alive, in both directions."""

    @staticmethod
    def forward(ctx, x, counts):  # type: ignore[no-untyped-def]
        ctx.counts = counts
        Counted.count(counts)
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        Counted.count(ctx.counts)
        return cotangent, None

    @staticmethod
    def count(counts):  # type: ignore[no-untyped-def]
        counts.append(alive() if len(counts) % 8 == 7 else 0)  # it takes a while


@pytest.mark.parametrize("gradient", ["implicit", "npg", "upg", "jfb"])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_keeps_as_much_for_any_number_of_steps(name: str, gradient: str) -> None:
    """Steps of the solver and of the adjoint's: the most tensors alive at once stay as many."""
    weight, x = (0.3 * randn(8, 8)).requires_grad_(), randn(4, 8, seed=1)

    def most(steps: int) -> int:
        counts: list[int] = []
        solver = {"name": name, "max_steps": steps, "tol": 0.0}
        solver |= {"anderson": {"window": 4}, "broyden": {"memory": 4}}.get(name, {})
        chosen = {"name": gradient, "solver": solver} if gradient == "implicit" else gradient
        found = fixed_point(
            lambda h: Counted.apply(torch.tanh(h @ weight + x), counts),
            torch.zeros(4, 8), solver=solver, gradient=chosen,
        )  # fmt: skip
        found.state.sum().backward()
        return max(counts)

    most(3)
    gc.collect()
    gc.disable()
    try:
        assert most(24) < most(12) + 12  # one tensor per step would be twelve more
    finally:
        gc.enable()


@dataclass(frozen=True)
class OneStep(Gradient):
    name: ClassVar[str] = "one step"
    needs_solve: ClassVar[bool] = False

    def attach(self, problem, state):  # type: ignore[no-untyped-def]
        return problem.f(state)


@dataclass(frozen=True)
class Adjoint(Gradient):
    """Recorded at the start, with two products."""

    name: ClassVar[str] = "adjoint"
    needs_solve: ClassVar[bool] = False

    def attach(self, problem, state):  # type: ignore[no-untyped-def]
        return attach_cotangent(problem, state, lambda product, g: g + product(product(g)))


def test_a_gradient_that_needs_no_solve_makes_the_state() -> None:
    w = torch.full((3,), 0.5, requires_grad=True)
    f = lambda h: torch.tanh(h * w + 1)  # noqa: E731
    found = fixed_point(f, torch.zeros(2, 3), gradient=OneStep(), trace=True)
    torch.testing.assert_close(found.state, f(torch.zeros(2, 3)))
    found.state.sum().backward()
    assert w.grad is not None and found.n_steps.tolist() == [1, 1] and found.n_evals == 2
    assert found.trace is not None and found.trace.shape == (2, 1)
    residual = (f(found.state) - found.state).norm(dim=1)
    torch.testing.assert_close(found.abs_residual, residual)
    assert fixed_point(f, torch.zeros(2, 3), gradient=Adjoint()).state.requires_grad


COSTS = [
    ({"name": "upg", "steps": 5}, 15, 20, 15, 5),
    ({"name": "npg", "steps": 5}, 7, 7, 8, 1),
    ({"name": "jfb"}, 3, 3, 3, 1),
    ({"name": "unrolled"}, 21, 28, 21, 7),
    ({"name": "unrolled", "steps": 4}, 12, 16, 12, 4),
    ({"name": "implicit"}, 23, 23, 24, 1),
    (Adjoint(), 5, 5, 6, 1),
    (OneStep(), 3, 3, 3, 1),
]


@pytest.mark.parametrize(("spec", "plain", "recomputed", "twin", "graphs"), COSTS)
def test_what_gradients_cost(
    spec: object, plain: int, recomputed: int, twin: int, graphs: int
) -> None:
    """Own classes answer for themselves, without a line of their own."""
    gradient = make_gradient(spec)
    if not gradient.can_checkpoint and spec != {"name": "jfb"}:
        recomputed = plain
    if isinstance(spec, dict) and spec["name"] == "jfb":
        recomputed = 4 if gradient.can_checkpoint else 3
    assert gradient.cost(7).evaluations == plain and gradient.cost(7).graphs == graphs
    assert gradient.cost(7, checkpoint=True).evaluations == recomputed
    assert gradient.cost(7, detached=True).evaluations == twin
    with torch.inference_mode():
        assert gradient.cost(7).evaluations == plain


def test_counted_products_of_an_adjoint_solve() -> None:
    assert Implicit().cost(9, products=12).evaluations == 15
    assert Implicit({"name": "anderson", "max_steps": 4}).cost(9).evaluations == 7
    assert NPG(2).cost(9, products=12).evaluations == 4


def test_how_many_states_a_solve_keeps() -> None:
    assert make_solver("fixed_point").history() == 3
    assert make_solver({"name": "anderson", "window": 4}).history() == 11
    assert make_solver({"name": "broyden", "memory": 5}).history() == 9
    assert make_solver({"name": "broyden", "max_steps": 2}).history() == 6


class Misleading(nn.Module):
    """A module whose own methods have the names of a `BatchMap`'s and a `DetachableMap`'s."""

    layout = "NCHW"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * randn(5, 5))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.weight + 1)

    def select(self, index: int) -> Tensor:
        raise AssertionError("not meant")

    detached = forget = bound = select


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_names_on_a_users_module_mean_nothing(name: str) -> None:
    module, plain = Misleading(), Misleading()
    start = torch.zeros(3, 5)
    fixed_point(module, start, gradient=name).state.sum().backward()
    fixed_point(plain.forward, start, gradient=name).state.sum().backward()
    assert torch.equal(module.weight.grad, plain.weight.grad)
    with torch.no_grad():
        assert torch.equal(
            fixed_point(module, start).state, fixed_point(module.forward, start).state
        )
        solver = make_solver("anderson")
        with pytest.raises(TypeError, match="BatchMap"):
            solver.solve(module, start, compact=True)
        fixed_point(module, start, compact=True)


@pytest.mark.parametrize("name", NAMES)
def test_one_layout_in_nested_solves_and_in_threads(name: str) -> None:
    layout = Rows()
    weight = 0.3 * randn(5, 5)

    def inner(h: Tensor) -> Tensor:
        pair = fixed_point(
            lambda z: (0.5 * z[0], 0.5 * z[1] + h[:, :2]),
            (torch.zeros(3, 7), torch.zeros(3, 2)),
            layout=layout,
            solver=name,
        )
        return torch.tanh(h @ weight + pair.state[1].sum() / 50)

    def outer(layout: Rows | None) -> Tensor:
        return fixed_point(inner, torch.zeros(3, 5), layout=layout, solver=name).state

    with torch.no_grad():
        assert torch.equal(outer(layout), outer(None))

    shapes = [(4, 3), (2, 6), (5, 5), (1, 9)]
    results: dict[tuple[int, int], Tensor] = {}

    def work(shape: tuple[int, int]) -> None:
        x = torch.ones(shape)
        with torch.no_grad():
            for _ in range(20):
                found = fixed_point(
                    lambda h: 0.5 * h + x, torch.zeros(shape), layout=layout, solver=name
                )
        results[shape] = found.state

    threads = [threading.Thread(target=work, args=(shape,)) for shape in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shape in shapes:
        torch.testing.assert_close(results[shape], torch.full(shape, 2.0), rtol=1e-2, atol=1e-2)


EMPTY: dict[str, tuple[tuple[int, ...], Callable[[], object]]] = {
    "no sample": ((0, 3), Rows),
    "no feature": ((3, 0), Rows),
    "nothing": ((0, 0), Rows),
    "no node": ((0, 3), lambda: Segments(torch.zeros(0, dtype=torch.int64), 0)),
    "only empty graphs": ((0, 3), lambda: Segments(torch.zeros(0, dtype=torch.int64), 2)),
    "nodes without features": ((2, 0), lambda: Segments(torch.tensor([0, 2]), 3)),
    "no sequence": ((0, 4, 3), Causal),
    "no word": ((2, 0, 3), Causal),
    "words without features": ((2, 4, 0), Causal),
}


@pytest.mark.parametrize("kind", list(EMPTY))
@pytest.mark.parametrize("gradient", list(GRADIENTS))
@pytest.mark.parametrize("name", NAMES)
def test_empty_states(name: str, gradient: str, kind: str) -> None:
    shape, layout = EMPTY[kind]
    x = torch.zeros(shape, requires_grad=True)
    settings: dict = {"name": gradient}
    if gradient == "implicit":
        settings["solver"] = {"name": name}
    found = fixed_point(
        lambda h: torch.tanh(0.5 * h) + x,
        torch.zeros(shape),
        solver={"name": name, "max_steps": 4},
        gradient=settings,
        layout=layout(),  # type: ignore[arg-type]
        trace=True,
    )
    found.state.sum().backward()
    assert found.state.shape == shape and x.grad is not None and x.grad.shape == shape
    assert found.converged.all()
    assert UPG().cost(3) and Unrolled().cost(3)


DEPENDENT: dict[str, tuple[tuple[int, ...], Callable[[], object]]] = {
    "rows": ((4, 3), Rows),
    "segments": ((4, 3), lambda: Segments(torch.tensor([0, 1, 1, 0]), 2)),
    "causal": ((2, 3, 3), Causal),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(DEPENDENT))
@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_exactly_dependent_residuals(name: str, kind: str, dtype: torch.dtype) -> None:
    """Residuals of h ↦ b − h are ±r, and their Gram matrix has rank one."""
    shape, layout = DEPENDENT[kind]
    tol = 1e-4 if dtype in (torch.float32, torch.float64) else 1e-2
    settings = {"name": name, "tol": tol, "max_steps": 12}
    for b in (torch.ones(shape, dtype=dtype), randn(*shape, seed=3, dtype=dtype)):
        found = make_solver(settings).solve(lambda h, b=b: b - h, torch.zeros_like(b), layout())
        assert found.converged.all() and found.n_steps.max() <= 6
        torch.testing.assert_close(found.state, b / 2, rtol=5 * tol, atol=5 * tol)


@pytest.mark.parametrize("eigenvalues", [(-1.0,), (-1.0, 0.5), (-1.0, -1.0, 0.9, 0.5)])
def test_few_distinct_eigenvalues(eigenvalues: tuple[float, ...]) -> None:
    diagonal = torch.tensor(eigenvalues).repeat(16)
    b = randn(8, len(diagonal), seed=3)
    found = make_solver({"name": "anderson", "tol": 1e-5, "max_steps": 12}).solve(
        lambda h: h * diagonal + b, torch.zeros_like(b)
    )
    assert found.converged.all()
    torch.testing.assert_close(found.state, b / (1 - diagonal), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_gradient_through_dependent_residuals(solver: str, dtype: torch.dtype) -> None:
    b = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    adjoint = {"name": solver, "max_steps": 40, "tol": 1e-4, "damping": 0.7}
    for gradient in ("implicit", {"name": "implicit", "solver": adjoint}):
        found = fixed_point(
            lambda h: b - h, torch.zeros(1, 1, dtype=dtype), solver="broyden", gradient=gradient
        )
        (grad,) = torch.autograd.grad(found.state.sum(), b)
        assert float(grad) == pytest.approx(0.5, abs=1e-3)
        assert found.backward is not None and bool(found.backward.converged.all())


def test_an_adjoint_that_does_not_converge_says_so() -> None:
    b = torch.ones(2, 3, requires_grad=True)

    def backward(**settings: object) -> object:
        gradient = {"name": "implicit", "solver": {"name": "fixed_point", "max_steps": 9}}
        found = fixed_point(
            lambda h: b - h, torch.zeros(2, 3), solver="broyden", gradient={**gradient, **settings}
        )
        assert found.backward.converged is None
        found.state.sum().backward()
        return found.backward

    with pytest.warns(UserWarning, match="did not converge") as seen:
        report = backward()
    assert len(seen) == 1
    assert not report.converged.any() and report.residual.min() > 0.5 and report.n_evals == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(unsolved="ignore")
        backward(solver={"name": "fixed_point", "max_steps": 9, "tol": 0.0})
    with pytest.raises(RuntimeError, match=r"did not converge.* \(2 of 2 cells"):
        backward(unsolved="raise")
    with pytest.raises(ValueError, match="unsolved must be"):
        backward(unsolved="maybe")
    raising = make_gradient({"name": "implicit", "unsolved": "raise"})
    assert make_gradient(raising.to_dict()) == raising

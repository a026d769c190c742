"""Transforms of torch.func through an equilibrium, against closed forms in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from deqzoo.equilibrium import Causal, Equilibrium, fixed_point

from . import cases

TIGHT = {"name": "anderson", "max_steps": 40, "tol": 1e-13}
EXACT = {"name": "implicit", "solver": TIGHT}
LONG = {"steps": 200, "damping": 1.0}
GRADIENTS = [EXACT, {"name": "npg", **LONG}, {"name": "upg", **LONG}]
ONCE = ["implicit", "npg"]


def state(a: Tensor, c: Tensor, gradient: dict | str, n: int = 1) -> Tensor:
    """The equilibrium (I − A)⁻¹ c of h ↦ A h + c on n rows."""
    start = torch.zeros(n, 3, dtype=cases.F64)
    return fixed_point(lambda h: h @ a.T + c, start, solver=TIGHT, gradient=gradient).state


def closed(a: Tensor, c: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(3, dtype=a.dtype) - a, c.T).T


@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: g["name"])
def test_grad_vjp_and_jacrev(gradient: dict) -> None:
    a, c = cases.A, cases.draw(2, 3, seed=0)

    def loss(a: Tensor, c: Tensor, solved=lambda a, c: state(a, c, gradient, 2)) -> Tensor:
        return (solved(a, c) * cases.G).pow(2).sum()

    for found, expected in zip(
        grad(loss, (0, 1))(a, c), grad(lambda a, c: loss(a, c, closed), (0, 1))(a, c), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    out, pull = vjp(lambda c: state(a, c, gradient, 2), c)
    torch.testing.assert_close(out, closed(a, c))
    torch.testing.assert_close(pull(out), vjp(lambda c: closed(a, c), c)[1](out))
    found = jacrev(lambda a: state(a, c, gradient, 2))(a)
    torch.testing.assert_close(found, jacrev(lambda a: closed(a, c))(a), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: g["name"])
@pytest.mark.parametrize("over", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_parameters_and_samples(gradient: dict, over: tuple) -> None:
    """An ensemble, gradients per sample, both; in each the equilibria and their gradients."""
    a = cases.A if over[0] is None else torch.stack([cases.A * s for s in (0.2, 0.7, 1.0, 1.2)])
    c = cases.draw(*([4] if over[1] == 0 else []), 1, 3, seed=1)
    found = vmap(lambda a, c: state(a, c, gradient), over)(a, c)
    torch.testing.assert_close(found, vmap(closed, over)(a, c))

    def loss(a: Tensor, c: Tensor, solved=lambda a, c: state(a, c, gradient)) -> Tensor:
        return (solved(a, c) * cases.G).pow(2).sum()

    exact = vmap(grad(lambda a, c: loss(a, c, closed), (0, 1)), over)(a, c)
    for one, other in zip(vmap(grad(loss, (0, 1)), over)(a, c), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_jfb_is_one_step() -> None:
    c = cases.draw(1, 3, seed=2)
    found = jacrev(lambda c: state(cases.A, c, "jfb"))(c)
    torch.testing.assert_close(found.reshape(3, 3), torch.eye(3, dtype=cases.F64))


def test_modules_by_functional_call() -> None:
    """Gradients per sample of a layer's own weights, as their own backward passes have them."""
    torch.manual_seed(0)

    class Map(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4, dtype=cases.F64)
            torch.nn.init.orthogonal_(self.linear.weight, 0.7)

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(h) + x)

    layer, x = Equilibrium(Map(), TIGHT, EXACT), cases.draw(3, 4, seed=3)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        return functional_call(layer, weights, (torch.zeros_like(x), x)).state.square().sum()

    found = vmap(grad(loss), (None, 0))(weights, x)
    for i in range(3):
        layer.zero_grad()
        layer(torch.zeros_like(x[:1]), x[i : i + 1]).state.square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-8, atol=1e-9)


def test_other_layouts_under_vmap() -> None:
    """Every position of a text is a cell there too; what has converged stays."""
    weight = cases.draw(4, 4, seed=4) / 8
    x = cases.draw(2, 3, 5, 4, seed=5)

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        def f(h: Tensor) -> Tensor:
            return torch.tanh(h.cumsum(1) @ weight + x)

        found = fixed_point(f, torch.zeros_like(x), solver=TIGHT, layout=Causal())
        return found.state, found.converged

    found, converged = vmap(solve)(x)
    assert bool(converged.all()) and converged.shape == (2, 3, 5)
    for one, other in zip(found, x, strict=True):
        torch.testing.assert_close(one, solve(other)[0], rtol=1e-9, atol=1e-9)


def test_maps_in_place() -> None:
    c = cases.draw(2, 1, 3, seed=6)

    def solved(c: Tensor) -> Tensor:
        def f(h: Tensor) -> Tensor:
            return h.mul_(0.5).add(c)

        with torch.no_grad():
            return fixed_point(f, torch.zeros_like(c), solver=TIGHT).state

    torch.testing.assert_close(vmap(solved)(c), 2 * c)


@pytest.mark.parametrize("gradient", ONCE)
def test_what_cannot_be_has_one_line(gradient: str) -> None:
    a, c = cases.A, cases.draw(2, 1, 3, seed=7)

    def loss(c: Tensor) -> Tensor:
        return state(a, c, gradient).square().sum()

    with pytest.raises(RuntimeError, match="second derivatives"):
        jacrev(jacrev(loss))(c[0])
    with pytest.raises(RuntimeError, match=r"write vmap\(grad"):
        grad(lambda c: vmap(loss)(c).sum())(c)
    tracked = c.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"write vmap\(grad"):
        vmap(loss)(tracked).sum().backward()
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad(loss)(tracked[0]).sum().backward()
    with pytest.raises(ValueError, match="choose 'anderson' or 'fixed_point'"):
        vmap(lambda c: fixed_point(lambda h: h / 2 + c, c, solver="broyden").state)(c)
    with pytest.raises(ValueError, match="no single steps"):
        vmap(lambda c: fixed_point(lambda h: h / 2 + c, c, trace=True).state)(c)


FORWARD = [{"name": "upg", **LONG}, {"name": "unrolled", "steps": 200}]


def by_dual_numbers(f: Callable[[Tensor], Tensor], c: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(c, t))).tangent
    return torch.zeros_like(c) if tangent is None else tangent


def by_jvp(f: Callable[[Tensor], Tensor], c: Tensor, t: Tensor) -> Tensor:
    return jvp(f, (c,), (t,))[1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("tangent", [by_dual_numbers, by_jvp])
@pytest.mark.parametrize("gradient", [*FORWARD, EXACT, "npg"], ids=str)
def test_forward_mode(gradient: dict | str, tangent: Callable, mode: Callable) -> None:
    """Right or refused, also where grad mode, which is about backward passes only, is off."""
    a, c, t = cases.A, cases.draw(2, 3, seed=0), cases.draw(2, 3, seed=1)
    if gradient not in FORWARD:
        with mode(), pytest.raises(RuntimeError, match="use vjp, jacrev or grad, or choose"):
            tangent(lambda c: state(a, c, gradient, 2), c, t)
        return
    with mode():
        found = tangent(lambda c: state(a, c, gradient, 2), c, t)
    torch.testing.assert_close(found, closed(a, t))


@pytest.mark.parametrize("gradient", FORWARD, ids=str)
def test_jacfwd_and_hessian(gradient: dict) -> None:
    c = cases.draw(1, 3, seed=2)

    def loss(c: Tensor, solved=lambda c: state(cases.A, c, gradient)) -> Tensor:
        return solved(c).pow(3).sum()

    found, exact = (jacfwd(f)(c) for f in (loss, lambda c: loss(c, lambda c: closed(cases.A, c))))
    torch.testing.assert_close(found, exact)
    exact = hessian(lambda c: loss(c, lambda c: closed(cases.A, c)))(c)
    torch.testing.assert_close(hessian(loss)(c), exact)


@pytest.mark.parametrize("gradient", ONCE)
def test_pullbacks_are_not_differentiated(gradient: str) -> None:
    """They are linear, and their derivative was 0."""
    c = cases.draw(2, 3, seed=3)
    out, pull = vjp(lambda c: state(cases.A, c, gradient, 2), c)
    with pytest.raises(RuntimeError, match="second derivatives"):
        vjp(pull, out)[1]((c,))
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):
        jvp(pull, (out,), (c,))


@pytest.mark.parametrize("gradient", [*GRADIENTS, *FORWARD], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_batched_backward_passes(gradient: dict, n: int) -> None:
    c, every = cases.draw(n, 3, seed=4).requires_grad_(), torch.eye(3 * n, dtype=cases.F64)
    every = every.reshape(-1, n, 3)
    exact = jacrev(lambda c: closed(cases.A, c))(c).reshape(-1, n, 3)
    out = state(cases.A, c, gradient, n)
    (found,) = torch.autograd.grad(out, c, every, is_grads_batched=True)
    torch.testing.assert_close(found, exact)
    found = torch.autograd.functional.jacobian(
        lambda c: state(cases.A, c, gradient, n), c.detach(), vectorize=True
    )
    torch.testing.assert_close(found.reshape(-1, n, 3), exact)


@pytest.mark.parametrize("gradient", ["upg", "jfb", {"name": "unrolled", "steps": 60}])
def test_recorded_steps_allow_any_order(gradient: str | dict) -> None:
    c = cases.draw(2, 1, 3, seed=8)

    def loss(c: Tensor) -> Tensor:
        return state(cases.A, c, gradient).pow(3).sum()

    inside = vmap(grad(loss))(c)
    torch.testing.assert_close(grad(lambda c: vmap(loss)(c).sum())(c), inside)
    second = jacrev(jacrev(loss))(c[0])
    assert second.shape == (1, 3, 1, 3) and bool(second.any())
    if isinstance(gradient, dict):
        exact = jacrev(jacrev(lambda c: closed(cases.A, c).pow(3).sum()))(c[0])
        torch.testing.assert_close(second, exact, rtol=1e-6, atol=1e-6)


def test_a_solve_under_grad_may_stop_early() -> None:
    """Nothing but vmap takes the solver's choice away."""
    counted = []

    def loss(c: Tensor) -> Tensor:
        found = fixed_point(lambda h: h / 2 + c, torch.zeros_like(c), solver="broyden")
        counted.append(found.n_evals)
        return found.state.sum()

    c = cases.draw(1, 3, seed=9)
    torch.testing.assert_close(grad(loss)(c), torch.full_like(c, 2))
    assert counted[0] < 6

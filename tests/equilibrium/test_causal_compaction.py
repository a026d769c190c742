"""Causal states from which solved parts leave: the same answer and the same report as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deqzoo.equilibrium import BatchMap, BoundMap, Causal, Solution, fixed_point

SOLVER = {"name": "anderson", "tol": 1e-5, "max_steps": 100}


class Averaging(BatchMap):
    """Reads the mean of a position and those before it, which its selection hands over."""

    def __init__(self, x: Tensor, past: Tensor | None = None) -> None:
        self.x = x
        self.past = x[:, :0] if past is None else past

    def __call__(self, h: Tensor) -> Tensor:
        whole = torch.cat((self.past, h), 1)
        mean = whole.cumsum(1) / torch.arange(1, whole.shape[1] + 1)[:, None]
        return 0.3 * h + 0.5 * mean[:, self.past.shape[1] :] + self.x

    def select(self, selection: Any) -> Averaging:
        kept = selection.sequences
        past = self.past if kept is None else self.past[kept]
        return Averaging(selection.state(self.x), torch.cat((past, selection.dropped), 1))


@pytest.fixture
def x() -> Tensor:
    x = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e-3  # converges at once, and leaves
    return x


def averaging(h: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
    f = Averaging(x if context is None else x + context[:, None])
    return torch.tanh(f(h))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(), (1, 8)], ids=str)
@pytest.mark.parametrize("context", [False, True])
def test_a_plain_function_keeps_the_positions_it_reads(
    x: Tensor, cuts: tuple[int, ...], context: bool
) -> None:
    inputs = (x, 0.1 * torch.ones(3, 3)) if context else (x,)
    start = torch.zeros_like(x)
    whole = fixed_point(averaging, start, *inputs, layout=Causal(), solver=SOLVER, compact=False)
    layout = Causal(cuts=cuts)
    asked = fixed_point(averaging, start, *inputs, layout=layout, solver=SOLVER, compact=True)
    own = fixed_point(BoundMap(averaging, inputs), start, layout=Causal(), solver=SOLVER)
    for found in (asked, own):
        assert found.converged.all() and found.row_evals < whole.row_evals
        torch.testing.assert_close(found.state, whole.state, rtol=0, atol=1e-4)
        residual = averaging(found.state, *inputs) - found.state
        assert residual.norm(dim=-1).max() < 1e-3


@torch.no_grad()
def test_inputs_of_a_map_that_is_cut_have_positions(x: Tensor) -> None:
    class Two(Averaging):
        def __call__(self, h: Tensor, *inputs: Tensor) -> Tensor:
            return super().__call__(h)

    with pytest.raises(ValueError, match=r"must begin with \(3, 40\)"):
        fixed_point(Two(x), torch.zeros_like(x), torch.ones(3, 3), layout=Causal(), compact=True)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-14, 1.0, 1e17, 1e25])
def test_what_leaves_is_handed_over_in_the_units_of_the_map(x: Tensor, scale: float) -> None:
    def solved(scale: float, compact: bool) -> Solution:
        solver = {**SOLVER, "tol": 1e-4}
        f, start = Averaging(x * scale), torch.zeros_like(x)
        return fixed_point(f, start, layout=Causal(), compact=compact, solver=solver)

    whole, found = solved(1.0, False), solved(scale, True)
    assert found.converged.all() and found.row_evals < found.n_evals * 120
    torch.testing.assert_close(found.state / scale, whole.state, rtol=0.01, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fixed_point", "anderson", "broyden"])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e19, 1e30])
def test_sequences_of_any_scale_stop_together(name: str, scale: float) -> None:
    torch.manual_seed(0)
    weight = 0.5 * torch.linalg.qr(torch.randn(6, 6))[0]
    x = torch.randn(2, 5, 6)
    solver = {"name": name, "tol": 1e-4, "max_steps": 60, "criterion": "per sequence"}

    def solved(scale: float) -> Solution:
        start = torch.zeros_like(x)
        return fixed_point(lambda h: h @ weight + x * scale, start, layout=Causal(), solver=solver)

    found, usual = solved(scale), solved(1.0)
    assert found.converged.all() and (found.n_steps - usual.n_steps).abs().max() <= 1
    torch.testing.assert_close(found.state / scale, usual.state, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fixed_point", "anderson", "broyden"])
@pytest.mark.parametrize("scale", [1e-30, 1e16, 1e18, 1e30])
@pytest.mark.parametrize("bounded", [True, False])
def test_a_token_of_any_scale_leaves_others_alone(name: str, scale: float, bounded: bool) -> None:
    """Other sequences, and what precedes it in its own, are solved as beside an ordinary one.

    What follows, which may grow to where squares overflow, is right where it counts as converged.
    """
    weight = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
    solver = {"name": name, "tol": 1e-5, "max_steps": 300}

    def read(h: Tensor) -> Tensor:
        return 0.3 * (torch.tanh(h) if bounded else h)

    def solved(scale: float) -> tuple[Tensor, Solution]:
        token = x.clone()
        token[0, 3] *= scale

        def f(h: Tensor) -> Tensor:
            before = torch.nn.functional.pad(h[:, :-1], (0, 0, 1, 0))
            return 0.9 * (h @ weight) + token + read(before)

        return token, fixed_point(f, torch.zeros_like(x), layout=Causal(), solver=solver)

    token, found = solved(scale)
    _, usual = solved(1.0)
    assert found.converged[:, :4].all() and (found.converged.all() or not bounded)
    for others in (lambda t: t[1:], lambda t: t[0, :3]):
        assert torch.equal(others(found.n_steps), others(usual.n_steps))
        assert torch.equal(others(found.state), others(usual.state))
    exact = x[0, 0].double() * 0
    system = torch.eye(6).double() - 0.9 * weight.double().T
    for k in range(7):
        exact = torch.linalg.solve(system, token[0, k].double() + read(exact))
        error = (found.state[0, k].double() - exact).norm() / exact.norm()
        assert error < 1e-3 or not found.converged[0, k]


@torch.no_grad()
@pytest.mark.parametrize("name", ["fixed_point", "anderson", "broyden"])
@pytest.mark.parametrize("scale", [1e10, 1e17, 1e19, 1e20, 1e30])
def test_a_token_that_grows_until_its_squares_overflow(name: str, scale: float) -> None:
    """Its residual was 0 then, which did not show behind that of the token before it."""

    def f(h: Tensor) -> Tensor:
        before = torch.nn.functional.pad(h[:, :-1], (0, 0, 1, 0))
        return 0.5 * h + 1 + torch.tensor([0.0, scale, 0.0])[:, None] * before

    solver = {"name": name, "tol": 1e-4, "max_steps": 100}
    found = fixed_point(f, torch.zeros(2, 3, 4), layout=Causal(), solver=solver)
    exact = torch.tensor([2, 2 + 4 * scale, 2])[:, None].expand(2, 3, 4)
    assert found.converged.all()
    torch.testing.assert_close(found.state, exact, rtol=1e-3, atol=0)


class Slow(Averaging):
    """The first position takes hundreds of steps, and what the others read comes from it."""

    def __call__(self, h: Tensor) -> Tensor:
        n_past = self.past.shape[1]
        whole = torch.cat((self.past, h), 1)
        before = torch.nn.functional.pad(whole, (0, 0, 1, 0))[:, n_past:-1]
        first = (torch.arange(whole.shape[1])[n_past:] == 0)[None, :, None]
        quick = 0.3 * torch.tanh(h) + 0.5 * torch.tanh(before) + self.x
        return torch.where(first, 0.99 * h + 1, quick)

    def select(self, selection: Any) -> Slow:
        return Slow(*vars(super().select(selection)).values())


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(), (1,), (1, 8)], ids=str)
def test_nothing_behind_an_unsolved_position_has_converged(
    x: Tensor, cuts: tuple[int, ...]
) -> None:
    solver = {"name": "fixed_point", "tol": 1e-3, "max_steps": 20}
    found = fixed_point(
        Slow(x), torch.zeros_like(x), layout=Causal(cuts=cuts), solver=solver, compact=True
    )
    assert not found.converged.any() and (found.residual > 1e-3).all()
    # What was solved before it stays so.
    assert fixed_point(
        Averaging(x[:, :3]), torch.zeros(3, 3, 3), layout=Causal(cuts=(1,)), solver=SOLVER
    ).converged.all()


@torch.no_grad()
def test_residuals_do_not_depend_on_who_left(x: Tensor) -> None:
    for tol in (1e-2, 1e-4):
        solver = {**SOLVER, "tol": tol}
        start = torch.zeros_like(x)
        left, stayed = (
            fixed_point(Averaging(x), start, layout=Causal(), solver=solver, compact=compact)
            for compact in (True, False)
        )
        assert left.row_evals < stayed.row_evals
        torch.testing.assert_close(left.residual, stayed.residual, rtol=1e-3, atol=1e-7)
        assert (left.residual.diff(dim=1) >= 0).all()

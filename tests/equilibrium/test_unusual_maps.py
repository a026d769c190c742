"""Maps that write where nobody counts it, hide their weights or do not read their state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deqzoo.equilibrium import DetachableMap, Segments, Status, fixed_point, jacobian_penalty

SOLVERS = ["fixed_point", "anderson", "broyden"]


class Buffered(nn.Module):
    """Answers in a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(0.8 * torch.linalg.qr(torch.randn(4, 4))[0])
        self.x = torch.randn(3, 4)
        self.buffer = torch.zeros(3, 4)

    def forward(self, h: Tensor) -> Tensor:
        self.buffer = self.buffer.detach()
        self.buffer.copy_(self.plain(h))
        return self.buffer

    def plain(self, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.weight + self.x)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["unrolled", "upg"])
def test_recorded_answers_in_one_buffer(name: str, steps: int) -> None:
    gradient = {"name": name, "steps": steps, **({"damping": 1.0} if name == "upg" else {})}
    f = Buffered()
    start = torch.zeros(3, 4)
    found = fixed_point(f, start, gradient=gradient)
    right = fixed_point(f.plain, start, gradient=gradient)
    state = found.state.detach().clone()
    torch.testing.assert_close(state, right.state.detach())
    torch.testing.assert_close(found.residual, right.residual)
    assert torch.equal(found.converged, right.converged)
    f(torch.ones(3, 4))
    assert torch.equal(found.state, state)
    (expected,) = torch.autograd.grad(right.state.sum(), f.weight)
    torch.testing.assert_close(torch.autograd.grad(found.state.sum(), f.weight)[0], expected)


def by_data(h: Tensor) -> Tensor:
    return h.data.mul_(0.5).add_(1)


def by_numpy(h: Tensor) -> Tensor:
    h.numpy()[:] = 0.5 * h.numpy() + 1
    return h


@torch.no_grad()
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("f", [by_data, by_numpy])
@pytest.mark.parametrize("batch", [1, 3])
def test_writes_that_no_version_counts(name: str, f: Callable, batch: int) -> None:
    start = torch.zeros(batch, 5)
    found = fixed_point(f, start, solver={"name": name, "tol": 1e-6, "max_steps": 60})
    torch.testing.assert_close(found.state, torch.full((batch, 5), 2.0), rtol=1e-4, atol=0)
    assert (start == 0).all()


def test_probes_in_any_order() -> None:
    torch.manual_seed(0)
    a = torch.randn(3, 3)
    state = {k: torch.randn(2, 3) for k in "ab"}
    one, none = torch.ones(2, 3), torch.zeros(2, 3)
    values = [
        jacobian_penalty(lambda s: {"b": s["a"] @ a, "a": 0 * s["b"]}, state, probes=[probe])
        for probe in ({"a": none, "b": one}, {"b": one, "a": none})
    ]
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("name", ["implicit", "npg", "upg", "jfb"])
def test_a_detachable_map_that_does_not_read_its_state(name: str) -> None:
    weight = torch.ones(3, requires_grad=True)

    class Constant(DetachableMap):
        def __call__(self, state: Tensor) -> Tensor:
            return (2 * weight).expand_as(state)

        def detached(self) -> Callable[[Tensor], Tensor]:
            return lambda state: (2 * weight.detach()).expand_as(state)

    solution = fixed_point(Constant(), torch.zeros(2, 3), gradient=name)
    solution.state.sum().backward()
    series = 1 - 0.5**5 if name in ("npg", "upg") else 1  # five terms with damping 0.5
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.full((3,), 4.0 * series))


@pytest.mark.parametrize("name", ["implicit", "npg"])
def test_weights_behind_a_reentrant_checkpoint_are_no_silent_loss(name: str) -> None:
    layer = nn.Linear(3, 3)

    def f(h: Tensor) -> Tensor:
        return 0.3 * checkpoint(layer, h, use_reentrant=True) + 1

    state = fixed_point(f, torch.zeros(2, 3), gradient=name).state
    assert state.requires_grad
    with pytest.raises(RuntimeError, match="use_reentrant"):
        state.sum().backward()


def test_samples_of_a_solve_that_ends_before_them() -> None:
    with torch.no_grad():
        solution = fixed_point(lambda h: 0 * h + 1, torch.zeros(2, 3), sample_steps=(20,))
    assert solution.samples == []


def test_overflow_under_vmap_is_reported_as_in_a_batch() -> None:
    growth = torch.tensor([0.5, 1e30, 0.5])
    solver = {"name": "fixed_point", "tol": 1e-3, "max_steps": 20}

    def solved(g: Tensor) -> tuple[Tensor, Tensor]:
        solution = fixed_point(lambda h: g * h + 1, torch.zeros(1, 2), solver=solver)
        return solution.status, solution.converged

    status, converged = torch.func.vmap(solved)(growth)
    assert status.flatten().tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert converged.flatten().tolist() == [True, False, True]


def test_one_cell_stays_on_its_device() -> None:
    start = torch.zeros(1, 3)
    with torch.device("meta"):
        one = fixed_point(lambda h: 0.5 * h + 1, start)
        two = fixed_point(lambda h: 0.5 * h + 1, start.repeat(2, 1))
    assert one.status.device == one.n_steps.device == two.status.device == start.device
    assert one.converged.all() and two.converged.all()


def test_rows_of_no_cell_are_named() -> None:
    with pytest.raises(ValueError, match="index holds 3, but the cells are 0 to 1"):
        Segments(torch.tensor([0, 1, 3]), 2)
    with pytest.raises(ValueError, match="index holds -1"):
        Segments(torch.tensor([0, -1]), 1)

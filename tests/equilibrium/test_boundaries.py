"""Odd memory, scales, precisions and arguments: the right answer, or one clear line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deqzoo.equilibrium import (
    UPG,
    Anderson,
    Causal,
    Layout,
    Rows,
    Segments,
    fixed_point,
    gradient_fidelity,
    jacobian_penalty,
    spectral_radius,
)


class Ring:
    """A map that answers in several buffers of its own in turns."""

    def __init__(self, f: Callable[[Tensor], Tensor], n: int, like: Tensor) -> None:
        self.f, self.buffers, self.calls = f, [torch.empty_like(like) for _ in range(n)], 0

    def __call__(self, h: Tensor) -> Tensor:
        self.calls += 1
        return self.buffers[self.calls % len(self.buffers)].copy_(self.f(h))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n", [3, 5])
@torch.no_grad()
def test_the_best_iterate_outlives_the_buffers_of_a_map(n: int, rows: int) -> None:
    def chaos(h: Tensor) -> Tensor:  # its residual rises and falls for ever
        return 3.7 * h * (1 - h)

    start = 0.1 + 0.8 * torch.rand(rows, 3, generator=torch.Generator().manual_seed(1))
    settings = {"name": "fixed_point", "tol": 1e-9, "max_steps": 17}
    found = fixed_point(Ring(chaos, n, start), start, solver=settings)
    torch.testing.assert_close(found.state, fixed_point(chaos, start, solver=settings).state)
    measured = (chaos(found.state) - found.state).norm(dim=1)
    torch.testing.assert_close(found.abs_residual, measured)


@torch.no_grad()
def test_samples_outlive_the_buffers_of_a_map() -> None:
    def f(h: Tensor) -> Tensor:
        return h / 2 + 1

    settings = {"name": "fixed_point", "tol": 0, "max_steps": 12}
    start = torch.zeros(4, 6)
    found = fixed_point(Ring(f, 3, start), start, solver=settings, sample_steps=(1, 2, 3))
    for sample, value in zip(found.samples or (), (1, 1.5, 1.75), strict=True):
        torch.testing.assert_close(sample, torch.full_like(start, value))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("estimator", ["growth", "rayleigh"])
def test_spectral_radius_of_every_scale(estimator: str, scale: float) -> None:
    found = spectral_radius(lambda h: h * scale, torch.zeros(2, 3), estimator=estimator)  # type: ignore[arg-type]
    torch.testing.assert_close(found / scale, torch.ones(2))


def test_spectral_radius_of_a_sequence_is_that_of_all_its_positions() -> None:
    """∂F/∂h is triangular in time: its eigenvalues are those of single positions."""
    own = torch.tensor([0.3, 0.7, 0.2, 0.99], dtype=torch.float64).reshape(1, 4, 1)

    def f(h: Tensor) -> Tensor:
        return own * h + 0.4 * torch.nn.functional.pad(h[:, :-1], (0, 0, 1, 0))

    state = torch.zeros(2, 4, 3, dtype=torch.float64)
    valid = torch.tensor([[True] * 3 + [False]] * 2)  # 0.99 is of padding
    found = spectral_radius(f, state, 300, "rayleigh", layout=Causal(valid))
    torch.testing.assert_close(found, torch.full((2,), 0.7, dtype=torch.float64))
    assert spectral_radius(lambda h: h.detach(), state, layout=Causal()).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_jacobian_penalty_in_half_precision(dtype: torch.dtype) -> None:
    """Sums of squares leave the range of float16 long before their mean does."""
    weight = (3 * torch.eye(512)).to(dtype).requires_grad_()
    state = torch.zeros(64, 512, dtype=dtype)
    found = jacobian_penalty(
        lambda h: h @ weight, state, generator=torch.Generator().manual_seed(0)
    )
    assert found.dtype == torch.float32 and found.item() == pytest.approx(9, rel=0.05)
    found.backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_jacobian_penalty_at_the_edges() -> None:
    assert jacobian_penalty(lambda h: 2 * h, torch.zeros(0, 3)).item() == 0
    with pytest.raises(ValueError, match="n_probes must be at least 1"):
        jacobian_penalty(lambda h: 2 * h, torch.zeros(2, 3), n_probes=0)

    def other_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"b": 3 * state["b"], "a": 0 * state["a"]}

    state = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 300)}
    assert jacobian_penalty(other_order, state).item() == pytest.approx(9, rel=0.3)


@pytest.mark.parametrize(
    "shape, layout",
    [((200, 6), Segments(torch.arange(200) % 2, 2)), ((2, 100, 6), Causal()), ((200, 6), Rows())],
)
def test_exact_gradients_of_a_scaled_loss_in_half_precision(shape: tuple, layout: Layout) -> None:
    """Cotangents of a scaled loss are far from 1; no sum of them may leave float16's range."""
    x = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
    solution = fixed_point(
        lambda h: h / 2 + x,
        torch.zeros(shape, dtype=torch.float16),
        layout=layout,
        solver={"name": "anderson", "tol": 3e-3},
        gradient={"name": "implicit", "solver": {"name": "anderson", "tol": 3e-3}},
    )
    solution.state.backward(torch.full_like(solution.state, 2048))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 4096), rtol=1e-2, atol=0)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
@torch.no_grad()
def test_solves_under_vmap_at_every_scale(scale: float, solver: str) -> None:
    def solve(x: Tensor) -> Tensor:
        settings = {"name": solver, "tol": 1e-5, "max_steps": 40}
        return fixed_point(lambda h: h / 2 + x, torch.zeros(1, 3), solver=settings).state

    x = torch.ones(4, 3)
    found = torch.func.vmap(solve)(scale * x).squeeze(1)
    torch.testing.assert_close(found / scale, 2 * x, rtol=1e-4, atol=0)


def test_every_gradient_comes_with_a_backward_report() -> None:
    for gradient in ("implicit", "upg", "npg", "jfb", "unrolled"):
        solution = fixed_point(lambda h: h / 2, torch.ones(2, 2), gradient=gradient)
        assert solution.backward is not None and solution.backward.converged is None


def half(h: Tensor, *inputs: object) -> Tensor:
    return h / 2


Z = torch.ones(3, 2)


def fidelity(loss: Callable[[Tensor], Tensor]) -> object:
    weight = torch.ones(2, requires_grad=True)
    return gradient_fidelity(
        lambda h: 0.5 * h + weight, Z, "jfb", loss=loss, parameters={"weight": weight}
    )


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "complex start": (lambda: fixed_point(half, Z * 1j), ValueError, "must be real"),
    "complex answer": (lambda: fixed_point(lambda h: h * 1j, Z), ValueError, "view_as_real"),
    "step 0": (lambda: fixed_point(half, Z, sample_steps=(0,)), ValueError, "ints ≥ 1"),
    "steps back": (lambda: fixed_point(half, Z, sample_steps=(4, 1)), ValueError, "must ascend"),
    "step 1.5": (lambda: fixed_point(half, Z, sample_steps=(1.5,)), ValueError, "ints ≥ 1"),  # type: ignore[arg-type]
    "compact with a number": (
        lambda: fixed_point(half, Z, 0.5, compact=True),
        ValueError,
        "must have 3 of them, got float",
    ),
    "compact with a matrix": (
        lambda: fixed_point(half, Z, torch.eye(2), compact=True),
        ValueError,
        r"got shapes \[\(2, 2\)\]",
    ),
    "layout's class": (lambda: fixed_point(half, Z, layout=Rows), TypeError, "Rows\\(\\)"),  # type: ignore[arg-type]
    "layout's name": (lambda: fixed_point(half, Z, layout="rows"), TypeError, "got 'rows'"),  # type: ignore[arg-type]
    "solver's class": (
        lambda: fixed_point(half, Z, solver=Anderson),
        TypeError,
        "the class Anderson",
    ),  # type: ignore[arg-type]
    "gradient's class": (lambda: fixed_point(half, Z, gradient=UPG), TypeError, "the class UPG"),  # type: ignore[arg-type]
    "attention mask": (lambda: Causal(torch.ones(2, 3).long()), TypeError, "mask.bool"),
    "mask of another shape": (
        lambda: fixed_point(
            half, torch.ones(2, 3, 4), layout=Causal(torch.ones(3, 2, dtype=torch.bool))
        ),
        ValueError,
        r"shape \(2, 3\)",
    ),
    "list of cells": (lambda: Segments([0, 0, 1], 2), TypeError, "got list"),  # type: ignore[arg-type]
    "start of no length": (lambda: spectral_radius(half, Z, v0=Z.tril(-1)), ValueError, "not be 0"),
    "start of another shape": (lambda: spectral_radius(half, Z, v0=Z[:1]), ValueError, "3 rows"),
    "no probes": (lambda: jacobian_penalty(half, Z, probes=[]), ValueError, "at least one"),
    "probe of another shape": (
        lambda: jacobian_penalty(half, Z, probes=[Z[:1]]),
        ValueError,
        r"\[\(3, 2\)\], got \[\(1, 2\)\]: a probe",
    ),
    "answer of another shape": (
        lambda: jacobian_penalty(lambda h: h[:1], Z),
        ValueError,
        "the map must return a state like its input",
    ),
    "loss of a state's shape": (lambda: fidelity(lambda h: h), ValueError, "one number"),
    "loss of nothing": (lambda: fidelity(lambda h: Z.sum()), ValueError, "depends on the param"),
    "steps recomputed": (
        lambda: torch.func.grad(
            lambda x: fixed_point(half, Z, x, gradient="upg", checkpoint=True).state.sum()
        )(Z),
        ValueError,
        "leave checkpoint out",
    ),
    "fractions of cells": (lambda: Segments(torch.zeros(3), 1), TypeError, "got torch.float32"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_in_one_line(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()

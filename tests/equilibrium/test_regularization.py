"""Jacobian penalty, spectral radius and the fixed-point correction."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deqzoo.equilibrium import (
    OnceDifferentiableMap,
    Segments,
    correction_weights,
    fixed_point,
    fixed_point_correction,
    gradient_fidelity,
    jacobian_penalty,
    spectral_radius,
)
from deqzoo.equilibrium.diagnostics import SavedTensors

from .cases import F64, H_STAR, H_TANH, W_TANH, X_TANH, affine


def test_jacobian_penalty_of_the_affine_case() -> None:
    probes = [row.unsqueeze(0) * 3**0.5 for row in torch.eye(3, dtype=F64)]
    found = jacobian_penalty(affine, H_STAR.unsqueeze(0), probes=probes)
    assert found.item() == pytest.approx(0.7 / 3, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    many = jacobian_penalty(affine, H_STAR.repeat(500, 1), 20, generator=generator)
    assert many.item() == pytest.approx(0.7 / 3, rel=0.05)


def test_jacobian_penalty_reaches_the_weights() -> None:
    weight = W_TANH.clone().requires_grad_()
    penalty = jacobian_penalty(lambda h: torch.tanh(h @ weight.T), H_TANH.unsqueeze(0))
    (g,) = torch.autograd.grad(penalty, weight)
    assert g.any()


class _Fused(OnceDifferentiableMap):
    """Refuses what its twin, a module of a user's, does under the same name."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        raise AssertionError("has no second derivative")

    def twice_differentiable(self):
        return _Plain(self.weight)


class _Plain(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h @ self.weight

    def twice_differentiable(self, something: int) -> None:
        raise AssertionError("not meant: a method that happens to have the name")


def test_penalty_of_a_map_that_has_a_twin_with_a_second_derivative() -> None:
    weight = torch.eye(3)
    penalty = jacobian_penalty(_Fused(weight), torch.ones(4, 3), n_probes=200)
    assert float(penalty) == pytest.approx(1.0, rel=0.1)
    assert float(jacobian_penalty(_Plain(weight), torch.ones(4, 3), n_probes=200)) > 0.9


def test_what_the_map_does_not_read_adds_nothing_to_the_penalty() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    state = (torch.ones(3, 4), torch.ones(3, 4))
    whole = jacobian_penalty(lambda z: (weight * z[0], torch.ones(3, 4)), state, 50)
    assert whole.item() == pytest.approx(4 / 2, rel=0.3)
    (g,) = torch.autograd.grad(whole, weight)
    assert g.item() == pytest.approx(whole.item(), rel=1e-5)
    for constant in (torch.ones(3, 4), weight * torch.ones(3, 4)):
        penalty = jacobian_penalty(lambda z, c=constant: c, state[0])
        assert penalty.shape == () and penalty.item() == 0
    unread = jacobian_penalty(lambda z: (0.5 * z[0], z[0]), state)
    assert unread > 0


def test_spectral_radius_of_both_cases() -> None:
    v0 = torch.ones(1, 3, dtype=F64)
    found = spectral_radius(affine, H_STAR.unsqueeze(0), n_iter=3000, v0=v0)
    assert found.item() == pytest.approx(0.522709244048, rel=1e-3)  # a complex pair
    tanh = lambda h: torch.tanh(h @ W_TANH.T + X_TANH)  # noqa: E731
    found = spectral_radius(tanh, H_TANH.unsqueeze(0), n_iter=3000, v0=v0[:, :2])
    assert found.item() == pytest.approx(0.252589735392, rel=1e-3)


def test_spectral_radius_by_rayleigh_quotients() -> None:
    scale = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    found = spectral_radius(lambda h: h * scale, torch.ones(2, 3, dtype=F64), 80, "rayleigh")
    torch.testing.assert_close(found, torch.tensor([0.9, 0.9], dtype=F64))
    with pytest.raises(ValueError, match="choose growth or rayleigh"):
        spectral_radius(affine, torch.ones(1, 3, dtype=F64), estimator="power")  # type: ignore


def test_correction_weights_end_at_the_equilibrium() -> None:
    assert correction_weights(3, "exp", 0.8) == pytest.approx([0.64, 0.8, 1])
    assert correction_weights(4, "linear", 0.8) == pytest.approx([0.4, 0.6, 0.8, 1])
    assert correction_weights(3, "const", 0.5) == [0.5, 0.5, 1]
    with pytest.raises(ValueError, match="choose one of exp"):
        correction_weights(3, "none")  # type: ignore[arg-type]


def test_sampled_states_carry_their_own_gradient() -> None:
    x = X_TANH.clone().requires_grad_()
    solution = fixed_point(
        lambda h: torch.tanh(h @ W_TANH.T + x),
        torch.zeros(1, 2, dtype=F64),
        solver={"name": "fixed_point", "max_steps": 40, "tol": 1e-12},
        gradient="jfb",
        sample_steps=(2, 4),
    )
    assert len(solution.samples) == 2
    early, late = ((z - H_TANH).norm().item() for z in solution.samples)
    assert early > late > (solution.state - H_TANH).norm().item()
    states = [*solution.samples, solution.state]
    loss = fixed_point_correction(lambda z: z.sum(), states, gamma=0.8)
    expected = 0.64 * states[0].sum() + 0.8 * states[1].sum() + states[2].sum()
    torch.testing.assert_close(loss, expected)
    for state in states:
        assert torch.autograd.grad(state.sum(), x, retain_graph=True)[0].any()


def test_spectral_radius_of_graphs() -> None:
    """The rows of a graph are one sample: its radius is that of its whole Jacobian."""
    torch.manual_seed(0)
    blocks = [torch.rand(n, n, dtype=F64) for n in (3, 5)]
    matrix = torch.block_diag(*blocks) / 4
    layout = Segments(torch.tensor([0] * 3 + [1] * 5), 2)
    found = spectral_radius(lambda h: matrix @ h, torch.zeros(8, 2, dtype=F64), 80, layout=layout)
    exact = [float(torch.linalg.eigvals(block / 4).abs().max()) for block in blocks]
    assert found.tolist() == pytest.approx(exact, rel=1e-6)


def test_fidelity_leaves_the_model_as_it_was() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, solver: object, gradient: object) -> SimpleNamespace:
            x = self.norm(x)
            found = fixed_point(
                lambda h: torch.tanh(self.linear(h) / 2 + x),
                torch.zeros_like(x),
                solver=solver or "anderson",
                gradient=gradient,
            )
            return SimpleNamespace(loss=found.state.square().mean())

    torch.manual_seed(0)
    model = Normed().train()
    before = [b.clone() for b in model.buffers()]
    (row,) = gradient_fidelity(model, {"x": torch.randn(8, 4)}, ["implicit"])
    assert row.cosine["all"] > 0.999
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_fidelity_of_a_plain_map() -> None:
    torch.manual_seed(0)
    weight = (0.4 * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    x, start = torch.randn(5, 6, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)

    def f(h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ weight + x)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return h.square().sum()

    options = {"loss": loss, "solver": {"name": "anderson", "tol": 1e-10, "max_steps": 200}}
    implicit, one = gradient_fidelity(
        f, start, ["implicit", "jfb"], parameters={"weight": weight}, **options
    )
    assert implicit.cosine["weight"] > 0.999 > one.cosine["weight"]
    # One mode needs no list, and a module brings its own parameters.
    module = nn.Linear(6, 6, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(weight.T), module.bias.zero_()

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = module

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.linear(h) + x)

    (same,) = gradient_fidelity(Step(), start, "jfb", groups=lambda name: name, **options)
    assert same.cosine["linear.weight"] == pytest.approx(one.cosine["weight"], abs=1e-6)


def test_fidelity_of_a_map_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="loss="):
        gradient_fidelity(torch.tanh, torch.zeros(1, 2), "jfb")
    with pytest.raises(ValueError, match="parameters="):
        gradient_fidelity(torch.tanh, torch.zeros(1, 2), "jfb", loss=torch.sum)


def test_counting_what_backward_keeps_holds_nothing() -> None:
    """An operation that saves its own output, as exp does, does not keep itself alive."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    x = torch.zeros(4, requires_grad=True)
    with SavedTensors() as saved:
        y = x.exp()
    assert saved.bytes == 16
    del x, y  # without a backward pass, which would free what was saved
    assert tensors() == before
    x = torch.zeros(4, requires_grad=True)
    with SavedTensors():
        y = x.exp()
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert slope.tolist() == curvature.tolist() == [1.0] * 4

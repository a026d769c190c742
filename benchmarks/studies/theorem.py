"""The sufficient condition under which a phantom gradient ascends with the exact one.

Geng et al. (2021), Theorem 1: with X = ∂F/∂θ and J = ∂F/∂h at h*, a phantom gradient whose matrix
is A has a non-negative inner product with the exact gradient if ‖A (I − J) − X‖ is at most
σ_min(X)² / σ_max(X). For the Neumann gradient that distance is ‖X B^k‖, B = λJ + (1 − λ)I (in the
transposed layout used there).

`theorem1.py` has the command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqzoo.equilibrium.state import StatePacker
from deqzoo.fidelity.batches import part

_DENSE_ENTRIES = 40_000_000
_ITERATIONS = 12


@dataclass(frozen=True)
class Condition:
    """The condition for one setting.

    Attributes:
        steps, damping: k and λ of the Neumann gradient.
        verdict: "holds", "fails" or "undecided".
        distance: ‖X B^k‖ / σ_max(X); a lower bound where `exact` is False.
        allowed: (σ_min / σ_max)² of X; an upper bound where `exact` is False.
        exact: from the dense matrices; else from bounds, which can only refute.
    """

    steps: int
    damping: float
    verdict: str
    distance: float
    allowed: float
    exact: bool


class Linearization:
    """Products with the transposes of X and J at one sample's equilibrium."""

    def __init__(
        self,
        f: Callable[[Any], Any],
        state: Any,
        parameters: Sequence[Tensor],
        on_product: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_product = on_product
        packer = StatePacker(state)
        self.point = packer.pack(state).detach().requires_grad_()
        self.parameters = list(parameters)
        with torch.enable_grad():
            self.value = packer.pack(f(packer.unpack(self.point)))

    def to_state(self, u: Tensor) -> Tensor:
        """Jᵀu."""
        self.on_product()
        (out,) = torch.autograd.grad(self.value, self.point, u, retain_graph=True)
        return out

    def to_parameters(self, u: Tensor, create_graph: bool = False) -> list[Tensor]:
        """Xᵀu, over the parameters that take part."""
        self.on_product()
        found = torch.autograd.grad(
            self.value, self.parameters, u, retain_graph=True, create_graph=create_graph,
            allow_unused=True,
        )  # fmt: skip
        return [g for g in found if g is not None]

    def gram(self, u: Tensor) -> Tensor:
        """XXᵀu, by differentiating ½‖Xᵀu‖² in u."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            gradients = self.to_parameters(u, create_graph=True)
            half = sum(g.square().sum() for g in gradients) / 2
        (out,) = torch.autograd.grad(half, u)
        return out

    def series(self, u: Tensor, steps: int, damping: float) -> Tensor:
        """(λJᵀ + (1−λ)I)^k u."""
        for _ in range(steps):
            u = damping * self.to_state(u) + (1 - damping) * u
        return u


def check(
    f: Callable[[Any], Any],
    state: Any,
    parameters: Sequence[Tensor],
    settings: Sequence[tuple[int, float]],
    on_product: Callable[[], None] = lambda: None,
) -> list[Condition]:
    """Theorem 1's condition for Neumann gradients on one sample.

    Small problems are decided from the dense matrices. For others σ_min is bounded from above and
    σ_max and the distance from below by iteration, which is enough to refute the condition.

    Args:
        f: the map of a batch of one.
        state: its equilibrium.
        parameters: θ.
        settings: pairs (k, λ).
        on_product: called before every product with a Jacobian; what it raises ends the work.
    """
    linear = Linearization(f, state, parameters, on_product)
    d = linear.point.numel()
    if d * sum(p.numel() for p in parameters) <= _DENSE_ENTRIES:
        return _dense(linear, d, settings)
    return _bounded(linear, settings)


def _dense(linear: Linearization, d: int, settings: Sequence[tuple[int, float]]) -> list[Condition]:
    eye = torch.eye(d, dtype=linear.point.dtype, device=linear.point.device)
    units = [row.view_as(linear.point) for row in eye]
    x = torch.stack([torch.cat([g.flatten() for g in linear.to_parameters(u)]) for u in units])
    j = torch.stack([linear.to_state(u).flatten() for u in units]).double()  # rows Jᵀe_i: J itself
    values, vectors = torch.linalg.eigh((x @ x.T).double())
    largest = float(values[-1].clamp_min(0).sqrt())
    # Below rounding the rank is deficient, and the condition asks for full rank.
    smallest = float(values[0]) if values[0] > 1e-6 * values[-1] else 0.0
    root = vectors * values.clamp_min(0).sqrt()  # root rootᵀ = XXᵀ
    allowed = smallest / max(largest, 1e-30) ** 2
    conditions = []
    for steps, damping in settings:
        b = damping * j + (1 - damping) * torch.eye(d, dtype=j.dtype, device=j.device)
        distance = torch.linalg.matrix_norm(torch.linalg.matrix_power(b, steps) @ root, 2)
        distance = float(distance) / max(largest, 1e-30)
        verdict = "holds" if distance <= allowed else "fails"
        conditions.append(Condition(steps, damping, verdict, distance, allowed, True))
    return conditions


class Bounds:
    """Both sides of the condition by iteration: enough to refute it, not to prove it.

    Args:
        linear: products at the equilibrium.

    Attributes:
        largest: a lower bound of σ_max(X)².
        allowed: an upper bound of (σ_min / σ_max)².
        directions: unit vectors on which a matrix is tried.
    """

    def __init__(self, linear: Linearization) -> None:
        self.linear = linear
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(linear.point.shape, generator=generator).to(linear.point)
        u, self.largest = unit(start), 0.0
        for _ in range(_ITERATIONS):
            u = linear.gram(u)
            self.largest = max(self.largest, float(u.norm()))
            u = unit(u)
        leading = u
        u = unit(start)
        for _ in range(_ITERATIONS):  # towards the smallest singular value
            u = unit(self.largest * u - linear.gram(u))
        self.allowed = _squared(linear.to_parameters(u)) / self.largest
        self.directions = [unit(v) for v in (start, leading, linear.series(start, 4, 1.0))]

    def neumann(self, steps: int, damping: float) -> float:
        """A lower bound of ‖X Bᵏ‖ / σ_max(X), B = λJ + (1 − λ)I."""
        found = (
            _squared(self.linear.to_parameters(self.linear.series(u, steps, damping)))
            for u in self.directions
        )
        return (max(found) / self.largest) ** 0.5


def _bounded(linear: Linearization, settings: Sequence[tuple[int, float]]) -> list[Condition]:
    bounds = Bounds(linear)
    conditions = []
    for steps, damping in settings:
        distance = bounds.neumann(steps, damping)
        verdict = "fails" if distance > bounds.allowed else "undecided"
        conditions.append(Condition(steps, damping, verdict, distance, bounds.allowed, False))
    return conditions


def unit(u: Tensor) -> Tensor:
    """u / ‖u‖."""
    """u / ‖u‖."""
    return u / u.norm().clamp_min(torch.finfo(u.dtype).tiny)


def _squared(gradients: Sequence[Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradients))


def first_sample(batch: Mapping[str, Any], tokens: int = 8) -> dict[str, Any] | None:
    """The smallest part of a batch that is a batch; None for graphs made of one piece."""
    if "x" in batch:
        return None
    single = part(batch, slice(1))
    if "input_ids" in single:
        single |= {name: single[name][:, :tokens] for name in ("input_ids", "labels")}
    return single

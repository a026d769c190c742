"""Phantom gradients (Geng et al., "On Training Implicit Models", NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deqzoo.equilibrium.gradients.base import (
    Gradient,
    Map,
    Problem,
    attach_cotangent,
    recorded_steps,
)
from deqzoo.equilibrium.options import is_count, is_damping, require


@dataclass(frozen=True)
class _Phantom(Gradient):
    """A truncated, damped Neumann series in place of (I − J)⁻¹.

    Args:
        steps: k ≥ 1, terms of the series.
        damping: λ in (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        require(is_count(self.steps), self, "steps", "an int ≥ 1")
        require(is_damping(self.damping), self, "damping", "in (0, 1]")


@dataclass(frozen=True)
class UPG(_Phantom):
    """Unrolled phantom gradient: k damped steps from the detached solution, recorded.

    The value returned is the state after these steps. k graphs of F are kept (or recomputed
    under gradient checkpointing), and any order of differentiation works.
    """

    name: ClassVar[str] = "upg"
    can_checkpoint: ClassVar[bool] = True

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        return recorded_steps(problem, state.detach(), self.steps, self.damping)


@dataclass(frozen=True)
class NPG(_Phantom):
    """Neumann phantom gradient: λ Σ_{t<k} (λJᵀ + (1−λ)I)ᵗ g enters F's backward at h*.

    One graph of F is kept whatever k is. The value returned is h*, so that at an exact
    equilibrium the gradient equals that of `UPG` with the same settings.
    """

    name: ClassVar[str] = "npg"

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        steps, damping = self.steps, self.damping
        return attach_cotangent(problem, state, lambda f, g: neumann_series(f, g, steps, damping))


def neumann_series(product: Map, cotangent: Tensor, steps: int, damping: float) -> Tensor:
    """λ Σ_{t<k} (λJᵀ + (1−λ)I)ᵗ g, from the product v ↦ Jᵀv and g (R, D)."""
    total = cotangent
    for _ in range(steps - 1):
        total = cotangent + damping * product(total) + (1 - damping) * total
    return damping * total


@dataclass(frozen=True)
class JFB(Gradient):
    """Jacobian-free backpropagation (Fung et al. 2022): one recorded step, UPG with k = λ = 1."""

    name: ClassVar[str] = "jfb"

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        return recorded_steps(problem, state.detach(), steps=1, damping=1)

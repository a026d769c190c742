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
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"{self.name}: steps must be an int ≥ 1, got {self.steps!r}")
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ValueError(f"{self.name}: damping must be in (0, 1], got {self.damping!r}")


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

        def series(product: Map, cotangent: Tensor) -> Tensor:
            total = cotangent
            for _ in range(steps - 1):
                total = cotangent + damping * product(total) + (1 - damping) * total
            return damping * total

        return attach_cotangent(problem, state, series)


@dataclass(frozen=True)
class JFB(Gradient):
    """Jacobian-free backpropagation (Fung et al. 2022): one recorded step, UPG with k = λ = 1."""

    name: ClassVar[str] = "jfb"

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        return recorded_steps(problem, state.detach(), steps=1, damping=1)

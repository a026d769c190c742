"""Damped fixed-point (Picard) iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Selection
from deqzoo.equilibrium.solvers.base import Solver, StepRule


@dataclass(frozen=True)
class FixedPointIteration(Solver):
    """h ← h + β (F(h) − h). The stopping residual is that of F, whatever the damping β."""

    name: ClassVar[str] = "fixed_point"
    mixing: ClassVar[tuple[int, None]] = (1, None)

    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        return _Damped(self.damping, layout)


class _Damped(StepRule):
    def __init__(self, damping: float, layout: Layout) -> None:
        self.damping = damping
        self.layout = layout
        self.last: Tensor | None = None

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        # Into the memory of the last one: from 32 MiB on, Linux gives other pages every time.
        reusable = self.last is not None and self.last.shape == z.shape
        self.last = torch.sub(fz, z, out=self.last if reusable else None)
        return self.last

    def propose(
        self,
        z: Tensor,
        fz: Tensor,
        residual: Tensor,
        active: Tensor,
        stalled: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        return damped_step(z, fz, self.damping, scale, self.layout)

    def restart(self, cells: Tensor) -> None:
        pass

    def select(self, layout: Layout, selection: Selection) -> None:
        self.layout = layout


def damped_step(
    z: Tensor, fz: Tensor, damping: float, scale: Tensor | None, layout: Layout
) -> Tensor:
    """Return z + damping · scale · (fz − z); `fz` itself when there is no damping."""
    if scale is not None:
        return torch.lerp(z, fz, layout.spread(damping * scale).unsqueeze(1).to(z.dtype))
    return fz if damping == 1 else torch.lerp(z, fz, damping)

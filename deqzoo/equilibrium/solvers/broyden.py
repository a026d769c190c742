"""Limited-memory good Broyden iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Selection
from deqzoo.equilibrium.options import is_count, require
from deqzoo.equilibrium.solvers.base import Solver, StepRule
from deqzoo.equilibrium.solvers.fixed_point import damped_step


@dataclass(frozen=True)
class Broyden(Solver):
    """Quasi-Newton root finding of r(h) = F(h) − h, without line search (Broyden 1965).

    The inverse Jacobian of r is approximated by H, which starts as −I (so that the first step is a
    fixed-point step) and gains one rank per step. When `memory` steps have been learned from, all
    are forgotten: overwriting single ones would leave pairs that were computed relative to the
    lost one, and diverges.

    Args:
        memory: steps learned from before a restart.
    """

    memory: int = 12

    name: ClassVar[str] = "broyden"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_count(self.memory), self, "memory", "an int ≥ 1")

    def history(self) -> int:
        return min(self.memory, self.max_steps) + 4

    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        return _QuasiNewton(self, matrix, layout)


class _QuasiNewton(StepRule):
    """The steps since the last restart, which are all that H needs.

    With s_j = β p_j, p_j = −H_j r_j, the good Broyden update is H_{j+1} = (I + w_j s_jᵀ) H_j with
    w_j = κ_j (s_{j+1} − (1−β) s_j) and κ_j = 1 / ‖s_j‖² (C. T. Kelley, Iterative Methods for Linear
    and Nonlinear Equations, chapter 7, extended by damping). Hence −H_n r = r + Σ_j w_j c_j, where
    c solves the unit lower triangular system c_j = s_jᵀ r + Σ_{i<j} s_jᵀ w_i c_i: one pass over the
    steps for all inner products, one for the sum, and half the storage of the form −I + U Vᵀ.
    """

    def __init__(self, solver: Broyden, matrix: Tensor, layout: Layout) -> None:
        self.damping = float(solver.damping)
        self.memory = min(solver.memory, solver.max_steps)
        self.layout = layout
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        n_rows, size = matrix.shape
        n_cells = math.prod(layout.cell_shape())
        # The residual is written behind the last step, where the next step will take its place.
        self.steps = matrix.new_empty(n_rows, self.memory + 1, size, dtype=dtype)
        self.inverse = self.steps.new_zeros(n_cells, self.memory, self.memory)
        self.kappa = self.steps.new_zeros(n_cells, self.memory)
        self.rank = 0

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        if self.rank > self.memory:
            self.rank = 0
        return torch.sub(fz, z, out=self.steps[:, self.rank])

    def propose(
        self,
        z: Tensor,
        fz: Tensor,
        residual: Tensor,
        active: Tensor,
        stalled: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        n = self.rank
        self.rank += 1
        if n == 0:
            proposal = damped_step(z, fz, self.damping, scale, self.layout)
            if proposal is not fz:
                torch.sub(proposal, z, out=self.steps[:, 0])
            return proposal
        damping = self.damping if scale is None else self.damping * scale.unsqueeze(1)
        vectors = self.steps[:, : n + 1]
        shares = self.layout.spread(self.learn(n, damping, stalled))
        step = torch.bmm(shares.unsqueeze(1), vectors).squeeze(1)
        self.steps[:, n] = step
        return step.add_(z) if step.dtype == z.dtype else (z + step).to(z.dtype)

    def learn(self, n: int, damping: float | Tensor, stalled: Tensor | None) -> Tensor:
        """Add the pair of the last step; return the shares (C, n + 1) of steps and r in the next.

        `damping` is a number, or one per cell (C, 1).
        """
        # Inner products of the last step and of r, which lie side by side, with everything.
        vectors = self.steps[:, : n + 1]
        dots = self.layout.total(torch.bmm(vectors[:, n - 1 :], vectors.transpose(1, 2)))
        last, current = dots[:, 0, :n], dots[:, 1, :n]
        kappa, inverse = self.kappa[:, :n], self.inverse[:, :n, :n]
        inverse[:, n - 1] = 0
        inverse[:, n - 1, n - 1] = 1
        if n > 1:
            row = last[:, 1:]
            if not isinstance(damping, float) or damping != 1:
                row = row - (1 - damping) * last[:, :-1]
            row = (row * kappa[:, :-1]).unsqueeze(1)
            inverse[:, n - 1, :-1] = torch.bmm(row, inverse[:, :-1, :-1]).squeeze(1)
        c = torch.bmm(inverse, current.unsqueeze(2)).squeeze(2)
        square = last[:, n - 1]
        kappa[:, n - 1] = 1 / square
        shrink = damping * (kappa[:, n - 1 :] * c[:, n - 1 :])
        # A step that would be stretched without bound teaches nothing; nor does one of length 0.
        bad = ~((1 - shrink).abs() > torch.finfo(c.dtype).eps ** 0.5).squeeze(1)
        bad = bad | (square == 0)
        kappa[:, n - 1].masked_fill_(bad, 0)
        if stalled is not None:
            kappa.masked_fill_(stalled.unsqueeze(1), 0)
        shares = torch.zeros_like(dots[:, 1])
        coefficients = torch.where(kappa == 0, 0, kappa * c)
        shares[:, n] = 1
        shares[:, 1:n] = coefficients[:, :-1]
        if not isinstance(damping, float) or damping != 1:
            shares[:, :n] -= (1 - damping) * coefficients
        return shares * (damping / (1 - damping * coefficients[:, n - 1 :]))

    def restart(self, cells: Tensor) -> None:
        # Zeros in the steps too: a share of zero would not silence what is not finite.
        rows = self.layout.spread(cells)
        self.steps.masked_fill_(rows.reshape(-1, 1, 1), 0)
        self.kappa.masked_fill_(cells.unsqueeze(1), 0)
        self.inverse.masked_fill_(cells.reshape(-1, 1, 1), 0)

    def select(self, layout: Layout, selection: Selection) -> None:
        self.layout = layout
        self.steps = self.steps.index_select(0, selection.rows)
        self.kappa = self.kappa[selection.cell_index]
        self.inverse = self.inverse[selection.cell_index]

"""Limited-memory good Broyden iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Selection
from deqzoo.equilibrium.solvers.anderson import row_products
from deqzoo.equilibrium.solvers.base import Solver, StepRule, _is_int, _require
from deqzoo.equilibrium.solvers.fixed_point import damped_step


@dataclass(frozen=True)
class Broyden(Solver):
    """Quasi-Newton root finding of r(h) = F(h) − h, without line search (Broyden 1965).

    The inverse Jacobian of r is approximated by H = −I + U Vᵀ, which starts as −I (so that the
    first step is a fixed-point step) and gains one pair per step. When `memory` pairs are stored
    all are dropped: overwriting single ones would leave pairs that were computed relative to the
    lost one, and diverges.

    Args:
        memory: pairs kept before a restart.
    """

    memory: int = 12

    name: ClassVar[str] = "broyden"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(_is_int(self.memory) and self.memory >= 1, self, "memory", "an int ≥ 1")

    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        return _QuasiNewton(self, matrix, layout)


class _QuasiNewton(StepRule):
    """Pairs U, V (R, L, D) and what the last step left behind."""

    def __init__(self, solver: Broyden, matrix: Tensor, layout: Layout) -> None:
        self.damping = solver.damping
        self.memory = min(solver.memory, solver.max_steps)
        self.layout = layout
        self.dtype = torch.promote_types(matrix.dtype, torch.float32)
        n_rows, size = matrix.shape
        self.left = matrix.new_empty(n_rows, self.memory, size, dtype=self.dtype)
        self.right = torch.empty_like(self.left)
        self.rank = 0
        self.last_z: Tensor | None = None
        self.last_residual: Tensor | None = None
        self.last_products: Tensor | None = None  # Vᵀ r of the last step, (C, rank)
        self.fresh: Tensor | None = None  # (C,) cells whose last step must not be learned from

    def propose(
        self, z: Tensor, fz: Tensor, residual: Tensor, active: Tensor, stalled: Tensor | None
    ) -> Tensor:
        r = residual.to(self.dtype)
        if self.rank == self.memory:
            self.rank, self.last_products = 0, None
        products = self.products(self.right, r)  # Vᵀ r, (C, rank)
        step = r
        if self.last_residual is None:
            self.last_products = products
        else:
            step, products = self.learn(z, r, products)
            self.last_products = products
        self.last_z, self.last_residual = z, r
        if stalled is not None:
            step = torch.where(self.layout.spread(stalled).unsqueeze(1), r, step)
        return damped_step(z, (z + step).to(z.dtype), self.damping)

    def learn(self, z: Tensor, r: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """Add the pair of the last step; return the next step −H r and Vᵀ r of all pairs."""
        assert self.last_z is not None and self.last_residual is not None
        n, total, spread = self.rank, self.layout.total, self.layout.spread
        dz = (z - self.last_z).to(self.dtype)
        dr = r - self.last_residual
        # −H x = x − U Vᵀ x for x = r and x = dr, in one pass over U.
        minus_h_r, minus_h_dr, v = r, dr, -dz
        if n:
            known = self.last_products
            change = products - known if known is not None else self.products(self.right, dr)
            both = spread(torch.stack((products, change), dim=1))  # (R, 2, n)
            corrections = torch.bmm(both, self.left[:, :n])
            minus_h_r = r - corrections[:, 0]
            minus_h_dr = dr - corrections[:, 1]
            weights = spread(self.products(self.left, dz)).unsqueeze(1)
            v = torch.bmm(weights, self.right[:, :n]).squeeze(1) - dz
        denominator = total((v * dr).sum(1))
        size = (total(v.square().sum(1)) * total(dr.square().sum(1))).sqrt()
        ok = denominator.abs() > torch.finfo(self.dtype).eps * size
        if self.fresh is not None:
            ok = ok & ~self.fresh
            self.fresh = None
        ok_rows = spread(ok).unsqueeze(1)
        u = (dz + minus_h_dr) / spread(denominator).unsqueeze(1)
        # Skipped pairs are zero: a guard on the quotient alone would let infinities through.
        u = torch.where(ok_rows, u, 0)
        v = torch.where(ok_rows, v, 0)
        self.left[:, n], self.right[:, n] = u, v
        self.rank = n + 1
        newest = total((v * r).sum(1))
        step = minus_h_r - u * spread(newest).unsqueeze(1)
        return step, torch.cat((products, newest.unsqueeze(1)), dim=1)

    def products(self, factors: Tensor, x: Tensor) -> Tensor:
        """Inner products (C, rank) of x with the stored vectors."""
        return self.layout.total(row_products(factors[:, : self.rank], x))

    def restart(self, cells: Tensor) -> None:
        rows = self.layout.spread(cells).reshape(-1, 1)
        for factors in (self.left, self.right):
            factors.masked_fill_(rows.unsqueeze(2), 0)
        if self.last_z is not None and self.last_residual is not None:
            self.last_z = self.last_z.masked_fill(rows, 0)
            self.last_residual = self.last_residual.masked_fill(rows, 0)
        if self.last_products is not None:
            self.last_products = self.last_products.masked_fill(cells.unsqueeze(1), 0)
        self.fresh = cells if self.fresh is None else self.fresh | cells

    def select(self, layout: Layout, selection: Selection) -> None:
        self.layout = layout
        rows, cells = selection.rows, selection.cell_index
        self.left, self.right = self.left.index_select(0, rows), self.right.index_select(0, rows)
        if self.last_z is not None and self.last_residual is not None:
            self.last_z = self.last_z.index_select(0, rows)
            self.last_residual = self.last_residual.index_select(0, rows)
        if self.last_products is not None:
            self.last_products = self.last_products[cells]
        if self.fresh is not None:
            self.fresh = self.fresh[cells]

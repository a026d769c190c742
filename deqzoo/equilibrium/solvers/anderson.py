"""Anderson acceleration, type II."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Selection
from deqzoo.equilibrium.solvers.base import Solver, StepRule, _is_int, _require
from deqzoo.equilibrium.solvers.fixed_point import damped_step
from deqzoo.equilibrium.solvers.traced import default_ridge

LONG_STEP = 20.0  # of an escape, in residuals
ENOUGH = 0.8  # a residual that falls to this share of the lowest one is no stall


@dataclass(frozen=True)
class Anderson(Solver):
    """Mix the last `window` evaluations so that the mixed residual is smallest.

    With residuals r_j = F(h_j) − h_j the weights minimise ‖Σ α_j r_j‖² under Σ α_j = 1, and
    h ← Σ α_j (h_j + β r_j) (Anderson 1965; Walker & Ni 2011). The normal equations get a ridge
    relative to the mean diagonal of the Gram matrix: an absolute one would turn the mix into a
    plain average as soon as the residual is small, and be slower than no acceleration at all.

    Args:
        window: number of evaluations that are mixed; 1 is the damped fixed-point iteration.
        ridge: Tikhonov term relative to the mean squared residual norm in the window; None takes
            what `default_ridge` says.
        escape: of causal layouts: evaluations in which the residual of a cell that waits for no
            other one has to fall by a fifth. Else the cell takes one long step along its residual
            and forgets what came before. A map that nearly has a second fixed point has a minimum
            of the residual there, which mixing cannot leave and plain steps leave slowly. Cells do
            not fall back to plain steps (`patience`) then. None switches it off.
    """

    window: int = 6
    ridge: float | None = None
    escape: int | None = 3

    name: ClassVar[str] = "anderson"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(_is_int(self.window) and self.window >= 1, self, "window", "an int ≥ 1")
        ok = self.ridge is None or (isinstance(self.ridge, (int, float)) and self.ridge >= 0)
        _require(ok, self, "ridge", "None or a number ≥ 0")
        ok = self.escape is None or (_is_int(self.escape) and self.escape >= 1)
        _require(ok, self, "escape", "None or an int ≥ 1")

    @property
    def mixing(self) -> tuple[int, float | None]:
        return self.window, self.ridge

    def history(self) -> int:
        return 2 * min(self.window, self.max_steps) + 3

    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        return _Mixing(self, matrix, layout)


class _Mixing(StepRule):
    """Window of the last evaluations, in ring order, and their inner products row by row."""

    def __init__(self, solver: Anderson, matrix: Tensor, layout: Layout) -> None:
        self.damping = solver.damping
        self.window = min(solver.window, solver.max_steps)
        self.layout = layout
        self.work_dtype = torch.promote_types(matrix.dtype, torch.float32)
        self.ridge = default_ridge(self.work_dtype) if solver.ridge is None else solver.ridge
        self.step = 0
        n_rows, size = matrix.shape
        self.maps = matrix.new_empty(n_rows, self.window, size)
        self.residuals = matrix.new_empty(n_rows, self.window, size, dtype=self.work_dtype)
        self.gram = matrix.new_zeros(n_rows, self.window, self.window, dtype=self.work_dtype)
        self.ones = self.gram.new_ones(math.prod(layout.cell_shape()), self.window)
        # (C, window) bool, what a cell may mix; None: everything.
        self.valid: Tensor | None = None
        if layout.joins(matrix.device) is not None:
            n_cells = math.prod(layout.cell_shape())
            self.valid = torch.zeros(n_cells, self.window, dtype=torch.bool, device=matrix.device)
        self.stall = None
        if solver.escape is not None and layout.holds_frozen:
            self.stall = _Stall(solver.escape)

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        if self.window == 1:
            return fz - z
        return torch.sub(fz, z, out=self.residuals[:, self.step % self.window])

    def propose(
        self,
        z: Tensor,
        fz: Tensor,
        residual: Tensor,
        active: Tensor,
        stalled: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        if self.window == 1:
            return damped_step(z, fz, self.damping, scale, self.layout)
        slot = self.step % self.window
        self.step += 1
        filled = min(self.step, self.window)
        self.maps[:, slot] = fz
        if self.valid is not None:
            self.valid[:, slot] = active
            on_cpu = active.device.type == "cpu"
            if slot == self.window - 1 and on_cpu and bool((self.valid.all(1) | ~active).all()):
                self.valid = None  # cells that stopped mix nothing any more
        products = row_products(self.residuals[:, :filled], self.residuals[:, slot])
        if self.layout.holds_frozen:  # in the sums of others, what has converged is at rest
            products = torch.where(active.unsqueeze(1), products, 0)
        self.gram[:, slot, :filled] = products
        self.gram[:, :filled, slot] = products
        if filled == 1:
            return damped_step(z, fz, self.damping, scale, self.layout)
        stuck = None
        if self.stall is not None:
            square = self.layout.total(self.gram[:, slot, slot])
            stuck, stalled = self.stall.cells(square, self.layout.leading(active)), None
        weights = self.layout.spread(self.weights(slot, filled, stalled))
        weights = weights.unsqueeze(1)  # (R, 1, n)
        mixed = torch.bmm(weights.to(z.dtype), self.maps[:, :filled]).squeeze(1)
        if self.damping != 1 or scale is not None:
            rest = 1 - self.damping * (1 if scale is None else self.layout.spread(scale))
            shares = weights * (rest.reshape(-1, 1, 1) if isinstance(rest, Tensor) else rest)
            mixed -= torch.bmm(shares, self.residuals[:, :filled]).squeeze(1).to(z.dtype)
        if stuck is not None and (stuck.device.type != "cpu" or bool(stuck.any())):
            rows = self.layout.spread(stuck).unsqueeze(1)
            mixed = torch.where(rows, z + LONG_STEP * residual.to(z.dtype), mixed)
            self.forget(stuck)
        return mixed

    def forget(self, cells: Tensor) -> None:
        """Let cells (C,) mix nothing that was evaluated so far."""
        if self.valid is None:
            self.valid = cells.new_ones(cells.shape[0], self.window)
        self.valid.masked_fill_(cells.unsqueeze(1), False)

    def weights(self, slot: int, filled: int, stalled: Tensor | None) -> Tensor:
        """Solve for the mixing weights (C, n) of every cell."""
        gram = self.layout.gram(self.gram[:, :filled, :filled])
        ones = self.ones[: gram.shape[0], :filled]
        if self.valid is not None:
            # A slot that a cell has forgotten is cut out of its system and gets weight zero.
            valid = self.valid[:, :filled]
            ones = valid.to(gram.dtype)
            gram = gram * (valid.unsqueeze(1) & valid.unsqueeze(2))
            gram.diagonal(dim1=1, dim2=2).add_((~valid).to(gram.dtype) * _mean_diagonal(gram))
        scale = _mean_diagonal(gram)
        system = gram / scale.unsqueeze(2).clamp_min(torch.finfo(gram.dtype).tiny)
        system.diagonal(dim1=1, dim2=2).add_(self.ridge)
        # LAPACK's column order would make the batched mix fall back to a loop over the batch.
        solution = torch.linalg.solve_ex(system, ones).result.contiguous()
        weights = solution / solution.sum(1, keepdim=True)
        usual = stalled is None and weights.device.type == "cpu" and weights.numel() > 0
        if usual and math.isfinite(weights.sum().item()) and scale.min().item() > 0:
            return weights
        # Nothing was measured where squares underflow: not even which of them to take.
        plain = ~torch.isfinite(weights.sum(1)) | (scale.squeeze(1) == 0)
        if stalled is not None:
            plain = plain | stalled
        if plain.device.type == "cpu" and not bool(plain.any()):
            return weights
        latest = torch.zeros_like(weights)
        latest[:, slot] = 1
        return torch.where(plain.unsqueeze(1), latest, weights)

    def restart(self, cells: Tensor) -> None:
        if self.window == 1:
            return
        rows = self.layout.spread(cells)
        # Zeros, since a weight of zero would not silence a history that is not finite.
        for history in (self.maps, self.residuals, self.gram):
            history.masked_fill_(rows.reshape(-1, 1, 1), 0)
        self.forget(cells)

    def select(self, layout: Layout, selection: Selection) -> None:
        rows = selection.rows
        self.maps, self.residuals = (t.index_select(0, rows) for t in (self.maps, self.residuals))
        self.gram = self.layout.kept_gram(self.gram, selection)
        if self.valid is not None:
            self.valid = self.valid[selection.cell_index]
        if self.stall is not None:
            self.stall.select(selection)
        self.layout = layout


class _Stall:
    """Which of the cells that wait for no other one have not got better for a while.

    Args:
        patience: evaluations in which the residual has to fall to `ENOUGH` of its lowest.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.books: tuple[Tensor, Tensor, Tensor] | None = None

    def cells(self, square: Tensor, leading: Tensor) -> Tensor:
        """Those cells (C,), from squared residuals (C,) and which cells wait for no other one."""
        if self.books is None:
            lowest, waited = square, torch.zeros_like(square, dtype=torch.int64)
            led = torch.zeros_like(leading)
        else:
            lowest, waited, led = self.books
        new = leading & ~led
        better = new | (square < ENOUGH**2 * lowest)
        lowest = torch.where(new, square, torch.minimum(square, lowest))
        waited = torch.where(better, 0, waited + 1)
        stuck = leading & (waited >= self.patience)
        self.books = lowest, waited, leading & ~stuck
        return stuck

    def select(self, selection: Selection) -> None:
        """Keep only the selected cells."""
        if self.books is not None:
            lowest, waited, led = (t[selection.cell_index] for t in self.books)
            self.books = lowest, waited, led


def row_products(history: Tensor, x: Tensor) -> Tensor:
    """Inner products (R, n) of the vectors (R, n, D) with x (R, D)."""
    # x on the left: a batched product with a single column on the right is several times slower.
    return torch.bmm(x.unsqueeze(1), history.transpose(1, 2)).squeeze(1)


def _mean_diagonal(gram: Tensor) -> Tensor:
    """Mean of the diagonals of (C, n, n), shape (C, 1)."""
    return gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)

"""Anderson acceleration, type II."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Selection, is_single
from deqzoo.equilibrium.options import is_count, is_number, require
from deqzoo.equilibrium.solvers.base import Solver, StepRule
from deqzoo.equilibrium.solvers.fixed_point import damped_step
from deqzoo.equilibrium.solvers.traced import default_ridge

LONG_STEP = 20.0  # longest step of an escape, in residuals,
LONG_SHARE = 0.2  # and, where the residual is large, as a share of the state
ENOUGH = 0.8  # a residual that falls to this share of the lowest one is no stall
LEAP = 3.0  # above so many times its lowest, a residual gets twice the patience


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
            and forgets what came before; at once where the mix leads back against the residual. A
            map that nearly has a second fixed point has a minimum of the residual there, which
            mixing cannot leave and plain steps leave slowly. Cells do not fall back to plain steps
            (`patience`) then. None switches it off.
    """

    window: int = 6
    ridge: float | None = None
    escape: int | None = 3

    name: ClassVar[str] = "anderson"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_count(self.window), self, "window", "an int ≥ 1")
        ok = self.ridge is None or (is_number(self.ridge) and self.ridge >= 0)
        require(ok, self, "ridge", "None or a number ≥ 0")
        ok = self.escape is None or is_count(self.escape)
        require(ok, self, "escape", "None or an int ≥ 1")

    @property
    def mixing(self) -> tuple[int, float | None]:
        return self.window, self.ridge

    def history(self) -> int:
        return 2 * min(self.window, self.max_steps) + 3

    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        if is_single(layout, matrix):
            return _SingleMixing(self, matrix, layout)
        return _Mixing(self, matrix, layout)


class _Mixing(StepRule):
    """Window of the last evaluations, in ring order, and sums of their inner products by cell."""

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
        n_cells = math.prod(layout.cell_shape())
        self.gram = matrix.new_zeros(n_cells, self.window, self.window, dtype=self.work_dtype)
        self.ridges = self.ridge * torch.eye(
            self.window, dtype=self.work_dtype, device=matrix.device
        )
        self.has_stopped_cells = layout.holds_frozen  # as far as is known
        self.active: Tensor | None = None  # active cells when that was checked
        # (C, window) bool, what a cell may mix; None: everything.
        self.valid: Tensor | None = None
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
        n_filled = min(self.step, self.window)
        self.maps[:, slot] = fz
        if self.valid is not None:
            self.valid[:, slot] = active
            on_cpu = active.device.type == "cpu"
            if slot == self.window - 1 and on_cpu and bool((self.valid.all(1) | ~active).all()):
                self.valid = None  # cells that stopped mix nothing any more
        products = row_products(self.residuals[:, :n_filled], self.residuals[:, slot])
        if self.layout.holds_frozen and active is not self.active:
            self.active = active
            self.has_stopped_cells = active.device.type != "cpu" or not bool(active.all())
        if self.has_stopped_cells:  # in the sums of others, a stopped cell's residual counts as 0
            products = torch.where(active.unsqueeze(1), products, 0)
        sums = self.layout.gram(products)
        self.gram[:, slot, :n_filled] = sums
        self.gram[:, :n_filled, slot] = sums
        if n_filled == 1:
            return damped_step(z, fz, self.damping, scale, self.layout)
        late = False
        if self.stall is not None:
            square, stalled = self.layout.total(products[:, slot]), None
            late = self.stall.enter(square, self.layout.waiting(square))
        weights = self.layout.spread(self.weights(slot, n_filled, stalled))
        weights = weights.unsqueeze(1)  # (R, 1, n)
        mixture = torch.bmm(weights.to(z.dtype), self.maps[:, :n_filled]).squeeze(1)
        if self.damping != 1 or scale is not None:
            rest = 1 - self.damping * (1 if scale is None else self.layout.spread(scale))
            shares = weights * (rest.reshape(-1, 1, 1) if isinstance(rest, Tensor) else rest)
            mixture -= torch.bmm(shares, self.residuals[:, :n_filled]).squeeze(1).to(z.dtype)
        if self.stall is not None and late:
            along = self.layout.total(((mixture - z) * residual).sum(1))
            stuck = self.stall.cells(square, along < 0)
            if stuck is not None:
                rows = self.layout.spread(stuck).unsqueeze(1)
                mixture = torch.where(rows, _long_step(z, fz, residual), mixture)
                self.forget(stuck)
        return mixture

    def forget(self, cells: Tensor) -> None:
        """Let cells (C,) mix nothing that was evaluated so far."""
        if self.valid is None:
            self.valid = cells.new_ones(cells.shape[0], self.window)
        self.valid.masked_fill_(cells.unsqueeze(1), False)

    def weights(self, slot: int, n_filled: int, stalled: Tensor | None) -> Tensor:
        """Solve for the mixing weights (C, n) of every cell."""
        gram = self.gram[:, :n_filled, :n_filled]
        valid = None if self.valid is None else self.valid[:, :n_filled]
        if valid is not None:
            # A slot that a cell has forgotten is cut out of its system and gets weight zero.
            gram = gram * (valid.unsqueeze(1) & valid.unsqueeze(2))
            gram.diagonal(dim1=1, dim2=2).add_((~valid).to(gram.dtype) * _mean_diagonal(gram))
        scale = _mean_diagonal(gram)
        system = torch.addcmul(gram, scale.unsqueeze(2), self.ridges[:n_filled, :n_filled])
        # In the units of the system, whose inverse might leave the dtype's range.
        right = scale.expand(-1, n_filled) if valid is None else scale * valid
        # LAPACK's column order would make the batched mix fall back to a loop over the batch.
        solution = torch.linalg.solve_ex(system, right).result.contiguous()
        weights = solution / solution.sum(1, keepdim=True)
        usual = stalled is None and weights.device.type == "cpu"
        if usual and math.isfinite(weights.sum().item()):
            return weights
        # Where squares underflow, the Gram matrix holds no information for weights.
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
        for history in (self.maps, self.residuals):
            history.masked_fill_(rows.reshape(-1, 1, 1), 0)
        self.gram.masked_fill_(cells.reshape(-1, 1, 1), 0)
        if self.layout.holds_frozen:  # what is not finite reached the sums of later cells, too
            self.gram.nan_to_num_(0.0, 0.0, 0.0)
        self.forget(cells)

    def select(self, layout: Layout, selection: Selection) -> None:
        rows = selection.rows
        self.maps, self.residuals = (t.index_select(0, rows) for t in (self.maps, self.residuals))
        self.gram = self.gram.index_select(0, selection.cell_index)
        if self.valid is not None:
            self.valid = self.valid[selection.cell_index]
        if self.stall is not None:
            self.stall.select(selection)
        self.layout = layout


class _SingleMixing(StepRule):
    """The same for one cell on the CPU: its small system is one of Python's numbers."""

    def __init__(self, solver: Anderson, matrix: Tensor, layout: Layout) -> None:
        self.damping = solver.damping
        self.window = min(solver.window, solver.max_steps)
        self.layout = layout
        self.ridge = default_ridge(matrix.dtype) if solver.ridge is None else solver.ridge
        self.step = 0
        self.maps = matrix.new_empty(self.window, matrix.numel())
        self.residuals = torch.empty_like(self.maps)
        self.gram = [[0.0] * self.window for _ in range(self.window)]
        self.valid = [True] * self.window  # slots that may be mixed
        self.escape = solver.escape if layout.holds_frozen else None
        self.lowest, self.stall_count = math.inf, 0  # of `_Stall`

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        row = self.residuals[self.step % self.window].view(fz.shape)
        return torch.sub(fz, z, out=row)

    def propose(
        self,
        z: Tensor,
        fz: Tensor,
        residual: Tensor,
        active: Tensor,
        stalled: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        slot = self.step % self.window
        self.step += 1
        if self.window == 1:
            return damped_step(z, fz, self.damping, scale, self.layout)
        n_filled = min(self.step, self.window)
        self.maps[slot] = fz.reshape(-1)
        self.valid[slot] = True
        products = torch.mv(self.residuals[:n_filled], self.residuals[slot]).tolist()
        for i, product in enumerate(products):
            self.gram[slot][i] = self.gram[i][slot] = product
        if n_filled == 1:
            return damped_step(z, fz, self.damping, scale, self.layout)
        if self.escape is not None:
            stalled = None
        weights = None
        if stalled is None or not bool(stalled):
            weights = self.weights(n_filled)
        if weights is None:
            weights = [float(i == slot) for i in range(n_filled)]
        shares = z.new_tensor(weights)
        mixture = torch.mv(self.maps[:n_filled].t(), shares)
        damping = self.damping if scale is None else self.damping * float(scale)
        if damping != 1:
            back = torch.mv(self.residuals[:n_filled].t(), shares)
            mixture.sub_(back, alpha=1 - damping)
        mixture = mixture.view(z.shape)
        if self.escape is not None and not self.got_better(products[slot]):
            leapt = products[slot] > LEAP**2 * self.lowest
            late = self.stall_count >= (2 * self.escape if leapt else self.escape)
            if late or ((mixture - z) * residual).sum().item() < 0:
                self.lowest, self.stall_count = math.inf, 0
                self.valid = [False] * self.window
                return _long_step(z, fz, residual)
        return mixture

    def got_better(self, square: float) -> bool:
        """Enter a squared residual; see `_Stall`."""
        better = square < ENOUGH**2 * self.lowest
        self.lowest = min(self.lowest, square)
        self.stall_count = 0 if better else self.stall_count + 1
        return better or not math.isfinite(square)  # where squares overflow, nothing was measured

    def weights(self, n_filled: int) -> list[float] | None:
        """Mixing weights (n) by elimination; None where the system has no solution."""
        slots = [i for i in range(n_filled) if self.valid[i]]
        total = sum(self.gram[i][i] for i in slots)
        # As in `_Mixing`, where the slots that are not valid are cut out of the system.
        scale = total * (2 * n_filled - len(slots)) / n_filled**2
        if not 0 < scale < math.inf:
            return None
        system = [[self.gram[i][j] / scale for j in slots] for i in slots]
        for i, row in enumerate(system):
            row[i] += self.ridge
        solution = _solve(system)
        whole = sum(solution) if solution else 0.0
        if not whole or not math.isfinite(whole):
            return None
        weights = [0.0] * n_filled
        for i, weight in zip(slots, solution or [], strict=True):
            weights[i] = weight / whole
        return weights

    def restart(self, cells: Tensor) -> None:
        # Zeros, since a weight of zero would not silence a history that is not finite.
        self.maps.zero_()
        self.residuals.zero_()
        self.gram = [[0.0] * self.window for _ in range(self.window)]
        self.valid = [False] * self.window

    def select(self, layout: Layout, selection: Selection) -> None:
        self.layout = layout


def _solve(system: list[list[float]]) -> list[float] | None:
    """Solution of a symmetric system with ones on the right; None where a pivot vanishes.

    Rounding may make the last pivot of a nearly singular system negative: the solution is large
    then, and its direction, which is all that matters, still right.
    """
    n = len(system)
    solution = [1.0] * n
    for k, row in enumerate(system):
        if row[k] == 0:
            return None
        for i in range(k + 1, n):
            factor, other = row[i] / row[k], system[i]
            for j in range(i, n):
                other[j] -= factor * row[j]
            solution[i] -= factor * solution[k]
    for k in range(n - 1, -1, -1):
        row = system[k]
        solution[k] = (solution[k] - sum(row[j] * solution[j] for j in range(k + 1, n))) / row[k]
    return solution


class _Stall:
    """Which of the cells that wait for no other one are stuck: their residual has not got better
    for a while, or not now, and mixing turns back.

    Args:
        patience: evaluations in which the residual has to fall to `ENOUGH` of its lowest; twice as
            many where it is far above that, since mixing has left the place then.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        # (C,) what the square has to fall below, infinite where a cell waits for others, and
        # evaluations for which it has not.
        self.books: tuple[Tensor, Tensor] | None = None

    def enter(self, square: Tensor, waiting_cells: Tensor) -> bool:
        """Enter squared residuals (C,), and which cells (C,) wait for others.

        Returns whether any cell may be stuck.
        """
        if self.books is None:
            self.books = torch.full_like(square, math.inf), torch.zeros_like(square)
        enough, count = self.books
        count = (count + 1).masked_fill_(square < enough, 0).masked_fill_(waiting_cells, 0)
        enough = torch.minimum(enough, ENOUGH**2 * square).masked_fill_(waiting_cells, math.inf)
        self.books = enough, count
        return count.device.type != "cpu" or bool(count.any())

    def cells(self, square: Tensor, back: Tensor) -> Tensor | None:
        """Which cells (C,) are stuck, of which `back` (C,) would go against their residual; None:
        none is."""
        assert self.books is not None
        enough, count = self.books
        leapt = ENOUGH**2 * square > LEAP**2 * enough
        late = count >= torch.where(leapt, 2 * self.patience, self.patience)
        stuck = late | (back & (count > 0))
        if stuck.device.type == "cpu" and not bool(stuck.any()):
            return None
        stuck = stuck & square.isfinite()  # where squares overflow, nothing was measured
        enough.masked_fill_(stuck, math.inf)
        return stuck

    def select(self, selection: Selection) -> None:
        """Keep only the selected cells."""
        if self.books is not None:
            enough, count = (t[selection.cell_index] for t in self.books)
            self.books = enough, count


def _long_step(z: Tensor, fz: Tensor, residual: Tensor) -> Tensor:
    """Where rows (R, D) go that leave a minimum of their residual F(z) − z."""
    length = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    size = torch.linalg.vector_norm(fz, dim=1, keepdim=True, dtype=residual.dtype)
    factor = (LONG_SHARE * size / length).clamp(1, LONG_STEP)
    return z + (factor * residual).to(z.dtype)


def row_products(history: Tensor, x: Tensor) -> Tensor:
    """Inner products (R, n) of the vectors (R, n, D) with x (R, D)."""
    # x on the left: a batched product with a single column on the right is several times slower.
    return torch.bmm(x.unsqueeze(1), history.transpose(1, 2)).squeeze(1)


def _mean_diagonal(gram: Tensor) -> Tensor:
    """Mean of the diagonals of (C, n, n), shape (C, 1)."""
    return gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)

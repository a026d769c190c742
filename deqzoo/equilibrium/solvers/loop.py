"""The one loop that every solver shares: stopping, freezing, dropping, result, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Rows, Selection
from deqzoo.equilibrium.solvers.solution import Solution, Status
from deqzoo.equilibrium.state import State, leaves

if TYPE_CHECKING:
    from deqzoo.equilibrium.solvers.base import Solver

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called after evaluation k = 1, 2, … with (k, matrix (R, D), stop-mode residual of the cells)."""


def cell_norm(rows: Tensor, layout: Layout) -> Tensor:
    """Euclidean norms of the cells (C,), in float32 or wider, from rows (R, D)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    if type(layout) is Rows:
        return norm
    return layout.total(norm.square()).sqrt()


class Matrices:
    """A map on states, seen as one on matrices.

    Raises:
        ValueError: (when called) the map returns a state of another shape than its argument's.
    """

    def __init__(self, f: Any, layout: Layout) -> None:
        self.f = f
        self.layout = layout

    def __call__(self, matrix: Tensor) -> Tensor:
        state, cells = self.layout.to_state(matrix), self.layout.cell_shape()
        found = self.f(state)
        out = self.layout.to_matrix(found)
        # Sums with one row in place of many would go through, and a causal layout, which takes its
        # sequences from the state, would have others.
        if out.shape != matrix.shape or self.layout.cell_shape() != cells:
            raise ValueError(
                f"expected tensors of shapes {_shapes(state)}, got {_shapes(found)}: the map must "
                "return a state like its input"
            )
        return out.to(matrix.dtype)

    def select(self, selection: Selection, layout: Layout) -> Matrices:
        return Matrices(self.f.select(selection), layout)


def _shapes(state: State) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in leaves(state)]


@dataclass
class Books:
    """What is known about each cell; every tensor has shape (C,)."""

    residual: Tensor  # of the stop mode, at the iterate that is kept
    abs_residual: Tensor
    rel_residual: Tensor
    status: Tensor
    n_steps: Tensor
    active: Tensor  # still being solved
    broken: Tensor  # non-finite at the last evaluation
    waited: Tensor  # evaluations since the residual was lowest
    lowest: Tensor  # stop-mode residual so far

    @classmethod
    def open(cls, n: int, max_steps: int, like: Tensor) -> Books:
        infinite = like.new_full((n,), math.inf)
        whole = torch.zeros(n, dtype=torch.int64, device=like.device)
        return cls(
            infinite,
            infinite,
            infinite,
            whole + Status.MAX_STEPS,
            whole + max_steps,
            whole == 0,
            whole != 0,
            whole,
            infinite,
        )

    def update(
        self,
        k: int,
        kept: Tensor,
        chosen: Tensor,
        absolute: Tensor,
        rel: Tensor,
        solver: Solver,
        layout: Layout,
    ) -> None:
        self.residual = torch.where(kept, chosen, self.residual)
        self.abs_residual = torch.where(kept, absolute, self.abs_residual)
        self.rel_residual = torch.where(kept, rel, self.rel_residual)
        improved = self.active & (chosen < self.lowest)
        self.lowest = torch.where(improved, chosen, self.lowest)
        self.stop(self.active & (chosen <= solver.tol), Status.CONVERGED, k)
        if solver.patience is not None:
            self.waited = torch.where(improved, 0, self.waited + 1)
            running = self.active & (self.waited < 3 * solver.patience)
            # A cell that others read stays where it stopped, so it waits for those it reads.
            hopeful = layout.worst(running.to(chosen.dtype)) > 0
            self.stop(self.active & ~hopeful, Status.STALLED, k)

    def stop(self, cells: Tensor, status: Status, k: int) -> None:
        self.status = self.status.masked_fill(cells, int(status))
        self.n_steps = self.n_steps.masked_fill(cells, k)
        self.active = self.active & ~cells

    def take(self, cells: Tensor) -> Books:
        return Books(*(getattr(self, f.name)[cells] for f in fields(self)))

    def put(self, cells: Tensor, other: Books) -> None:
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, mine.index_copy(0, cells, theirs))


class Loop:
    """One solve: which part of the batch is left, its books, and where its results are."""

    def __init__(self, solver: Solver, layout: Layout, matrix: Tensor, trace: bool) -> None:
        self.solver = solver
        self.layout = self.whole_layout = layout
        self.rule = solver.start(matrix, layout)
        n_cells = math.prod(layout.cell_shape())
        like = matrix.new_empty(0, dtype=torch.promote_types(matrix.dtype, torch.float32))
        self.books = self.whole_books = Books.open(n_cells, solver.max_steps, like)
        self.cell_index: Tensor | None = None  # of what is left, in the whole batch
        self.row_index: Tensor | None = None
        # The iterate that a cell keeps is its best one. Where cells read each other it is the last
        # finite one: the best of each would belong to different evaluations, with a residual that
        # nobody measured. It is the current iterate (`pending`) or has been copied to `saved`: as
        # long as residuals fall, nothing has to be copied.
        self.saved = self.whole_saved = matrix
        self.owns_saved = False
        self.last = matrix
        self.pending = torch.zeros(n_cells, dtype=torch.bool, device=matrix.device)
        self.scale: Tensor | None = None  # (C,) halved steps of restarted cells
        self.trace: list[Tensor] | None = [] if trace else None
        self.n_evals = self.row_evals = 0
        self.started = time.perf_counter()
        self.on_cpu = matrix.device.type == "cpu"
        self.check_every = solver.check_every or (1 if self.on_cpu else 4)
        self.autocast = torch.is_autocast_enabled(matrix.device.type)
        self.untroubled = self.on_cpu  # every cell has got better at every evaluation

    def run(self, f: Matrices, z: Tensor, compact: bool, callback: StepCallback | None) -> Solution:
        max_steps = self.solver.max_steps
        for k in range(max_steps + 1):
            fz = f(z)
            self.n_evals += 1
            self.row_evals += z.shape[0]
            residual = self.rule.residual(z, fz)
            self.measure(k, z, fz, residual, callback)
            if k == max_steps:
                break
            back = None
            if not self.untroubled and k % self.check_every == 0:
                running, broken = self.look()
                if broken:
                    back = self.recover(k)
                    running = bool(self.books.active.any())
                if not running:
                    break
                if compact and k > 0 and not broken:
                    f, z, fz, residual = self.drop(f, z, fz, residual)
            z = self.advance(z, fz, residual, back)
        return self.finish()

    def measure(
        self, k: int, z: Tensor, fz: Tensor, residual: Tensor, callback: StepCallback | None
    ) -> None:
        """Enter evaluation k, made at iterate z, into the books."""
        books = self.books
        absolute = cell_norm(residual, self.layout)
        relative = absolute / (cell_norm(fz, self.layout) + 1e-9)
        chosen = relative if self.solver.stop_mode == "rel" else absolute
        chosen = self.layout.worst(torch.nan_to_num(chosen, nan=math.inf, posinf=math.inf))
        improved = chosen < books.lowest
        # The usual case before the first cell stops, at a fraction of the operations.
        if self.untroubled:
            self.untroubled = bool((improved & (chosen > self.solver.tol)).all())
        if not self.untroubled:
            books.broken = books.active & (chosen == math.inf)
        if k == 0:
            return
        if self.trace is not None:
            self.trace.append(torch.where(books.active, chosen, books.residual))
        if self.untroubled:
            books.residual, books.abs_residual, books.rel_residual = chosen, absolute, relative
            books.lowest = chosen
            self.pending = improved
        else:
            kept = books.active & (chosen < math.inf if self.layout.holds_frozen else improved)
            self.save(self.pending & ~kept)
            self.pending = kept
            books.update(k, kept, chosen, absolute, relative, self.solver, self.layout)
        self.last = z
        if callback is not None:
            callback(k, z, chosen)

    def save(self, cells: Tensor) -> None:
        """Copy the last iterate of some cells, which are about to move on to a worse one."""
        rows = self.layout.spread(cells)
        if self.on_cpu:
            index = rows.nonzero().squeeze(1)
            if not index.numel():
                return
            self.own_saved()
            self.saved.index_copy_(0, index, self.last.index_select(0, index))
        else:
            self.own_saved()
            torch.where(rows.unsqueeze(1), self.last, self.saved, out=self.saved)

    def own_saved(self) -> None:
        """Stop using the caller's start in place of saved iterates."""
        if not self.owns_saved:
            self.saved = self.whole_saved = self.saved.clone()
            self.owns_saved = True

    def kept(self) -> Tensor:
        """The iterate (R, D) that every cell would return now."""
        return torch.where(self.layout.spread(self.pending).unsqueeze(1), self.last, self.saved)

    def look(self) -> tuple[bool, bool]:
        """Read (any cell active, any broken) from the device in one transfer."""
        running, broken = torch.stack((self.books.active.any(), self.books.broken.any())).tolist()
        return running, broken

    def recover(self, k: int) -> Tensor:
        """Stop broken cells, but send each back once: return the mask of those (C,)."""
        books = self.books
        if self.scale is None:
            self.scale = torch.ones_like(books.residual)
        retry = books.broken & (self.scale == 1) & torch.isfinite(books.residual)
        books.stop(books.broken & ~retry, Status.NONFINITE, k)
        self.scale = self.scale.masked_fill(retry, 0.5)
        return retry

    def advance(self, z: Tensor, fz: Tensor, residual: Tensor, back: Tensor | None) -> Tensor:
        """Return the next iterate; cells in `back` return to the one they keep."""
        books, spread = self.books, self.layout.spread
        stalled = None
        if self.solver.patience is not None:
            stalled = books.waited >= self.solver.patience
        arguments = (z, fz, residual, books.active, stalled, self.scale)
        if self.autocast:
            with torch.autocast(z.device.type, enabled=False):  # the mixing keeps its precision
                proposed = self.rule.propose(*arguments)
        else:
            proposed = self.rule.propose(*arguments)
        if back is not None:
            self.rule.restart(books.broken)
            proposed = torch.where(spread(books.broken).unsqueeze(1), self.kept(), proposed)
        if self.layout.holds_frozen:
            proposed = torch.where(spread(books.active).unsqueeze(1), proposed, self.kept())
        return proposed

    def drop(
        self, f: Matrices, z: Tensor, fz: Tensor, residual: Tensor
    ) -> tuple[Matrices, Tensor, Tensor, Tensor]:
        """Let stopped cells leave where enough of them have stopped."""
        active = self.books.active
        if bool(active.all()):
            return f, z, fz, residual
        chosen = self.layout.select(active, self.kept() if self.layout.holds_frozen else z)
        if chosen is None:
            return f, z, fz, residual
        layout, selection = chosen
        self.own_saved()
        self.file()
        cells, rows = selection.cell_index, selection.rows
        self.cell_index = cells if self.cell_index is None else self.cell_index[cells]
        self.row_index = rows if self.row_index is None else self.row_index[rows]
        self.books = self.books.take(cells)
        self.pending = self.pending[cells]
        self.scale = None if self.scale is None else self.scale[cells]
        self.saved = self.saved.index_select(0, rows)
        self.rule.select(layout, selection)
        self.layout = layout
        z, fz, residual = (t.index_select(0, rows) for t in (z, fz, residual))
        self.last = z
        return f.select(selection, layout), z, fz, residual

    def file(self) -> None:
        """Enter what is left of the batch into the books and iterates of the whole batch."""
        self.save(self.pending)
        if self.cell_index is not None and self.row_index is not None:
            self.whole_books.put(self.cell_index, self.books)
            self.whole_saved.index_copy_(0, self.row_index, self.saved)

    def finish(self) -> Solution:
        self.books.stop(self.books.broken & self.books.active, Status.NONFINITE, self.n_evals - 1)
        if self.on_cpu and not self.owns_saved and bool(self.pending.all()):
            self.whole_saved = self.last.clone()
        else:
            self.own_saved()
            self.file()
        books, shape = self.whole_books, self.whole_layout.cell_shape()
        trace = None
        if self.trace is not None:
            trace = torch.stack(self.trace, dim=-1).reshape(*shape, -1)
        return Solution(
            state=self.whole_layout.to_state(self.whole_saved),
            status=books.status.reshape(shape),
            n_steps=books.n_steps.reshape(shape),
            abs_residual=books.abs_residual.reshape(shape),
            rel_residual=books.rel_residual.reshape(shape),
            residual=books.residual.reshape(shape),
            n_evals=self.n_evals,
            row_evals=self.row_evals,
            seconds=time.perf_counter() - self.started,
            trace=trace,
        )

"""The one loop that every solver shares: stopping, freezing, dropping, result, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Selection
from deqzoo.equilibrium.solvers.solution import Solution, Status

if TYPE_CHECKING:
    from deqzoo.equilibrium.solvers.base import Solver

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called after evaluation k = 1, 2, … with (k, matrix (R, D), stop-mode residual of the cells)."""


def cell_norm(rows: Tensor, layout: Layout) -> Tensor:
    """Euclidean norms of the cells (C,), in float32 or wider, from rows (R, D).

    On the CPU squares may under- or overflow; `scaled_norm` is for such rows.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.device.type != "cpu":  # memory-bound there: the wide range costs nothing
        return scaled_norm(rows, layout).to(wide)
    return layout.norm(rows, wide)


def scaled_norm(rows: Tensor, layout: Layout) -> Tensor:
    """Euclidean norms of the cells (C,) in float64, whatever their size."""
    if rows.dtype != torch.float64:
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return layout.total(norm.square()).sqrt()
    peak = layout.total(row_peaks(rows))
    peak = torch.where(peak > 0, peak, 1)
    norm = torch.linalg.vector_norm(rows / layout.spread(peak).unsqueeze(1), dim=1)
    return layout.total(norm.square()).sqrt() * peak


def row_peaks(rows: Tensor) -> Tensor:
    """Largest modulus (R,) in each row of (R, D)."""
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def quotient(absolute: Tensor, size: Tensor) -> Tensor:
    """Relative residuals: 0 where both norms are 0, finite where only F(h) is 0."""
    return absolute / torch.add(size, absolute, alpha=1e-30).add_(torch.finfo(size.dtype).tiny)


class Residuals(NamedTuple):
    """Residuals of the cells, each (C,): in both measures, and as compared with the tolerance."""

    absolute: Tensor
    relative: Tensor
    stop_residual: Tensor


def residuals(residual: Tensor, fz: Tensor, layout: Layout, solver: Solver) -> Residuals:
    """Measure F(h) − h (R, D) at any scale of the state."""
    absolute, size = scaled_norm(residual, layout), scaled_norm(fz, layout)
    relative = quotient(absolute, size)
    stop_residual = torch.nan_to_num(stop_residuals(absolute, size, layout, solver), nan=math.inf)
    wide = torch.promote_types(fz.dtype, torch.float32)
    measures = (absolute, relative, layout.worst(stop_residual))
    return Residuals(*(each.to(wide) for each in measures))


def stop_residuals(absolute: Tensor, size: Tensor, layout: Layout, solver: Solver) -> Tensor:
    """What a solver compares with its tolerance (C,), from ‖F(h) − h‖ and ‖F(h)‖ of the cells."""
    if solver.criterion == "per sequence":
        absolute, size = layout.whole(absolute), layout.whole(size)
    return quotient(absolute, size) if solver.stop_mode == "rel" else absolute


@lru_cache
def _round_to(value: float, dtype: torch.dtype) -> float:
    """A number rounded to a dtype, as comparisons with its tensors see it."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


@lru_cache
def safe_range(dtype: torch.dtype) -> tuple[float, float]:
    """Norms between which squares neither under- nor overflow."""
    least = torch.finfo(dtype).tiny ** 0.4
    return least, 1 / least


class _Map(Protocol):
    def __call__(self, matrix: Tensor) -> Tensor: ...
    def select(self, selection: Selection, layout: Layout) -> _Map: ...


@dataclass(frozen=True)
class _Scaled:
    """A map on matrices in units of its own, so that squares of states stay in range."""

    f: _Map
    unit: Tensor  # (R, 1), powers of two: nothing is rounded

    def __call__(self, matrix: Tensor) -> Tensor:
        return self.f(matrix * self.unit) / self.unit

    def select(self, selection: Selection, layout: Layout) -> _Scaled:
        return _Scaled(self.f.select(selection, layout), self.unit.index_select(0, selection.rows))


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
    best_at: Tensor  # evaluation at which the residual was lowest
    lowest: Tensor  # stop-mode residual so far

    @classmethod
    def open(cls, n: int, max_steps: int, like: Tensor) -> Books:
        infinite = like.new_full((n,), math.inf)
        zeros = torch.zeros(n, dtype=torch.int64, device=like.device)
        return cls(
            infinite,
            infinite,
            infinite,
            zeros + Status.MAX_STEPS,
            zeros + max_steps,
            zeros == 0,
            zeros != 0,
            zeros,
            infinite,
        )

    def update(
        self, k: int, kept_cells: Tensor | None, improved: Tensor, new_residuals: Residuals
    ) -> None:
        """Enter the residuals of evaluation k for the mask `kept_cells` (C,), or for all."""
        self.lowest = torch.minimum(self.lowest, new_residuals.stop_residual)
        if kept_cells is not None:
            mine = (self.abs_residual, self.rel_residual, self.residual)
            pairs = zip(new_residuals, mine, strict=True)
            new_residuals = Residuals(*(torch.where(kept_cells, new, old) for new, old in pairs))
        self.abs_residual, self.rel_residual, self.residual = new_residuals
        self.best_at = self.best_at.masked_fill(improved, k)

    def stop_stalled(self, k: int, patience: int, layout: Layout) -> None:
        """Stop cells whose residual has not got better for three times the patience."""
        if k < 3 * patience:
            return
        running = self.active & (k - self.best_at < 3 * patience)
        # A cell that others read stays where it stopped, so it waits for those it reads.
        hopeful = layout.worst(running.to(self.lowest.dtype)) > 0
        self.stop(self.active & ~hopeful, Status.STALLED, k)

    def stop(self, cells: Tensor, status: Status, k: int) -> None:
        if cells.device.type == "cpu" and not bool(cells.any()):
            return
        self.status = self.status.masked_fill(cells, int(status))
        self.n_steps = self.n_steps.masked_fill(cells, k)
        self.active = self.active & ~cells

    def select(self, cells: Tensor) -> Books:
        return Books(*(getattr(self, f.name)[cells] for f in fields(self)))

    def scatter(self, cells: Tensor, other: Books) -> None:
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
        # nobody measured. It is the current iterate (`pending`) or has been copied to
        # `saved_iterate`: as long as residuals fall, nothing has to be copied.
        self.saved_iterate = self.whole_saved_iterate = matrix
        self.owns_saved_iterate = False
        self.last = matrix
        self.pending = torch.zeros(n_cells, dtype=torch.bool, device=matrix.device)
        self.none, self.every = self.pending, ~self.pending
        self.scale: Tensor | None = None  # (C,) halved steps of restarted cells
        self.unit: Tensor | None = None  # (C,) of what is left, where states are huge or tiny
        self.whole_unit: Tensor | None = None
        self.least, self.most = safe_range(like.dtype)
        self.tol = _round_to(float(solver.tol), like.dtype)
        self.trace: list[Tensor] | None = [] if trace else None
        self.n_evals = self.row_evals = 0
        self.start_time = time.perf_counter()
        self.on_cpu = matrix.device.type == "cpu"
        self.check_every = solver.check_every or (1 if self.on_cpu else 4)
        self.autocast = torch.is_autocast_enabled(matrix.device.type)
        self.all_active = False  # as far as the last look at the flags showed
        self.last_active: Tensor | None = None  # active cells at the last look,
        self.last_flags = True, True  # and whether all and any were active
        self.undroppable: Tensor | None = None  # active cells when too few had stopped to leave
        self.all_improved = self.on_cpu  # every cell has got better at every evaluation

    def run(
        self,
        f: _Map,
        z: Tensor,
        compact: bool,
        callback: StepCallback | None,
        first: Tensor | None = None,
    ) -> Solution:
        """Solve from a start; `first` is F there if that has been evaluated."""
        last = self.solver.max_steps
        for k in range(last + 1):
            fz = f(z) if k > 0 or first is None else first
            if k == 0 and self.on_cpu:
                f, z, fz = self.choose_unit(f, z, fz)
            self.n_evals += 1
            self.row_evals += z.shape[0]
            residual = self.rule.residual(z, fz)
            self.measure(k, z, fz, residual, callback)
            if k == last:
                break
            back = None
            if not self.all_improved and k % self.check_every == 0:
                running, broken = self.look()
                if broken:
                    back = self.recover(k)
                    running = bool(self.books.active.any())
                if not running:
                    break
                if compact and k > 0 and not broken:
                    f, z, fz, residual = self.drop(f, z, fz, residual)
            z = self.advance(k, z, fz, residual, back)
        return self.finish()

    def measure(
        self, k: int, z: Tensor, fz: Tensor, residual: Tensor, callback: StepCallback | None
    ) -> None:
        """Enter evaluation k, made at iterate z, into the books; that of the start is not kept."""
        own, size = cell_norm(residual, self.layout), cell_norm(fz, self.layout)
        new_residuals = self.plain_residuals(own, size)
        before = self.all_improved
        # The usual case before the first cell stops, at a fraction of the operations.
        self.all_improved = before and self.all_better(new_residuals)
        if self.all_improved:
            self.books.broken = self.none
            if k > 0:
                self.enter_improved(new_residuals)
        else:
            if before and k > 0:
                self.books.best_at = self.books.best_at + (k - 1)
            lowest = self.lowest_ordinary(new_residuals)
            if lowest is None:
                new_residuals = self.careful_residuals(own, size, residual, fz)
                self.books.broken = self.books.active & (new_residuals.stop_residual == math.inf)
            else:
                self.books.broken = self.none
            if k > 0:
                self.enter(k, new_residuals, lowest)
        self.all_active = False  # until the flags are read
        if k > 0:
            self.last = z
            if callback is not None:
                callback(k, self.in_own_units(z), new_residuals.stop_residual)

    def enter_improved(self, new_residuals: Residuals) -> None:
        """Enter residuals that are the lowest of every cell so far."""
        books = self.books
        if self.trace is not None:
            self.trace.append(new_residuals.stop_residual)
        books.abs_residual, books.rel_residual, books.residual = new_residuals
        books.lowest = new_residuals.stop_residual
        self.pending = self.every

    def enter(self, k: int, new_residuals: Residuals, lowest: float | None) -> None:
        """Enter the residuals of evaluation k, and stop cells for which it is the last.

        Args:
            lowest: the least of them, where all are ordinary numbers.
        """
        books, active, stop_residual = self.books, self.books.active, new_residuals.stop_residual
        if self.trace is not None:
            self.trace.append(torch.where(active, stop_residual, books.residual))
        improved = stop_residual < books.lowest
        if not self.layout.holds_frozen:
            kept_cells = improved = active & improved
        elif lowest is None:
            kept_cells = active & (stop_residual < math.inf)
        else:
            kept_cells = active
        if kept_cells is not self.pending:
            self.save(self.pending & ~kept_cells)
        self.pending = kept_cells
        every = self.all_active and kept_cells is active
        books.update(k, None if every else kept_cells, improved, new_residuals)
        if lowest is None or lowest <= self.tol:
            books.stop(books.active & (stop_residual <= self.solver.tol), Status.CONVERGED, k)
        if self.solver.patience is not None:
            books.stop_stalled(k, self.solver.patience, self.layout)

    def in_own_units(self, matrix: Tensor) -> Tensor:
        if self.unit is None:
            return matrix
        return matrix * self.layout.spread(self.unit).unsqueeze(1).to(matrix.dtype)

    def plain_residuals(self, own: Tensor, size: Tensor) -> Residuals:
        """Residuals from norms of the cells (C,), where they are ordinary numbers.

        Where they are not, `all_better` and `lowest_ordinary` say so.
        """
        solver = self.solver
        if self.unit is not None:
            own, size = own * self.unit, size * self.unit
        relative = own / size if solver.stop_mode == "rel" else quotient(own, size)
        if solver.criterion == "per sequence":
            stop_residual = stop_residuals(own, size, self.layout, solver)
        else:
            stop_residual = relative if solver.stop_mode == "rel" else own
        return Residuals(own, relative, self.layout.worst(stop_residual))

    def careful_residuals(
        self, own: Tensor, size: Tensor, residual: Tensor, fz: Tensor
    ) -> Residuals:
        """Residuals where some are not finite, or so small that their squares are not exact."""
        relative = quotient(own, size)
        absolute, stop_residual = self.choose(own, size)
        small = torch.minimum(absolute, relative) < self.least
        odd = small | (stop_residual == math.inf)  # of stopped cells too, on which others depend
        if self.on_cpu and bool((odd & self.books.active).any()):
            exact = scaled_norm(residual, self.layout)
            exact_size = scaled_norm(fz, self.layout)
            relative = torch.where(odd, quotient(exact, exact_size).to(relative), relative)
            own = torch.where(odd, exact.to(own), own)
            size = torch.where(odd, exact_size.to(size), size)
            absolute, stop_residual = self.choose(own, size)
        return Residuals(absolute, relative, stop_residual)

    def choose(self, absolute: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Return absolute residuals in the map's own units, and those compared with `tol`."""
        if self.unit is not None:
            absolute, size = absolute * self.unit, size * self.unit
        stop_residual = stop_residuals(absolute, size, self.layout, self.solver)
        stop_residual = torch.nan_to_num(stop_residual, nan=math.inf, posinf=math.inf)
        return absolute, self.layout.worst(stop_residual)

    def all_better(self, new_residuals: Residuals) -> bool:
        """Whether every cell got better and none meets the tolerance."""
        lowest, stop_residual = self.books.lowest, new_residuals.stop_residual
        if stop_residual.numel() == 1:
            return self.tol < stop_residual.item() < lowest.item()
        better = (stop_residual < lowest) & (stop_residual > self.tol)
        if self.layout.holds_frozen:  # where F(h) overflows, a 0 is hidden by the cells before
            better = better & (new_residuals.relative > 0)
        return bool(better.all())

    def lowest_ordinary(self, new_residuals: Residuals) -> float | None:
        """The least residual, if all are numbers of a size that squares can have; on the CPU."""
        stop_residual = new_residuals.stop_residual
        if not self.on_cpu or not stop_residual.numel():
            return None
        low, high = (end.item() for end in stop_residual.aminmax())
        least = torch.minimum(new_residuals.absolute, new_residuals.relative).min().item()
        return low if high < math.inf and min(low, least) >= self.least else None

    def choose_unit(self, f: _Map, z: Tensor, fz: Tensor) -> tuple[_Map, Tensor, Tensor]:
        """Where squares of a state would leave the dtype's range, go on in other units."""
        size = cell_norm(fz, self.layout)
        if size.numel() and self.least < size.min().item() and size.max().item() < self.most:
            return f, z, fz
        size = torch.maximum(scaled_norm(fz, self.layout), scaled_norm(z, self.layout))
        # A tiny cell may grow to the size of those it reads; others keep their own.
        size = torch.where(size > self.least, size, self.layout.worst(size))
        usual = (size > self.least) & (size < self.most) | (size == 0) | ~size.isfinite()
        if bool(usual.all()):
            return f, z, fz
        bits = torch.finfo(z.dtype).smallest_normal, torch.finfo(z.dtype).max
        exponent = torch.frexp(size.clamp(*bits)).exponent - 1
        unit = torch.ldexp(torch.ones_like(size), exponent).masked_fill(usual, 1)
        self.unit = self.whole_unit = unit.to(self.books.residual)
        rows = self.layout.spread(unit).unsqueeze(1).to(z)
        self.saved_iterate = self.whole_saved_iterate = self.last = z = z / rows
        return _Scaled(f, rows), z, fz / rows

    def save(self, cells: Tensor) -> None:
        """Copy the last iterate of some cells, which are about to move on to a worse one."""
        rows = self.layout.spread(cells)
        if self.on_cpu:
            index = rows.nonzero().squeeze(1)
            if not index.numel():
                return
            self.own_saved_iterate()
            self.saved_iterate.index_copy_(0, index, self.last.index_select(0, index))
        else:
            self.own_saved_iterate()
            torch.where(rows.unsqueeze(1), self.last, self.saved_iterate, out=self.saved_iterate)

    def own_saved_iterate(self) -> None:
        """Stop using the caller's start in place of saved iterates."""
        if not self.owns_saved_iterate:
            self.saved_iterate = self.whole_saved_iterate = self.saved_iterate.clone()
            self.owns_saved_iterate = True

    def kept_iterate(self) -> Tensor:
        """The iterate (R, D) that every cell would return now."""
        return torch.where(
            self.layout.spread(self.pending).unsqueeze(1), self.last, self.saved_iterate
        )

    def look(self) -> tuple[bool, bool]:
        """Read (any cell active, any broken) from the device in one transfer."""
        books = self.books
        if self.on_cpu:
            if books.active is not self.last_active:
                self.last_active = books.active
                self.last_flags = bool(books.active.all()), bool(books.active.any())
            self.all_active, running = self.last_flags
            broken = books.broken is not self.none and bool(books.broken.any())
            return running, broken
        running, broken = torch.stack((books.active.any(), books.broken.any())).tolist()
        return running, broken

    def recover(self, k: int) -> Tensor:
        """Stop broken cells, but send each back once: return the mask of those (C,)."""
        books = self.books
        if self.scale is None:
            self.scale = torch.ones_like(books.residual)
        retry = books.broken & (self.scale == 1) & torch.isfinite(books.residual)
        books.stop(books.broken & ~retry, Status.NONFINITE, k)
        self.all_active = False
        self.scale = self.scale.masked_fill(retry, 0.5)
        return retry

    def advance(
        self, k: int, z: Tensor, fz: Tensor, residual: Tensor, back: Tensor | None
    ) -> Tensor:
        """Return the next iterate; cells in `back` return to the one they keep."""
        books, spread = self.books, self.layout.spread
        stalled, patience = None, self.solver.patience
        if patience is not None and k >= patience and not self.all_improved:
            stalled = k - books.best_at >= patience
        arguments = (z, fz, residual, books.active, stalled, self.scale)
        if self.autocast:
            with torch.autocast(z.device.type, enabled=False):  # the mixing keeps its precision
                proposal = self.rule.propose(*arguments)
        else:
            proposal = self.rule.propose(*arguments)
        if back is not None:
            self.rule.restart(books.broken)
            proposal = torch.where(spread(books.broken).unsqueeze(1), self.kept_iterate(), proposal)
        if self.layout.holds_frozen and not (self.all_improved or self.all_active):
            # A stopped cell stays where it is, unless it broke.
            frozen_iterate = z if books.broken is self.none else self.kept_iterate()
            proposal = torch.where(spread(books.active).unsqueeze(1), proposal, frozen_iterate)
        return proposal

    def drop(
        self, f: _Map, z: Tensor, fz: Tensor, residual: Tensor
    ) -> tuple[_Map, Tensor, Tensor, Tensor]:
        """Let stopped cells leave where enough of them have stopped."""
        active = self.books.active
        if self.all_active or active is self.undroppable or bool(active.all()):
            return f, z, fz, residual
        final = self.in_own_units(self.kept_iterate()) if self.layout.holds_frozen else z
        remainder = self.layout.select(active, final)
        if remainder is None:
            self.undroppable = active
            return f, z, fz, residual
        layout, selection = remainder
        self.own_saved_iterate()
        self.write_back()
        cells, rows = selection.cell_index, selection.rows
        self.cell_index = cells if self.cell_index is None else self.cell_index[cells]
        self.row_index = rows if self.row_index is None else self.row_index[rows]
        self.books = self.books.select(cells)
        self.pending, self.every = self.pending[cells], self.every[cells]
        self.none = ~self.every
        self.scale = None if self.scale is None else self.scale[cells]
        self.unit = None if self.unit is None else self.unit[cells]
        self.saved_iterate = self.saved_iterate.index_select(0, rows)
        self.rule.select(layout, selection)
        self.layout = layout
        z, fz, residual = (t.index_select(0, rows) for t in (z, fz, residual))
        self.last = z
        return f.select(selection, layout), z, fz, residual

    def write_back(self) -> None:
        """Enter what is left of the batch into the books and iterates of the whole batch."""
        self.save(self.pending)
        if self.cell_index is not None and self.row_index is not None:
            self.whole_books.scatter(self.cell_index, self.books)
            self.whole_saved_iterate.index_copy_(0, self.row_index, self.saved_iterate)

    def finish(self) -> Solution:
        self.books.stop(self.books.broken & self.books.active, Status.NONFINITE, self.n_evals - 1)
        if self.on_cpu and not self.owns_saved_iterate and bool(self.pending.all()):
            self.whole_saved_iterate = self.last.clone()
        else:
            self.own_saved_iterate()
            self.write_back()
        books, shape = self.whole_books, self.whole_layout.cell_shape()
        if self.layout is not self.whole_layout:  # what a cell reads may have left before it
            books.residual = self.whole_layout.worst(books.residual)
        self.layout, self.unit = self.whole_layout, self.whole_unit
        trace = None
        if self.trace is not None:
            trace = books.residual.new_empty(*shape, len(self.trace))
            for k, stop_residual in enumerate(self.trace):
                trace[..., k] = stop_residual.reshape(shape)
        return Solution(
            state=self.layout.to_state(self.in_own_units(self.whole_saved_iterate)),
            status=books.status.reshape(shape),
            n_steps=books.n_steps.reshape(shape),
            abs_residual=books.abs_residual.reshape(shape),
            rel_residual=books.rel_residual.reshape(shape),
            residual=books.residual.reshape(shape),
            n_evals=self.n_evals,
            row_evals=self.row_evals,
            seconds=time.perf_counter() - self.start_time,
            trace=trace,
        )

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

    Where squares under- or overflow on the CPU, `scaled_norm` has to be asked.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.device.type != "cpu":  # limited by memory there: range is for nothing
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
    """Residuals of the cells, each (C,): in both measures, and those that decide."""

    absolute: Tensor
    relative: Tensor
    chosen: Tensor


def residuals(residual: Tensor, fz: Tensor, layout: Layout, solver: Solver) -> Residuals:
    """Measure F(h) − h (R, D) at any scale of the state."""
    absolute, size = scaled_norm(residual, layout), scaled_norm(fz, layout)
    relative = quotient(absolute, size)
    chosen = torch.nan_to_num(deciding(absolute, size, layout, solver), nan=math.inf)
    wide = torch.promote_types(fz.dtype, torch.float32)
    found = (absolute, relative, layout.worst(chosen))
    return Residuals(*(each.to(wide) for each in found))


def deciding(absolute: Tensor, size: Tensor, layout: Layout, solver: Solver) -> Tensor:
    """What a solver compares with its tolerance (C,), from ‖F(h) − h‖ and ‖F(h)‖ of the cells."""
    if solver.criterion == "per sequence":
        absolute, size = layout.whole(absolute), layout.whole(size)
    return quotient(absolute, size) if solver.stop_mode == "rel" else absolute


@lru_cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number as tensors of a dtype are compared with it."""
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

    def update(self, k: int, kept: Tensor | None, improved: Tensor, found: Residuals) -> None:
        """Enter the residuals of evaluation k for the cells `kept` (C,), or for all."""
        self.lowest = torch.minimum(self.lowest, found.chosen)
        if kept is not None:
            mine = (self.abs_residual, self.rel_residual, self.residual)
            pairs = zip(found, mine, strict=True)
            found = Residuals(*(torch.where(kept, new, old) for new, old in pairs))
        self.abs_residual, self.rel_residual, self.residual = found
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
        # nobody measured. It is the current iterate (`pending`) or has been copied to `saved`: as
        # long as residuals fall, nothing has to be copied.
        self.saved = self.whole_saved = matrix
        self.owns_saved = False
        self.last = matrix
        self.pending = torch.zeros(n_cells, dtype=torch.bool, device=matrix.device)
        self.none, self.every = self.pending, ~self.pending
        self.scale: Tensor | None = None  # (C,) halved steps of restarted cells
        self.unit: Tensor | None = None  # (C,) of what is left, where states are huge or tiny
        self.whole_unit: Tensor | None = None
        self.least, self.most = safe_range(like.dtype)
        self.tol = _rounded(float(solver.tol), like.dtype)
        self.trace: list[Tensor] | None = [] if trace else None
        self.n_evals = self.row_evals = 0
        self.started = time.perf_counter()
        self.on_cpu = matrix.device.type == "cpu"
        self.check_every = solver.check_every or (1 if self.on_cpu else 4)
        self.autocast = torch.is_autocast_enabled(matrix.device.type)
        self.all_active = False  # known to be, at the last look
        self.looked_at: Tensor | None = None  # what was active then,
        self.looked = True, True  # and whether all were and any was
        self.stays: Tensor | None = None  # what was active when too few had stopped to leave
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
        found = self.plain_residuals(own, size)
        before = self.all_improved
        # The usual case before the first cell stops, at a fraction of the operations.
        self.all_improved = before and self.all_better(found)
        if self.all_improved:
            self.books.broken = self.none
            if k > 0:
                self.enter_improved(found)
        else:
            if before and k > 0:
                self.books.best_at = self.books.best_at + (k - 1)
            lowest = self.lowest_ordinary(found)
            if lowest is None:
                found = self.careful_residuals(own, size, residual, fz)
                self.books.broken = self.books.active & (found.chosen == math.inf)
            else:
                self.books.broken = self.none
            if k > 0:
                self.enter(k, found, lowest)
        self.all_active = False  # until somebody looks
        if k > 0:
            self.last = z
            if callback is not None:
                callback(k, self.in_own_units(z), found.chosen)

    def enter_improved(self, found: Residuals) -> None:
        """Enter residuals that are the lowest of every cell so far."""
        books = self.books
        if self.trace is not None:
            self.trace.append(found.chosen)
        books.abs_residual, books.rel_residual, books.residual = found
        books.lowest = found.chosen
        self.pending = self.every

    def enter(self, k: int, found: Residuals, lowest: float | None) -> None:
        """Enter the residuals of evaluation k, and stop cells for which it is the last.

        Args:
            lowest: the least of them, where all are ordinary numbers.
        """
        books, active, chosen = self.books, self.books.active, found.chosen
        if self.trace is not None:
            self.trace.append(torch.where(active, chosen, books.residual))
        improved = chosen < books.lowest
        if not self.layout.holds_frozen:
            kept = improved = active & improved
        elif lowest is None:
            kept = active & (chosen < math.inf)
        else:
            kept = active
        if kept is not self.pending:
            self.save(self.pending & ~kept)
        self.pending = kept
        every = self.all_active and kept is active
        books.update(k, None if every else kept, improved, found)
        if lowest is None or lowest <= self.tol:
            books.stop(books.active & (chosen <= self.solver.tol), Status.CONVERGED, k)
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
            chosen = deciding(own, size, self.layout, solver)
        else:
            chosen = relative if solver.stop_mode == "rel" else own
        return Residuals(own, relative, self.layout.worst(chosen))

    def careful_residuals(
        self, own: Tensor, size: Tensor, residual: Tensor, fz: Tensor
    ) -> Residuals:
        """Residuals where some are not finite, or so small that their squares are not exact."""
        relative = quotient(own, size)
        absolute, chosen = self.choose(own, size)
        small = torch.minimum(absolute, relative) < self.least
        odd = small | (chosen == math.inf)  # of stopped cells too, which decide about others
        if self.on_cpu and bool((odd & self.books.active).any()):
            exact = scaled_norm(residual, self.layout)
            exact_size = scaled_norm(fz, self.layout)
            relative = torch.where(odd, quotient(exact, exact_size).to(relative), relative)
            own = torch.where(odd, exact.to(own), own)
            size = torch.where(odd, exact_size.to(size), size)
            absolute, chosen = self.choose(own, size)
        return Residuals(absolute, relative, chosen)

    def choose(self, absolute: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Return absolute residuals in the map's own units, and those that decide."""
        if self.unit is not None:
            absolute, size = absolute * self.unit, size * self.unit
        chosen = deciding(absolute, size, self.layout, self.solver)
        chosen = torch.nan_to_num(chosen, nan=math.inf, posinf=math.inf)
        return absolute, self.layout.worst(chosen)

    def all_better(self, found: Residuals) -> bool:
        """Whether every cell got better and none meets the tolerance."""
        lowest, chosen = self.books.lowest, found.chosen
        if chosen.numel() == 1:
            return self.tol < chosen.item() < lowest.item()
        better = (chosen < lowest) & (chosen > self.tol)
        if self.layout.holds_frozen:  # 0 over a norm that overflows hides behind those before it
            better = better & (found.relative > 0)
        return bool(better.all())

    def lowest_ordinary(self, found: Residuals) -> float | None:
        """The least residual, if all are numbers of a size that squares can have; on the CPU."""
        chosen = found.chosen
        if not self.on_cpu or not chosen.numel():
            return None
        low, high = (end.item() for end in chosen.aminmax())
        least = torch.minimum(found.absolute, found.relative).min().item()
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
        self.saved = self.whole_saved = self.last = z = z / rows
        return _Scaled(f, rows), z, fz / rows

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
        books = self.books
        if self.on_cpu:
            if books.active is not self.looked_at:
                self.looked_at = books.active
                self.looked = bool(books.active.all()), bool(books.active.any())
            self.all_active, running = self.looked
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
                proposed = self.rule.propose(*arguments)
        else:
            proposed = self.rule.propose(*arguments)
        if back is not None:
            self.rule.restart(books.broken)
            proposed = torch.where(spread(books.broken).unsqueeze(1), self.kept(), proposed)
        if self.layout.holds_frozen and not (self.all_improved or self.all_active):
            # Who has stopped is where he stays, unless he broke.
            stays = z if books.broken is self.none else self.kept()
            proposed = torch.where(spread(books.active).unsqueeze(1), proposed, stays)
        return proposed

    def drop(
        self, f: _Map, z: Tensor, fz: Tensor, residual: Tensor
    ) -> tuple[_Map, Tensor, Tensor, Tensor]:
        """Let stopped cells leave where enough of them have stopped."""
        active = self.books.active
        if self.all_active or active is self.stays or bool(active.all()):
            return f, z, fz, residual
        final = self.in_own_units(self.kept()) if self.layout.holds_frozen else z
        chosen = self.layout.select(active, final)
        if chosen is None:
            self.stays = active
            return f, z, fz, residual
        layout, selection = chosen
        self.own_saved()
        self.write_back()
        cells, rows = selection.cell_index, selection.rows
        self.cell_index = cells if self.cell_index is None else self.cell_index[cells]
        self.row_index = rows if self.row_index is None else self.row_index[rows]
        self.books = self.books.select(cells)
        self.pending, self.every = self.pending[cells], self.every[cells]
        self.none = ~self.every
        self.scale = None if self.scale is None else self.scale[cells]
        self.unit = None if self.unit is None else self.unit[cells]
        self.saved = self.saved.index_select(0, rows)
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
            self.whole_saved.index_copy_(0, self.row_index, self.saved)

    def finish(self) -> Solution:
        self.books.stop(self.books.broken & self.books.active, Status.NONFINITE, self.n_evals - 1)
        if self.on_cpu and not self.owns_saved and bool(self.pending.all()):
            self.whole_saved = self.last.clone()
        else:
            self.own_saved()
            self.write_back()
        books, shape = self.whole_books, self.whole_layout.cell_shape()
        if self.layout is not self.whole_layout:  # what a cell reads may have left before it
            books.residual = self.whole_layout.worst(books.residual)
        self.layout, self.unit = self.whole_layout, self.whole_unit
        trace = None
        if self.trace is not None:
            trace = books.residual.new_empty(*shape, len(self.trace))
            for k, chosen in enumerate(self.trace):
                trace[..., k] = chosen.reshape(shape)
        return Solution(
            state=self.layout.to_state(self.in_own_units(self.whole_saved)),
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

"""The one loop that every solver shares: stopping, freezing, dropping, best iterate, report."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Rows, Selection
from deqzoo.equilibrium.state import State

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called after evaluation k = 1, 2, … with (k, matrix (R, D), stop-mode residual of the cells)."""


class Status(IntEnum):
    """How the solve of a cell ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    NONFINITE = 3


@dataclass
class BackwardReport:
    """How the adjoint system of an implicit gradient was solved, filled in by the backward pass.

    Attributes:
        residual: relative residual ‖Jᵀw + g − w‖ / ‖Jᵀw + g‖ per cell.
        n_evals: vector-Jacobian products spent.
    """

    residual: Tensor | None = None
    n_evals: int = 0


@dataclass
class Solution:
    """What a solve found. Tensors named below have the layout's cell shape, (B,) by default.

    Attributes:
        state: the result, in the structure of the start.
        status: int64, values of `Status`.
        n_steps: int64, updates of the state until the cell stopped.
        abs_residual: ‖F(h) − h‖ in float32 or wider, at the best iterate.
        rel_residual: the same over ‖F(h)‖.
        residual: the one that the solver's stop mode looks at.
        n_evals: evaluations of F on (what is left of) the batch.
        row_evals: rows that these evaluations processed, all together.
        seconds: wall time of the solve (on a GPU: until the last look at its flags).
        trace: stop-mode residual after each update, shape (*cells, n); a stopped cell repeats its
            last value. None unless asked for.
        samples: intermediate states, where asked for.
        backward: filled by the backward pass of an implicit gradient.
    """

    state: State
    status: Tensor
    n_steps: Tensor
    abs_residual: Tensor
    rel_residual: Tensor
    residual: Tensor
    n_evals: int
    row_evals: int
    seconds: float = 0.0
    trace: Tensor | None = None
    samples: list[State] | None = None
    backward: BackwardReport | None = None

    @property
    def converged(self) -> Tensor:
        """Bool: the residual fell below the tolerance."""
        return self.status == Status.CONVERGED

    @property
    def n_evals_per_sample(self) -> Tensor:
        """Evaluations of F that a cell needed: one per update and one at the start."""
        return self.n_steps + 1


@dataclass(frozen=True)
class Solver(ABC):
    """Settings that every solver has. Subclasses add the rule for one step.

    Args:
        max_steps: updates of the state; at most max_steps + 1 evaluations of F, the last of
            which measures what is returned. The start is never returned.
        tol: a cell has converged when its residual is at most this.
        stop_mode: "rel" tests ‖F(h) − h‖ / (‖F(h)‖ + 1e-9), "abs" tests ‖F(h) − h‖.
        damping: β in h + β (F(h) − h), in (0, 1].
        check_every: evaluations between looks at the stopping flags; None looks at every one on
            the CPU and at every fourth elsewhere, where a look waits for the device. Results do
            not depend on it.
        patience: evaluations without a better residual after which a cell falls back to plain
            steps, and after three times as many stops as stalled. None switches this off.

    Raises:
        ValueError: a setting is out of its range.
    """

    max_steps: int = 30
    tol: float = 1e-3
    stop_mode: Literal["rel", "abs"] = "rel"
    damping: float = 1.0
    check_every: int | None = None
    patience: int | None = None

    name: ClassVar[str]

    def __post_init__(self) -> None:
        _require(_is_int(self.max_steps) and self.max_steps >= 1, self, "max_steps", "an int ≥ 1")
        ok = isinstance(self.tol, (int, float)) and self.tol >= 0 and math.isfinite(self.tol)
        _require(ok, self, "tol", "a number ≥ 0")
        _require(self.stop_mode in ("rel", "abs"), self, "stop_mode", "'rel' or 'abs'")
        ok = isinstance(self.damping, (int, float)) and 0 < self.damping <= 1
        _require(ok, self, "damping", "a number in (0, 1]")
        for field in ("check_every", "patience"):
            value = getattr(self, field)
            ok = value is None or (_is_int(value) and value >= 1)
            _require(ok, self, field, "None or an int ≥ 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON dict; `make_solver` reads it back."""
        return {"name": self.name, **asdict(self)}

    @abstractmethod
    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        """Return the rule's memory for a solve that starts at a matrix (R, D)."""

    @torch.no_grad()
    def solve(
        self,
        f: Callable[[State], State],
        z0: State,
        layout: Layout | None = None,
        compact: bool = False,
        trace: bool = False,
        callback: StepCallback | None = None,
    ) -> Solution:
        """Solve h = f(h) without recording a graph.

        Args:
            f: the map, on states like `z0`. With `compact` it must have `select(selection)`.
            z0: the start.
            layout: what one independent sample is, `Rows()` by default.
            compact: let converged cells leave the batch.
            trace: record the residual after every update; switches `compact` off.
            callback: sees every iterate; switches `compact` off.
        """
        layout = layout or Rows()
        matrix = layout.to_matrix(z0)
        compact = compact and callback is None and not trace
        loop = _Loop(self, layout, matrix, trace)
        return loop.run(_Matrices(f, layout), matrix, compact, callback)


class StepRule(ABC):
    """The memory of one solve and the rule that proposes the next iterate."""

    @abstractmethod
    def propose(
        self, z: Tensor, fz: Tensor, residual: Tensor, active: Tensor, stalled: Tensor | None
    ) -> Tensor:
        """Return the next iterate (R, D): a new tensor, or `fz` itself.

        Args:
            z: current iterate (R, D), not to be modified.
            fz: F(z).
            residual: F(z) − z.
            active: (C,) bool, cells that are still being solved.
            stalled: (C,) bool, cells that must take the plain damped step, or None.
        """

    @abstractmethod
    def restart(self, cells: Tensor) -> None:
        """Forget the history of the cells in a mask (C,), which may hold non-finite values."""

    @abstractmethod
    def select(self, layout: Layout, selection: Selection) -> None:
        """Keep only the selected rows and cells."""


class _Matrices:
    """A map on states, seen as one on matrices."""

    def __init__(self, f: Callable[[State], State], layout: Layout) -> None:
        self.f = f
        self.layout = layout

    def __call__(self, matrix: Tensor) -> Tensor:
        return self.layout.to_matrix(self.f(self.layout.to_state(matrix))).to(matrix.dtype)

    def select(self, selection: Selection, layout: Layout) -> _Matrices:
        return _Matrices(self.f.select(selection), layout)


@dataclass
class _Books:
    """What is known about each cell; every tensor has shape (C,)."""

    residual: Tensor  # of the stop mode, at the best iterate
    abs_residual: Tensor
    rel_residual: Tensor
    status: Tensor
    n_steps: Tensor
    active: Tensor  # still being solved
    broken: Tensor  # non-finite at the last evaluation
    waited: Tensor  # evaluations since the residual last improved

    @classmethod
    def open(cls, n: int, max_steps: int, like: Tensor) -> _Books:
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
        )

    def update(
        self, k: int, improved: Tensor, chosen: Tensor, absolute: Tensor, rel: Tensor, solver: Solver
    ) -> None:
        self.residual = torch.where(improved, chosen, self.residual)
        self.abs_residual = torch.where(improved, absolute, self.abs_residual)
        self.rel_residual = torch.where(improved, rel, self.rel_residual)
        self.stop(self.active & (chosen <= solver.tol), Status.CONVERGED, k)
        if solver.patience is not None:
            self.waited = torch.where(improved, 0, self.waited + 1)
            self.stop(self.active & (self.waited >= 3 * solver.patience), Status.STALLED, k)

    def stop(self, cells: Tensor, status: Status, k: int) -> None:
        self.status = self.status.masked_fill(cells, int(status))
        self.n_steps = self.n_steps.masked_fill(cells, k)
        self.active = self.active & ~cells

    def take(self, cells: Tensor) -> _Books:
        return _Books(*(getattr(self, f.name)[cells] for f in fields(self)))

    def put(self, cells: Tensor, other: _Books) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name).index_copy(0, cells, getattr(other, f.name)))


class _Loop:
    """One solve: which part of the batch is left, its books, and where its best iterates are."""

    def __init__(self, solver: Solver, layout: Layout, matrix: Tensor, trace: bool) -> None:
        self.solver = solver
        self.layout = self.whole_layout = layout
        self.rule = solver.start(matrix, layout)
        self.work_dtype = torch.promote_types(matrix.dtype, torch.float32)
        n_cells = math.prod(layout.cell_shape())
        like = matrix.new_empty(0, dtype=self.work_dtype)
        self.books = self.whole_books = _Books.open(n_cells, solver.max_steps, like)
        self.cell_index: Tensor | None = None  # of what is left, in the whole batch
        self.row_index: Tensor | None = None
        # The best iterate of a cell is its last one (`pending`) or has been copied to `saved`:
        # as long as residuals fall, nothing has to be copied.
        self.saved = self.whole_saved = matrix.clone()
        self.last = matrix
        self.pending = torch.zeros(n_cells, dtype=torch.bool, device=matrix.device)
        self.scale: Tensor | None = None  # (C,) halved steps of restarted cells
        self.trace: list[Tensor] | None = [] if trace else None
        self.n_evals = self.row_evals = 0
        self.started = time.perf_counter()
        self.on_cpu = matrix.device.type == "cpu"
        self.check_every = solver.check_every or (1 if self.on_cpu else 4)

    def run(
        self, f: _Matrices, z: Tensor, compact: bool, callback: StepCallback | None
    ) -> Solution:
        max_steps = self.solver.max_steps
        for k in range(max_steps + 1):
            fz = f(z)
            self.n_evals += 1
            self.row_evals += z.shape[0]
            residual = fz - z
            self.measure(k, z, fz, residual, callback)
            if k == max_steps:
                break
            back = None
            if k % self.check_every == 0:
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
        absolute = self.norm(residual)
        relative = absolute / (self.norm(fz) + 1e-9)
        chosen = relative if self.solver.stop_mode == "rel" else absolute
        chosen = self.layout.worst(torch.where(torch.isfinite(chosen), chosen, math.inf))
        books.broken = books.active & (chosen == math.inf)
        if k == 0:
            return
        if self.trace is not None:
            self.trace.append(torch.where(books.active, chosen, books.residual))
        improved = books.active & (chosen < books.residual)
        self.save(self.pending & ~improved)
        self.pending = improved
        self.last = z
        books.update(k, improved, chosen, absolute, relative, self.solver)
        if callback is not None:
            callback(k, z, chosen)

    def norm(self, rows: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=self.work_dtype)
        if type(self.layout) is Rows:
            return norm
        return self.layout.total(norm.square()).sqrt()

    def save(self, cells: Tensor) -> None:
        """Copy the last iterate of some cells, which are about to move on to a worse one."""
        rows = self.layout.spread(cells)
        if self.on_cpu:
            index = rows.nonzero().squeeze(1)
            if index.numel():
                self.saved.index_copy_(0, index, self.last.index_select(0, index))
        else:
            self.saved.copy_(torch.where(rows.unsqueeze(1), self.last, self.saved))

    def best(self) -> Tensor:
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
        """Return the next iterate; cells in `back` return to their best one."""
        books, spread = self.books, self.layout.spread
        stalled = None
        if self.solver.patience is not None:
            stalled = books.waited >= self.solver.patience
        with torch.autocast(z.device.type, enabled=False):  # the mixing keeps the state's dtype
            proposed = self.rule.propose(z, fz, residual, books.active, stalled)
        if self.scale is not None:
            step = (proposed - z) * spread(self.scale).unsqueeze(1).to(z.dtype)
            proposed = torch.where(spread(self.scale < 1).unsqueeze(1), z + step, proposed)
        if back is not None:
            self.rule.restart(books.broken)
            proposed = torch.where(spread(books.broken).unsqueeze(1), self.best(), proposed)
        if self.layout.holds_frozen:
            proposed = torch.where(spread(books.active).unsqueeze(1), proposed, self.best())
        return proposed

    def drop(
        self, f: _Matrices, z: Tensor, fz: Tensor, residual: Tensor
    ) -> tuple[_Matrices, Tensor, Tensor, Tensor]:
        """Let stopped cells leave where enough of them have stopped."""
        active = self.books.active
        if bool(active.all()):
            return f, z, fz, residual
        chosen = self.layout.select(active, self.best() if self.layout.holds_frozen else z)
        if chosen is None:
            return f, z, fz, residual
        layout, selection = chosen
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(ok: bool, solver: Solver, field: str, wanted: str) -> None:
    if not ok:
        value = getattr(solver, field)
        raise ValueError(f"{solver.name}: {field} must be {wanted}, got {value!r}")

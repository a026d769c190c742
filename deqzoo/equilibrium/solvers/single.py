"""The loop of a solve of one cell on the CPU: its books are Python's numbers.

A picture, a graph or the next token of a text are often solved alone, where an operator of torch
takes longer than what it computes. What comes out is what `Loop` finds, up to rounding.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout
from deqzoo.equilibrium.maps import Matrices
from deqzoo.equilibrium.solvers.loop import Loop, quotient, safe_range, scaled_norm, stop_residuals
from deqzoo.equilibrium.solvers.solution import Solution, Status

if TYPE_CHECKING:
    from deqzoo.equilibrium.solvers.base import Solver


class SingleLoop:
    """One solve of one cell that `Layout.is_one_cell` accepts; books and rules are `Loop`'s."""

    def __init__(self, solver: Solver, layout: Layout, matrix: Tensor) -> None:
        self.start_time = time.perf_counter()
        self.solver = solver
        self.layout = layout
        self.start = matrix
        self.rule = solver.start(matrix, layout)
        self.least, self.most = safe_range(matrix.dtype)
        # The iterate that would be returned now; a copy as soon as others have followed it, since
        # a map may answer in a few buffers of its own in turns.
        self.iterate, self.owns_iterate = matrix, False
        # Of that iterate: absolute and relative residual, and the one compared with `tol`.
        self.residuals = (math.inf, math.inf, math.inf)
        self.lowest = self.stop_residual = math.inf
        self.stall_count = 0
        self.scale: Tensor | None = None
        self.active = True
        self.status, self.n_steps = Status.MAX_STEPS, solver.max_steps

    def run(self, f: Matrices) -> Solution:
        """Solve; states whose squares would leave the dtype's range are left to `Loop`."""
        solver, rule, z = self.solver, self.rule, self.start
        every = torch.ones(1, dtype=torch.bool, device=z.device)
        for k in range(solver.max_steps + 1):
            fz = f(z)
            residual = rule.residual(z, fz)
            if not self.measure(k, z, fz, residual):
                loop = Loop(solver, self.layout, z, trace=False)
                return loop.run(f, z, compact=False, callback=None, first=fz)
            broken = self.stop_residual == math.inf
            if k == solver.max_steps or not (self.goes_back(k) if broken else self.active):
                break
            stalled = None
            if solver.patience is not None and self.stall_count >= solver.patience:
                stalled = every
            z = rule.propose(z, fz, residual, every, stalled, self.scale)
            if broken:
                rule.restart(every)
                z = self.iterate
        if self.active and broken:
            self.stop(Status.NONFINITE, k)
        return self.solution(k + 1)

    def measure(self, k: int, z: Tensor, fz: Tensor, residual: Tensor) -> bool:
        """Enter evaluation k, made at iterate z; False if the first one asks for other units."""
        is_relative = self.solver.stop_mode == "rel"
        absolute = torch.linalg.vector_norm(residual).item()
        size = torch.linalg.vector_norm(fz).item()
        if k == 0 and not self.least < size < self.most:
            return False
        relative = absolute / size if size > 0 else math.nan
        stop_residual = relative if is_relative else absolute
        if not (absolute >= self.least and self.least <= relative < math.inf):
            exact, exact_size = scaled_norm(residual, self.layout), scaled_norm(fz, self.layout)
            own, whole = exact.to(z.dtype), exact_size.to(z.dtype)
            absolute, relative = own.item(), quotient(exact, exact_size).to(z.dtype).item()
            stop_residual = stop_residuals(own, whole, self.layout, self.solver).item()
        self.stop_residual = stop_residual = (
            math.inf if math.isnan(stop_residual) else stop_residual
        )
        if k == 0:
            return True
        improved = stop_residual < self.lowest
        if improved or self.layout.holds_frozen and stop_residual < math.inf:
            self.iterate, self.owns_iterate = z, False
            self.residuals = (absolute, relative, stop_residual)
        elif not self.owns_iterate:
            self.iterate, self.owns_iterate = self.iterate.clone(), True
        self.stall_count += 1
        if improved:
            self.lowest, self.stall_count = stop_residual, 0
        patience = self.solver.patience
        if stop_residual <= self.solver.tol:
            self.stop(Status.CONVERGED, k)
        elif patience is not None and self.stall_count >= 3 * patience:
            self.stop(Status.STALLED, k)
        return True

    def goes_back(self, k: int) -> bool:
        """Whether the cell, no longer finite, tries again from what it keeps, as it may once."""
        if self.scale is not None or self.residuals[2] == math.inf:
            self.stop(Status.NONFINITE, k)
        else:
            self.scale = self.start.new_full((1,), 0.5)
        return self.active

    def stop(self, status: Status, k: int) -> None:
        self.status, self.n_steps, self.active = status, k, False

    def solution(self, n_evals: int) -> Solution:
        shape, like = self.layout.cell_shape(), self.start
        absolute, relative, stop_residual = (
            like.new_full(shape, number) for number in self.residuals
        )
        return Solution(
            state=self.layout.to_state(self.iterate.clone()),
            status=torch.full(shape, int(self.status), device=like.device),
            n_steps=torch.full(shape, self.n_steps, device=like.device),
            abs_residual=absolute,
            rel_residual=relative,
            residual=stop_residual,
            n_evals=n_evals,
            row_evals=n_evals * like.shape[0],
            seconds=time.perf_counter() - self.start_time,
        )

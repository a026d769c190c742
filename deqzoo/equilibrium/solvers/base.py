"""What every solver has: its settings, and the rule for one step."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Causal, Layout, Rows, Selection, begin, is_single
from deqzoo.equilibrium.maps import BatchMap, Matrices, keeps_positions
from deqzoo.equilibrium.options import is_count, is_damping, is_number, require
from deqzoo.equilibrium.solvers.loop import Loop, StepCallback
from deqzoo.equilibrium.solvers.single import SingleLoop
from deqzoo.equilibrium.solvers.solution import Solution, join_parts
from deqzoo.equilibrium.solvers.traced import traced_solution
from deqzoo.equilibrium.state import State
from deqzoo.equilibrium.transforms import batched, no_derivatives, transformed
from deqzoo.equilibrium.uncompiled import uncompiled


@dataclass(frozen=True)
class Solver(ABC):
    """Settings that every solver has. Subclasses add the rule for one step.

    Args:
        max_steps: updates of each cell's state; at most max_steps + 1 evaluations of F, the last
            of which measures what is returned.
            The start comes back only for a cell without any finite evaluation, with status
            NONFINITE; every other cell gets a later iterate.
        tol: a cell has converged when its residual is at most this.
        stop_mode: "rel" tests ‖F(h) − h‖ / ‖F(h)‖, "abs" tests ‖F(h) − h‖.
        damping: β in h + β (F(h) − h), in (0, 1].
        check_every: N, the loop acts on stopped and broken cells only at evaluations 0, N, 2N, …;
            None takes 1 on the CPU and 4 elsewhere, where a look at the flags waits for the
            device. Every evaluation is measured all the same, and a cell stops at the first one
            that meets the tolerance: its state, residual, status and step count do not depend on
            N. But the solve ends, and cells leave a compacted batch, at the next look only, after
            at most N − 1 evaluations that change nothing for stopped cells and count in
            `Solution.n_evals`; and a cell that became non-finite goes back to the iterate it keeps
            (or stops) at the next look too, so that it may lose as many steps.
        criterion: what has to meet the tolerance in a `Causal` layout. "per token": every token
            does, and one that does stops when all before it have. "per sequence": the norms over
            the whole sequence do, and it stops as one; later tokens then decide when earlier ones
            stop, and single tokens may be far above the tolerance. TorchDEQ's solvers stop per
            sequence (all of a batch at once). In other layouts a cell is judged as a whole anyway.
        patience: evaluations without a better residual after which a cell falls back to plain
            steps, and after three times as many stops as stalled. None switches this off.

    Raises:
        ValueError: a setting is out of its range.
    """

    max_steps: int = 30
    tol: float = 1e-3
    stop_mode: Literal["rel", "abs"] = "rel"
    criterion: Literal["per token", "per sequence"] = "per token"
    damping: float = 1.0
    check_every: int | None = None
    patience: int | None = None

    name: ClassVar[str]

    @property
    def mixing(self) -> tuple[int, float | None] | None:
        """(window, ridge) of Anderson's iteration, (1, None) of the plain one, None of others."""
        return None

    def __post_init__(self) -> None:
        require(is_count(self.max_steps), self, "max_steps", "an int ≥ 1")
        require(is_number(self.tol) and self.tol >= 0, self, "tol", "a number ≥ 0")
        require(self.stop_mode in ("rel", "abs"), self, "stop_mode", "'rel' or 'abs'")
        ok = self.criterion in ("per token", "per sequence")
        require(ok, self, "criterion", "'per token' or 'per sequence'")
        require(is_damping(self.damping), self, "damping", "a number in (0, 1]")
        for field in ("check_every", "patience"):
            value = getattr(self, field)
            require(value is None or is_count(value), self, field, "None or an int ≥ 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON dict; `make_solver` reads it back."""
        return {"name": self.name, **asdict(self)}

    def history(self) -> int:
        """How many copies of the state a solve keeps at most, iterate and evaluation included."""
        return 3

    @abstractmethod
    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        """Return the rule's memory for a solve that starts at a matrix (R, D)."""

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
            f: the map, on states like `z0`. With `compact` it must be a `BatchMap`.
            z0: the start.
            layout: what one independent sample is, `Rows()` by default.
            compact: let converged cells leave the batch.
            trace: record the residual after every update; switches `compact` off.
            callback: sees every iterate; switches `compact` off.

        Raises:
            TypeError: `compact` with a map that is no `BatchMap`.
            ValueError: a start that does not fit the layout, or a map whose states have other
                shapes than its start; under torch.export and vmap a solver other than 'anderson'
                and 'fixed_point', or `trace` and `callback`.
        """
        layout = layout or Rows()
        if torch.compiler.is_exporting() or batched(z0):
            if trace or callback is not None:
                raise ValueError(
                    "torch.export and torch.func.vmap show no single steps: leave trace, callback "
                    "and sample_steps out"
                )
            with torch.no_grad():
                return traced_solution(f, z0, self, layout)
        return self._solve(f, z0, layout, compact, trace, callback)

    @uncompiled  # how often the loop turns depends on values; compiling f is up to f
    @no_derivatives()
    def _solve(
        self,
        f: Callable[[State], State],
        z0: State,
        layout: Layout,
        compact: bool,
        trace: bool,
        callback: StepCallback | None,
    ) -> Solution:
        layout, matrix = begin(layout, z0)
        compact = compact and callback is None and not trace
        if compact and not isinstance(f, BatchMap):
            raise TypeError("samples can leave the batch of a `BatchMap` only; set compact=False")
        if compact and isinstance(layout, Causal):
            layout.whole_sequences = not keeps_positions(f)
            if layout.cuts and self.criterion == "per token" and not layout.whole_sequences:
                return self._solve_parts(f, z0, layout)
        matrices = Matrices(f, layout, not transformed())
        needs_loop = callback is not None or trace or (self.check_every or 1) > 1
        if not needs_loop and is_single(layout, matrix):
            return SingleLoop(self, layout, matrix).run(matrices)
        return Loop(self, layout, matrix, trace).run(matrices, matrix, compact, callback)

    def _solve_parts(self, f: Any, z0: Tensor, layout: Causal) -> Solution:
        """Solve the parts of a causal layout one after another."""
        solutions: list[Solution] = []
        solved_prefix = z0[:, :0]
        for start, stop in itertools.pairwise((0, *layout.cuts, z0.shape[1])):
            selection = layout.part(start, stop, solved_prefix)
            part = Causal(None if layout.valid is None else selection.state(layout.valid))
            solutions.append(
                self.solve(f.select(selection), selection.state(z0), part, compact=True)
            )
            solved_prefix = torch.cat((solved_prefix, solutions[-1].state), dim=1)
        return join_parts(solutions)


class StepRule(ABC):
    """The memory of one solve and the rule that proposes the next iterate."""

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """Return F(z) − z (R, D).

        A rule that keeps residuals writes it where it will stay, which saves a copy of the state
        per step; the tensor returned is only read, and only until the next call.
        """
        return fz - z

    @abstractmethod
    def propose(
        self,
        z: Tensor,
        fz: Tensor,
        residual: Tensor,
        active: Tensor,
        stalled: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        """Return the next iterate (R, D): a new tensor, or `fz` itself.

        Args:
            z: current iterate (R, D), not to be modified.
            fz: F(z).
            residual: what `residual(z, fz)` returned, or the selected rows of it.
            active: (C,) bool, cells that are still being solved.
            stalled: (C,) bool, cells that must take the plain damped step, or None.
            scale: (C,) factors on the damping of the cells, or None.
        """

    @abstractmethod
    def restart(self, cells: Tensor) -> None:
        """Forget the history of the cells in a mask (C,), which may hold non-finite values."""

    @abstractmethod
    def select(self, layout: Layout, selection: Selection) -> None:
        """Keep only the selected rows and cells."""

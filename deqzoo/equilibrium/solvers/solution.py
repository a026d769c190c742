"""What a solve reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from deqzoo.equilibrium.state import State


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
        status: int64, values of `Status` per cell.
        n_evals: vector-Jacobian products spent.
    """

    residual: Tensor | None = None
    status: Tensor | None = None
    n_evals: int = 0

    @property
    def converged(self) -> Tensor | None:
        """Bool per cell: the gradient is exact to the adjoint solver's tolerance."""
        return None if self.status is None else self.status == Status.CONVERGED


@dataclass
class Solution:
    """What a solve found. Tensors named below have the layout's cell shape, (B,) by default.

    Attributes:
        state: the result, in the structure of the start.
        status: int64, values of `Status`.
        n_steps: int64, updates of the cell's state until it stopped.
        abs_residual: ‖F(h) − h‖ in float32 or wider, at the iterate in `state`: the best one, or,
            where cells read each other (`Causal`), the last finite one.
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
        return self.status.eq(int(Status.CONVERGED))

    @property
    def n_evals_per_sample(self) -> Tensor:
        """Evaluations of F that a cell needed: one per update and one at the start."""
        return self.n_steps + 1


def join_parts(parts: list[Solution]) -> Solution:
    """The solution of sequences that were solved part by part.

    A position has converged when all before it have; behind one that has not it gets the status of
    that one (the gravest of several).
    """

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=1)

    status = whole("status")
    behind = status.cummax(1).values
    return Solution(
        state=whole("state"),
        status=torch.where(status == int(Status.CONVERGED), behind, status),
        n_steps=whole("n_steps"),
        abs_residual=whole("abs_residual"),
        rel_residual=whole("rel_residual"),
        residual=whole("residual").cummax(1).values,
        n_evals=sum(part.n_evals for part in parts),
        row_evals=sum(part.row_evals for part in parts),
        seconds=sum(part.seconds for part in parts),
    )

"""Exact gradient by the implicit function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deqzoo.equilibrium.gradients.base import (
    FORWARD,
    Cost,
    Gradient,
    Map,
    Problem,
    attach_cotangent,
)
from deqzoo.equilibrium.options import require
from deqzoo.equilibrium.solvers import Solution, Solver, make_solver
from deqzoo.equilibrium.solvers.anderson import Anderson
from deqzoo.equilibrium.solvers.loop import row_peaks
from deqzoo.equilibrium.transforms import batched, has_tangent

_TYPICAL_PRODUCTS = 20
"""Products that an adjoint solve is assumed to spend, fewer if its solver allows fewer."""


@dataclass(frozen=True)
class Implicit(Gradient):
    """∂L/∂θ = wᵀ ∂F/∂θ with w the solution of w = Jᵀw + g, J = ∂F/∂h at h* (Bai et al. 2019).

    The linear system is itself a fixed-point problem and is solved by any solver to its own
    tolerance, relative to g whatever the solver's stop mode. The value returned is h*.

    Args:
        solver: solver of the adjoint system, or its name or settings.
        unsolved: what a backward pass does whose system did not converge, so that its gradient is
            not exact: "warn" (once), "raise" a `RuntimeError`, or "ignore" it. A solver with `tol`
            0 is asked for a number of steps and not for convergence.
    """

    solver: Solver | Mapping[str, Any] | str = field(
        default_factory=lambda: Anderson(max_steps=40, tol=1e-4)
    )

    unsolved: Literal["warn", "raise", "ignore"] = "warn"

    name: ClassVar[str] = "implicit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", make_solver(self.solver))
        ok = self.unsolved in ("warn", "raise", "ignore")
        require(ok, self, "unsolved", "'warn', 'raise' or 'ignore'")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "solver": make_solver(self.solver).to_dict()}

    def cost(
        self,
        max_steps: int,
        *,
        checkpoint: bool = False,
        detached: bool = False,
        products: float | None = None,
    ) -> Cost:
        if products is None:
            products = min(make_solver(self.solver).max_steps, _TYPICAL_PRODUCTS)
        return Cost(products + 3.0 + detached, 1)

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        solver = make_solver(self.solver)

        def solve(product: Map, cotangent: Tensor) -> Tensor:
            if has_tangent(cotangent):
                raise RuntimeError(FORWARD)
            layout = problem.layout.adjoint()
            # The system is linear: solved at scale one, so that an absolute tolerance is relative
            # to g and the result does not depend on the scale of the loss.
            # Sums of a scaled loss's half-precision cotangents would overflow in their own dtype.
            wide = torch.promote_types(cotangent.dtype, torch.float32)
            size = layout.total(row_peaks(cotangent).to(wide))
            size = layout.spread(torch.where(size > 0, size, 1)).unsqueeze(1)
            unit = (cotangent / size).to(cotangent.dtype)
            solution = solver.solve(lambda w: product(w) + unit, unit, layout=layout)
            adjoint = (solution.state * size).to(cotangent.dtype)
            if batched(cotangent):  # its values cannot be read
                return adjoint
            problem.report.residual = solution.rel_residual
            problem.report.status = solution.status
            problem.report.n_evals = solution.n_evals
            if self.unsolved != "ignore" and solver.tol > 0:
                self._complain(solution)
            return adjoint

        return attach_cotangent(problem, state, solve)

    def _complain(self, solution: Solution) -> None:
        n_unsolved = int((~solution.converged).sum())
        if not n_unsolved:
            return
        message = (
            "the adjoint system of an implicit gradient did not converge: the gradient is not "
            "exact. See `solution.backward`; allow its solver more steps or a larger `tol`"
        )
        if self.unsolved == "raise":
            worst = float(solution.rel_residual.max())
            n = solution.status.numel()
            raise RuntimeError(f"{message} ({n_unsolved} of {n} cells, residual up to {worst:.1e})")
        warnings.warn(message, stacklevel=2)  # the same text each time, which is shown once

"""Solvers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deqzoo.equilibrium.options import build
from deqzoo.equilibrium.solvers.anderson import Anderson
from deqzoo.equilibrium.solvers.base import Solver
from deqzoo.equilibrium.solvers.broyden import Broyden
from deqzoo.equilibrium.solvers.fixed_point import FixedPointIteration
from deqzoo.equilibrium.solvers.solution import BackwardReport, Solution, Status

SOLVERS: dict[str, type[Solver]] = {
    cls.name: cls for cls in (FixedPointIteration, Anderson, Broyden)
}


def make_solver(spec: Solver | str | Mapping[str, Any]) -> Solver:
    """Return the solver that a name or a dict ("name" and its settings) describes.

    Raises:
        ValueError: unknown name, unknown option, or a value out of range.
    """
    return spec if isinstance(spec, Solver) else build("solver", SOLVERS, spec)


__all__ = [
    "SOLVERS",
    "Anderson",
    "BackwardReport",
    "Broyden",
    "FixedPointIteration",
    "Solution",
    "Solver",
    "Status",
    "make_solver",
]

"""Solves that begin in bfloat16, where the processor multiplies that several times as fast.

Until the residual is around the rounding of bfloat16, steps in it bring a state as near to the
equilibrium as those in float32. From there the solver begins anew in float32, with the model's own
tolerance: what it reports is measured in float32, and answers meet the same tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from deqzoo.equilibrium import Layout, Solution, Solver, fixed_point
from deqzoo.equilibrium.state import State, leaves, rebuild

COARSE_TOL = 2e-2
"""Relative residual at which float32 takes over; a step in bfloat16 rounds to 4e-3."""
COARSE_SHARE = 1 / 3
"""Share of the solver's steps that the bfloat16 part may take, at most `_MOST_STEPS`: hard samples,
which do not reach `COARSE_TOL`, need the remaining steps in float32."""
_MOST_STEPS = 15
_FEWEST_STEPS = 12


def has_amx() -> bool:
    """Whether this processor multiplies tiles of bfloat16, about seven times as fast as float32."""
    has_tiles = torch.cpu.get_capabilities().get("amx_bf16")
    return bool(has_tiles) and torch.backends.mkldnn.is_available()


@lru_cache(maxsize=1)
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32.

    AVX-512 BF16 without AMX is not enough: training steps of MDEQ have up to 1.5 times the rate of
    float32 on AMD's Zen 5 (`benchmarks/results/training.md`), 0.7 to 0.8 times on an Intel Xeon
    (`training_without_amx.md`).
    """
    capabilities = torch.cpu.get_capabilities()
    by_amd = "AMD" in str(capabilities.get("cpu_name", ""))
    has_units = capabilities.get("avx512_bf16") and by_amd and torch.backends.mkldnn.is_available()
    return has_amx() or bool(has_units)


def can_start_coarsely(solver: Solver) -> bool:
    """Whether these settings solve to a tolerance, with enough steps for a bfloat16 part."""
    return (
        solver.stop_mode == "rel"
        and 0 < solver.tol < COARSE_TOL
        and solver.max_steps >= _FEWEST_STEPS
    )


def solve_from_coarse(
    f: Callable[[State], State],
    coarse: Callable[[State], State],
    z0: State,
    solver: Solver,
    layout: Layout | None = None,
) -> Solution:
    """Solve h = f(h) without gradients, starting from a solution of `coarse`, a less precise f.

    The report is of f; `n_steps` counts the steps of both parts and one for the evaluation that
    the second begins with, so that a solve of n steps still takes n + 1 evaluations. They are at
    most `solver.max_steps`. The result of a sample does not depend on the others.

    Args:
        f: the map.
        coarse: the same in a narrower precision; states keep their dtype.
        z0: start.
        solver: settings for which `can_start_coarsely` holds.
        layout: what one independent sample is.
    """
    share = min(int(COARSE_SHARE * solver.max_steps), _MOST_STEPS)
    first = fixed_point(
        coarse, z0, solver=replace(solver, tol=COARSE_TOL, max_steps=share), layout=layout
    )
    # States are parts of longer rows, which hides their layout; copies of their own keep it.
    start = rebuild(first.state, [t.clone() for t in leaves(first.state)])
    rest = replace(solver, max_steps=solver.max_steps - share - 1)
    second = fixed_point(f, start, solver=rest, layout=layout)
    return replace(
        second,
        n_steps=first.n_steps + 1 + second.n_steps,
        n_evals=first.n_evals + second.n_evals,
        row_evals=first.row_evals + second.row_evals,
        seconds=first.seconds + second.seconds,
    )

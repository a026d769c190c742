"""A solve whose control flow depends on no value: for torch.export and torch.func.vmap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, begin
from deqzoo.equilibrium.maps import Matrices
from deqzoo.equilibrium.solvers.loop import cell_norm, quotient, scaled_norm, stop_residuals
from deqzoo.equilibrium.solvers.solution import Solution, Status
from deqzoo.equilibrium.state import State

if TYPE_CHECKING:
    from deqzoo.equilibrium.solvers.base import Solver


def can_be_traced(solver: Solver) -> bool:
    """Whether the solver's own class defines its mixing: a subclass may take other steps."""
    return "mixing" in vars(type(solver)) and solver.mixing is not None


def traced_solution(
    f: Callable[[State], State], start: State, solver: Solver, layout: Layout
) -> Solution:
    """All steps of a solver without books: what a solve becomes under torch.export and vmap.

    `max_steps` updates and one evaluation that measures the last iterate, which is the result. A
    cell that meets `tol` stays where it is, but goes on being evaluated; none keeps an earlier
    iterate.

    Raises:
        ValueError: a solver other than 'anderson' and 'fixed_point'.
    """
    if not can_be_traced(solver):
        raise ValueError(
            f"solver {solver.name!r} looks at values, which torch.export and torch.func.vmap do "
            "not allow; choose 'anderson' or 'fixed_point'"
        )
    layout, z = begin(layout, start)
    step = Matrices(f, layout, watched=False)
    z = _steps(step, z, solver, layout)
    fz = step(z)
    norm = _norm()
    absolute, size = norm(fz - z, layout), norm(fz, layout)
    stop_residual = layout.worst(stop_residuals(absolute, size, layout, solver))
    stop_residual = torch.nan_to_num(stop_residual, nan=math.inf, posinf=math.inf)
    status = torch.where(stop_residual <= solver.tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(stop_residual == math.inf, int(Status.NONFINITE), status)
    n_evals, shape = solver.max_steps + 1, layout.cell_shape()
    wide = torch.promote_types(z.dtype, torch.float32)
    relative = quotient(absolute, size).to(wide)
    return Solution(
        state=layout.to_state(z),
        status=status.reshape(shape),
        n_steps=torch.full_like(status, solver.max_steps).reshape(shape),
        abs_residual=absolute.to(wide).reshape(shape),
        rel_residual=relative.reshape(shape),
        residual=stop_residual.to(wide).reshape(shape),
        n_evals=n_evals,
        row_evals=n_evals * z.shape[0],
    )


def _steps(f: Callable[[Tensor], Tensor], z: Tensor, solver: Solver, layout: Layout) -> Tensor:
    """Updates on a matrix (R, D), in few operations: each one is a node of a program."""
    maps: list[Tensor] = []
    residuals: list[Tensor] = []
    gram = z.new_zeros(0)  # (C, n, n) of the kept evaluations, oldest first
    assert solver.mixing is not None
    window, ridge = solver.mixing
    window = min(window, solver.max_steps)
    norm = _norm()
    for _ in range(solver.max_steps):
        fz = f(z)
        residual = fz - z
        first = 1 if len(maps) == window else 0
        maps, residuals = [*maps[first:], fz], [*residuals[first:], residual]
        if window > 1:
            history = torch.stack(residuals, 1)
            row = layout.gram(torch.matmul(history, residual.unsqueeze(2)).squeeze(2))
            if len(maps) == 1:
                gram = row.unsqueeze(2)
            else:
                old_gram = gram[:, first:, first:] if first else gram
                old_rows = torch.cat((old_gram, row[:, :-1].unsqueeze(2)), 2)
                gram = torch.cat((old_rows, row.unsqueeze(1)), 1)
        if len(maps) == 1:
            next_z = fz if solver.damping == 1 else torch.lerp(z, fz, solver.damping)
        else:
            weights = layout.spread(solved_weights(gram, ridge)).unsqueeze(1)
            next_z = torch.matmul(weights, torch.stack(maps, 1)).squeeze(1)
            if solver.damping != 1:
                back = torch.matmul(weights, history).squeeze(1)
                next_z = next_z - (1 - solver.damping) * back
        if solver.tol > 0:
            own, size = norm(residual, layout), norm(fz, layout)
            has_converged = layout.worst(stop_residuals(own, size, layout, solver)) <= solver.tol
            next_z = torch.where(layout.spread(has_converged).unsqueeze(1), z, next_z)
        z = next_z
    return z


def _norm() -> Callable[[Tensor, Layout], Tensor]:
    """A norm for states of any scale; the plain one in exported programs, to keep them simple."""
    return cell_norm if torch.compiler.is_exporting() else scaled_norm


def solved_weights(gram: Tensor, ridge: float | None) -> Tensor:
    """Weights (..., n) of n evaluations from their Gram matrices (..., n, n), the newest one last.

    Elimination without pivots, written out: the systems are positive definite by their ridge, and
    a library's batched LU may wait for the device. Where a system has no solution the newest
    evaluation is taken alone.
    """
    n = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = default_ridge(gram.dtype) if ridge is None else ridge
    unit = torch.eye(n, dtype=gram.dtype, device=gram.device)
    system = gram / scale.clamp_min(torch.finfo(gram.dtype).tiny) + ridge * unit
    system = torch.cat((system, torch.ones_like(system[..., :1])), -1)
    for k in range(n):
        row = system[..., k : k + 1, :] / system[..., k : k + 1, k : k + 1]
        # Minus column k of the identity, so that row k itself becomes the quotient.
        system = system - (system[..., k : k + 1] - unit[:, k : k + 1]) * row
    weights = system[..., n]
    weights = weights / weights.sum(-1, keepdim=True)
    is_singular = (scale[..., 0] == 0) | ~torch.isfinite(weights.sum(-1, keepdim=True))
    return torch.where(is_singular, unit[n - 1], weights)


def default_ridge(dtype: torch.dtype) -> float:
    """Ridge of Anderson's systems in a working precision: 5e-6 in float32, 1e-14 in float64.

    Some ulps: less would round away on the diagonal, and a system of exactly dependent residuals
    (h ↦ 1 − h gives two opposite ones) would stay singular.
    """
    return 1e-14 if dtype == torch.float64 else 5e-6

"""The only place where a solver meets a gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deqzoo.equilibrium.gradients import Gradient, Unrolled, make_gradient
from deqzoo.equilibrium.gradients.base import Problem
from deqzoo.equilibrium.layout import Layout, Rows, Selection, start_matrix
from deqzoo.equilibrium.solvers import BackwardReport, Solution, Solver, Status, make_solver
from deqzoo.equilibrium.solvers.loop import Matrices, StepCallback, cell_norm
from deqzoo.equilibrium.state import State, leaves, rebuild

SolverSpec = Solver | str | Mapping[str, Any]
GradientSpec = Gradient | str | Mapping[str, Any]


class BoundMap:
    """A function of (state, *inputs) with its inputs; every input belongs to the batch row-wise."""

    def __init__(self, f: Callable[..., State], inputs: tuple[Any, ...]) -> None:
        self.f = f
        self.inputs = inputs

    def __call__(self, state: State) -> State:
        return self.f(state, *self.inputs)

    def select(self, selection: Selection) -> BoundMap:
        inputs = tuple(
            None if item is None else rebuild(item, [selection.state(t) for t in leaves(item)])
            for item in self.inputs
        )
        f = self.f.select(selection) if hasattr(self.f, "select") else self.f
        return BoundMap(f, inputs)


def fixed_point(
    f: Callable[..., State],
    z0: State,
    *inputs: Any,
    solver: SolverSpec = "anderson",
    gradient: GradientSpec = "implicit",
    layout: Layout | None = None,
    compact: bool | None = None,
    checkpoint: bool = False,
    trace: bool = False,
    callback: StepCallback | None = None,
    sample_steps: Sequence[int] = (),
) -> Solution:
    """Find h* = f(h*, *inputs) and give it the chosen backward pass.

    Gradients reach everything f touches: inputs, parameters, and tensors it closes over; with
    grad mode off only the solve happens. Training and evaluation mode make no difference.

    Args:
        f: the map; returns a state of the same structure and shapes as its first argument.
        z0: start, a tensor or a tuple, list or dict of batch-first floating-point tensors.
        inputs: passed to every call of f.
        solver: a solver, its name, or a dict with "name" and settings.
        gradient: likewise.
        layout: what one independent sample is; `Rows()`, one per batch entry, by default.
        compact: let converged samples leave the batch, so that a batch costs the sum of its
            samples' steps. This needs every input to be batch-first (or None), and f to close
            over nothing that belongs to the batch, unless it offers `select(selection)`, which
            returns f for the samples that are left. None does it when grad mode is off and f
            offers that.
        checkpoint: recompute every recorded step of upg and unrolled in the backward pass, so that
            one graph of f is kept at a time instead of one per step. The other gradients (implicit,
            npg, jfb) record f once and refuse.
        trace: record residuals of every step in `Solution.trace`; with "unrolled" at the cost of
            one more evaluation per step.
        callback: called with (k, matrix, residuals) at every iterate; costs likewise.
        sample_steps: steps whose states are returned in `Solution.samples`, each with its own
            backward pass, for the fixed-point correction loss.

    Returns:
        A `Solution`; its `state` carries the graph.

    Raises:
        ValueError: unknown names or options, states that do not fit, or `checkpoint` with a
            gradient that records f only once.
    """
    chosen_solver, chosen_gradient = make_solver(solver), make_gradient(gradient)
    if checkpoint and not chosen_gradient.can_checkpoint:
        raise ValueError(
            f"gradient {chosen_gradient.name!r} keeps a single graph of the map and needs no "
            "gradient checkpointing; switch it off, or use 'upg' or 'unrolled'"
        )
    layout = layout or Rows()
    bound = f if not inputs else BoundMap(f, inputs)
    if compact is None:
        compact = not torch.is_grad_enabled() and hasattr(bound, "select") and hasattr(f, "select")
    if compact and not hasattr(bound, "select"):
        bound = BoundMap(f, ())
    wants_graph = torch.is_grad_enabled()
    if wants_graph and isinstance(chosen_gradient, Unrolled):
        return _unroll(
            bound,
            z0,
            chosen_solver,
            chosen_gradient,
            layout,
            checkpoint,
            trace,
            callback,
            sample_steps,
        )
    kept: dict[int, Tensor] = {}
    if sample_steps:
        callback = _keeper(kept, sample_steps, callback)
    start = rebuild(z0, [t.detach() for t in leaves(z0)])
    solution = chosen_solver.solve(bound, start, layout, compact, trace, callback)
    if wants_graph and chosen_gradient.needs_solve:
        matrix = layout.to_matrix(solution.state)
        problem = _problem(bound, layout, checkpoint)
        solution.backward = problem.report
        solution.state = layout.to_state(chosen_gradient.attach(problem, matrix))
        kept = {k: chosen_gradient.attach(problem, z) for k, z in kept.items()}
    if sample_steps:
        solution.samples = [layout.to_state(z) for _, z in sorted(kept.items())]
    return solution


def _problem(bound: Callable[[State], State], layout: Layout, checkpoint: bool) -> Problem:
    layout = copy(layout)  # the backward pass may come after the caller's next solve with it
    on_matrices = products = Matrices(bound, layout)
    if hasattr(bound, "detached"):
        products = Matrices(bound.detached(), layout)
    return Problem(on_matrices, products, layout, checkpoint, BackwardReport())


def _unroll(
    bound: Callable[[State], State],
    z0: State,
    solver: Solver,
    gradient: Unrolled,
    layout: Layout,
    checkpoint: bool,
    trace: bool,
    callback: StepCallback | None,
    sample_steps: Sequence[int],
) -> Solution:
    """Run the recorded iteration, then measure its result with one more evaluation of F."""
    started = time.perf_counter()
    steps = gradient.steps or solver.max_steps
    step = replace(gradient, steps=1)
    z = start_matrix(layout, z0)
    problem = _problem(bound, layout, checkpoint)
    residuals, samples = [], []
    for k in range(1, steps + 1):
        z = step.attach(problem, z)
        if k in sample_steps:
            samples.append(layout.to_state(z))
        if not (trace or callback or k == steps):
            continue
        with torch.no_grad():  # the next step evaluates F here again, but records it
            point = z.detach()
            fz = problem.f(point)
            absolute = cell_norm(fz - point, layout)
            relative = absolute / (cell_norm(fz, layout) + 1e-9)
            chosen = layout.worst(relative if solver.stop_mode == "rel" else absolute)
        residuals.append(chosen)
        if callback is not None:
            callback(k, point, chosen)
    shape = layout.cell_shape()
    status = torch.full_like(chosen, int(Status.MAX_STEPS), dtype=torch.int64)
    status = status.masked_fill(chosen <= solver.tol, int(Status.CONVERGED))
    status = status.masked_fill(~chosen.isfinite(), int(Status.NONFINITE))
    n_evals = steps + len(residuals)
    return Solution(
        state=layout.to_state(z),
        status=status.reshape(shape),
        n_steps=torch.full_like(status, steps).reshape(shape),
        abs_residual=absolute.reshape(shape),
        rel_residual=relative.reshape(shape),
        residual=chosen.reshape(shape),
        n_evals=n_evals,
        row_evals=n_evals * z.shape[0],
        seconds=time.perf_counter() - started,
        trace=torch.stack(residuals, dim=-1).reshape(*shape, -1) if trace else None,
        samples=samples if sample_steps else None,
    )


def _keeper(
    kept: dict[int, Tensor], steps: Sequence[int], callback: StepCallback | None
) -> StepCallback:
    def keep(k: int, matrix: Tensor, residual: Tensor) -> None:
        if k in steps:
            kept[k] = matrix
        if callback is not None:
            callback(k, matrix, residual)

    return keep


class Equilibrium(nn.Module):
    """A layer whose output is the fixed point of a module: z ↦ f(z, *inputs).

    Args:
        f: the map, called as f(state, *inputs).
        solver: solver, name or settings; see `fixed_point`.
        gradient: gradient, name or settings.
    """

    def __init__(
        self,
        f: Callable[..., State],
        solver: SolverSpec = "anderson",
        gradient: GradientSpec = "implicit",
    ) -> None:
        super().__init__()
        self.f = f
        self.solver = make_solver(solver)
        self.gradient = make_gradient(gradient)

    def forward(self, z0: State, *inputs: Any, **options: Any) -> Solution:
        """Solve from z0; `options` are those of `fixed_point` and override the layer's own."""
        options = {"solver": self.solver, "gradient": self.gradient, **options}
        return fixed_point(self.f, z0, *inputs, **options)

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"

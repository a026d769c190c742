"""Fixed points: a solver for the forward pass, a gradient for the backward pass."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deqzoo.equilibrium.gradients import Gradient, make_gradient
from deqzoo.equilibrium.gradients.base import Problem
from deqzoo.equilibrium.layout import Causal, Layout, Rows, begin
from deqzoo.equilibrium.maps import (
    BatchMap,
    BoundMap,
    DetachableMap,
    Matrices,
    keeps_positions,
)
from deqzoo.equilibrium.solvers import BackwardReport, Solution, Solver, Status, make_solver
from deqzoo.equilibrium.solvers.loop import Residuals, StepCallback, residuals
from deqzoo.equilibrium.state import State, leaves, rebuild
from deqzoo.equilibrium.transforms import forward_mode, no_derivatives, transformed, under_grad

SolverSpec = Solver | str | Mapping[str, Any]
GradientSpec = Gradient | str | Mapping[str, Any]


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
    grad mode off only the solve happens. Training and evaluation mode make no difference. Under
    torch.export a solve becomes all `max_steps` steps of its solver; see `traced_solution`.
    Under torch.func.vmap too, where nothing can depend on values; a cell that meets `tol` stays
    where it is. grad, vjp and jacrev of torch.func differentiate through every gradient; with
    implicit and npg once, and under vmap where they stand inside: vmap(grad(...)). Forward mode
    (jvp, jacfwd, hessian, forward_ad) goes through upg, jfb and unrolled.

    Args:
        f: the map; returns a state of the same structure and shapes as its first argument.
        z0: start, a tensor or a tuple, list or dict of batch-first floating-point tensors.
        inputs: passed to every call of f.
        solver: a solver, its name, or a dict with "name" and settings.
        gradient: likewise.
        layout: what one independent sample is; `Rows()`, one per batch entry, by default.
        compact: let converged samples leave the batch, so that a batch costs the sum of its
            samples' steps. This needs every input to be batch-first (or None), and f to close
            over nothing that belongs to the batch, unless it is a `BatchMap`, which returns f for
            the samples that are left. None does it when grad mode is off and f is one.
        checkpoint: recompute every recorded step of upg and unrolled in the backward pass, so that
            one graph of f is kept at a time instead of one per step. The other gradients (implicit,
            npg, jfb) record f once and refuse.
        trace: record residuals of every step in `Solution.trace`; with "unrolled" at the cost of
            one more evaluation per step.
        callback: called with (k, matrix, residuals) at every iterate; costs likewise.
        sample_steps: steps, ascending, whose states are returned in `Solution.samples`, each with
            its own backward pass, for the fixed-point correction loss. A solve that ends before
            some of them returns fewer.

    Returns:
        A `Solution`; its `state` carries the graph.

    Raises:
        ValueError: unknown names or options, states that do not fit, inputs that are not
            batch-first with `compact`, sample steps below 1 or not ascending, or `checkpoint` with
            a gradient that records f only once, or under grad, vjp or jacrev of torch.func.
    """
    chosen_solver, chosen_gradient = make_solver(solver), make_gradient(gradient)
    if checkpoint and not chosen_gradient.can_checkpoint:
        raise ValueError(
            f"gradient {chosen_gradient.name!r} keeps a single graph of the map and needs no "
            "gradient checkpointing; switch it off, or use 'upg' or 'unrolled'"
        )
    if checkpoint and under_grad():
        raise ValueError(
            "torch.func.grad, vjp and jacrev cannot recompute steps; leave checkpoint out"
        )
    layout = layout or Rows()
    if compact is None:
        compact = not torch.is_grad_enabled() and isinstance(f, BatchMap)
    if compact and inputs:
        _check_batch_first(
            inputs, z0, 2 if isinstance(layout, Causal) and keeps_positions(f) else 1
        )
    _check_steps(sample_steps)
    is_differentiated = torch.is_grad_enabled() or forward_mode()
    needs_binding = inputs or (compact and not isinstance(f, BatchMap))
    bound = BoundMap(f, inputs) if needs_binding else f
    if is_differentiated and not chosen_gradient.needs_solve:
        return _attach_to_start(
            bound, z0, chosen_solver, chosen_gradient, layout, checkpoint, trace, callback,
            sample_steps,
        )  # fmt: skip
    if torch.compiler.is_exporting():  # programs are for inference
        return chosen_solver.solve(bound, z0, layout)
    sample_states: dict[int, Tensor] = {}
    if sample_steps:
        callback = _keeper(sample_states, sample_steps, callback)
    start = rebuild(z0, [t.detach() for t in leaves(z0)])
    solution = chosen_solver.solve(bound, start, layout, compact, trace, callback)
    if not is_differentiated and not sample_steps:
        return solution
    layout, matrix = begin(layout, solution.state)
    if is_differentiated:
        recorded_map = Matrices(bound, layout, watched=not transformed())
        problem = _problem(recorded_map, checkpoint, chosen_solver.max_steps)
        solution.backward = problem.report
        solution.state = layout.to_state(chosen_gradient.attach(problem, matrix))
        sample_states = {k: chosen_gradient.attach(problem, z) for k, z in sample_states.items()}
    if sample_steps:
        solution.samples = [layout.to_state(z) for _, z in sorted(sample_states.items())]
    return solution


def _problem(
    f: Matrices,
    checkpoint: bool,
    max_steps: int,
    visit: Callable[[int, Tensor], None] | None = None,
) -> Problem:
    products = f
    if isinstance(f.f, DetachableMap):
        products = Matrices(f.f.detached(), f.layout, f.watched)
    return Problem(f, products, f.layout, checkpoint, BackwardReport(), max_steps, visit)


def _attach_to_start(
    bound: Callable[[State], State],
    z0: State,
    solver: Solver,
    gradient: Gradient,
    layout: Layout,
    checkpoint: bool,
    trace: bool,
    callback: StepCallback | None,
    sample_steps: Sequence[int],
) -> Solution:
    """Let a gradient that needs no solve make the state, and measure it with one evaluation."""
    start_time = time.perf_counter()
    layout, start = begin(layout, z0)
    visible = not transformed()
    recorded_map, measured_map = (Matrices(bound, layout, visible) for _ in range(2))
    measurements: list[Residuals] = []
    samples = []
    latest: weakref.ref[Tensor] | None = None  # what was measured last

    def measure(z: Tensor) -> Tensor:
        nonlocal latest
        point, latest = z.detach(), weakref.ref(z)
        with no_derivatives():
            fz = measured_map(point)  # the next step evaluates F here again, but records it
            measurements.append(residuals(fz - point, fz, layout, solver))
        return measurements[-1].stop_residual

    def visit(k: int, z: Tensor) -> None:
        if k in sample_steps:
            samples.append(layout.to_state(z))
        if trace or callback:
            stop_residual = measure(z)
            if callback is not None:
                callback(k, z.detach(), stop_residual)

    problem = _problem(recorded_map, checkpoint, solver.max_steps, visit)
    z = gradient.attach(problem, start)
    n_steps = recorded_map.n_calls
    if latest is None or latest() is not z:
        measure(z)
    absolute, relative, stop_residual = measurements[-1]
    shape = layout.cell_shape()
    status = torch.full_like(stop_residual, int(Status.MAX_STEPS), dtype=torch.int64)
    status = status.masked_fill(stop_residual <= solver.tol, int(Status.CONVERGED))
    status = status.masked_fill(stop_residual == math.inf, int(Status.NONFINITE))
    history = [entry.stop_residual for entry in measurements]
    n_evals = n_steps + measured_map.n_calls
    return Solution(
        state=layout.to_state(z),
        status=status.reshape(shape),
        n_steps=torch.full_like(status, n_steps).reshape(shape),
        abs_residual=absolute.reshape(shape),
        rel_residual=relative.reshape(shape),
        residual=stop_residual.reshape(shape),
        n_evals=n_evals,
        row_evals=n_evals * z.shape[0],
        seconds=time.perf_counter() - start_time,
        trace=torch.stack(history, dim=-1).reshape(*shape, len(history)) if trace else None,
        samples=samples if sample_steps else None,
        backward=problem.report,
    )


def _check_batch_first(inputs: Sequence[Any], z0: State, dimensions: int) -> None:
    """Rows of the batch (or positions too) can leave tensors only that have them."""
    n = next((tuple(t.shape[:dimensions]) for t in leaves(z0) if t.ndim), (0,))
    for item in inputs:
        if item is None:
            continue
        try:
            shapes = [tuple(t.shape) for t in leaves(item)]
            fits, description = all(shape[:dimensions] == n for shape in shapes), f"shapes {shapes}"
        except TypeError:  # no tensor
            fits, description = False, type(item).__name__
        if not fits:
            what, requirement = "rows", f"have {n[0]} of them"
            if dimensions > 1:
                what, requirement = "positions", f"begin with {n}"
            raise ValueError(
                f"compact=True takes {what} out of every input, which must {requirement}, got "
                f"{description}; let the map close over what does not belong to the batch"
            )


def _check_steps(steps: Sequence[int]) -> None:
    if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in steps):
        raise ValueError(f"sample_steps must be ints ≥ 1, got {tuple(steps)}")
    if any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"sample_steps must ascend, as the samples do, got {tuple(steps)}")


def _keeper(
    sample_states: dict[int, Tensor], steps: Sequence[int], callback: StepCallback | None
) -> StepCallback:
    def keep(k: int, matrix: Tensor, residual: Tensor) -> None:
        if k in steps:
            # A copy: the map may answer in a few buffers of its own in turns.
            sample_states[k] = matrix.clone()
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

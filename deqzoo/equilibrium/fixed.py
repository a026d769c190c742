"""A solve with a fixed number of steps, as a pure function of tensors: nothing in it waits.

`Solver.solve` keeps books: it measures every evaluation, keeps the best iterate of each cell and
looks at flags, which on a GPU waits for the device. Training with `tol` 0 needs none of that. The
same steps are done here on the tensors of a state themselves (never packed into one matrix),
without control flow that depends on values, so that a whole solve can be traced by torch.compile
with `fullgraph=True` and captured in a CUDA graph. Every entry of the batch is a cell of its own,
under the layout `Causal` every position of a sequence, under `Segments` every graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deqzoo.equilibrium.gradients import JFB, NPG, UPG, Gradient
from deqzoo.equilibrium.gradients.base import FORWARD, TWICE, forget_grad
from deqzoo.equilibrium.layout import Causal, Layout, Segments
from deqzoo.equilibrium.maps import WROTE, DetachableMap, PreciseMap, writes
from deqzoo.equilibrium.solvers import Anderson, FixedPointIteration, Solution, Solver, Status
from deqzoo.equilibrium.solvers.loop import quotient
from deqzoo.equilibrium.solvers.traced import solved_weights
from deqzoo.equilibrium.state import State, leaves, rebuild
from deqzoo.equilibrium.transforms import transformed

Map = Callable[[State], State]


def has_fixed_steps(solver: Solver, gradient: Gradient) -> bool:
    """Whether `fixed_point_of_steps` can take these settings: exactly these classes, and tol 0."""
    solvers, gradients = (Anderson, FixedPointIteration), (UPG, NPG, JFB)
    return type(solver) in solvers and solver.tol == 0 and type(gradient) in gradients


def fixed_point_of_steps(
    f: Map, start: State, solver: Solver, gradient: Gradient, layout: Layout | None = None
) -> Solution:
    """What `fixed_point` does for a solver with `tol` 0, without its books.

    Where the residual falls from step to step, result and gradient are those of `fixed_point`,
    which returns its best iterate; here it is the last one. The residuals reported are those of
    the state that the gradient starts from: F is evaluated there anyway.

    Args:
        f: the map, weights and inputs attached to the graph; it may be a `DetachableMap` and a
            `PreciseMap`.
        start: batch-first tensors, one cell per entry of the batch.
        solver: settings for which `has_fixed_steps` holds.
        gradient: likewise.
        layout: `Causal` for sequences (B, T, d) whose positions are cells, `Segments` for graphs;
            every other one counts as `Rows`.

    Returns:
        A `Solution` whose state carries the graph; no cell of it is `converged`.

    Raises:
        ValueError: settings that need the books of `fixed_point`, or a map that writes into a state
            that it is given or had returned before.
        RuntimeError: `npg` under torch.func, or differentiated twice or in forward mode.
    """
    if not has_fixed_steps(solver, gradient):
        raise ValueError(
            "a fixed number of steps needs solver 'anderson' or 'fixed_point' with tol 0 and "
            f"gradient 'upg', 'npg' or 'jfb', got {solver} and {gradient}"
        )
    window, ridge = (solver.window, solver.ridge) if isinstance(solver, Anderson) else (1, None)
    first = start
    precision = f.dtype if isinstance(f, PreciseMap) else None
    if window == 1 and solver.damping == 1 and precision is not None:
        # Plain iterates are values of F: kept in its precision they lose nothing.
        first = _map(lambda t: t.to(precision), start)
    # Compiled code records no graph.
    solve_map = f.detached() if isinstance(f, DetachableMap) else f
    with torch.no_grad():
        z = fixed_steps(
            solve_map, first, solver.max_steps,
            window=window, damping=solver.damping, ridge=ridge, layout=layout,
        )  # fmt: skip
    z = rebuild(z, [t.detach().to(s.dtype) for t, s in zip(leaves(z), leaves(start), strict=True)])
    if isinstance(gradient, NPG):
        state, first = attach_series(f, z, gradient.steps, gradient.damping)
    elif isinstance(gradient, UPG):
        state, first = recorded_fixed_steps(f, z, gradient.steps, gradient.damping)
    else:
        state, first = recorded_fixed_steps(f, z, 1, 1.0)
    absolute, relative = _residuals(z, first, layout)
    n_steps = torch.full_like(absolute, solver.max_steps, dtype=torch.int64)
    n_recorded = gradient.steps if isinstance(gradient, UPG) else 1
    return Solution(
        state=state,
        status=torch.full_like(n_steps, int(Status.MAX_STEPS)),
        n_steps=n_steps,
        abs_residual=absolute,
        rel_residual=relative,
        residual=relative if solver.stop_mode == "rel" else absolute,
        n_evals=solver.max_steps + n_recorded,
        row_evals=(solver.max_steps + n_recorded) * absolute.numel(),
    )


def fixed_steps(
    f: Map,
    start: State,
    steps: int,
    *,
    window: int = 1,
    damping: float = 1.0,
    ridge: float | None = None,
    layout: Layout | None = None,
) -> State:
    """`steps` updates of Anderson's iteration (window 1: of the damped one) from a start.

    Returns what `Anderson(max_steps=steps, tol=0, window=window, damping=damping)` has after its
    last update, with one evaluation of F fewer: the last one would only measure it.

    Args:
        f: the map.
        start: where to begin; batch-first tensors.
        steps: updates, each with one evaluation of F.
        window: evaluations that are mixed.
        damping: β.
        ridge: relative to the mean diagonal of the Gram matrix; see `Anderson`.
        layout: see `fixed_point_of_steps`; a causal one mixes by sums over the positions before.
    """
    window = min(window, steps)
    maps: list[list[Tensor]] = []
    residuals: list[list[Tensor]] = []
    gram: list[list[Tensor]] = []  # gram[i][j], j <= i, of the kept evaluations, oldest first
    z = start
    for _ in range(steps):
        fz = _evaluate(f, z, [t for answer in maps for t in answer])
        if window == 1:
            z = _step(z, fz, damping)
            continue
        pairs = list(zip(leaves(z), leaves(fz), strict=True))
        if len(maps) == window:
            maps, residuals, gram = maps[1:], residuals[1:], [row[1:] for row in gram[1:]]
        maps.append(leaves(fz))
        residuals.append([b.to(_wide(b)) - a.to(_wide(b)) for a, b in pairs])
        gram.append([_gram(other, residuals[-1], layout) for other in residuals])
        if len(maps) == 1:
            z = _step(z, fz, damping)
            continue
        weights = mixing_weights(gram, ridge)
        if isinstance(layout, Segments):
            weights = [layout.spread(w) for w in weights]
        mixture = _mix(maps, weights)
        if damping != 1:
            shift = _mix(residuals, [w * (1 - damping) for w in weights])
            mixture = [a - b.to(a.dtype) for a, b in zip(mixture, shift, strict=True)]
        z = rebuild(fz, [m.to(t.dtype) for m, (_, t) in zip(mixture, pairs, strict=True)])
    return z


def recorded_fixed_steps(f: Map, z: State, steps: int, damping: float) -> tuple[State, State]:
    """The recorded steps of `upg` from a state without a graph; also F at that state, detached."""
    first = None
    for _ in range(steps):
        fz = _evaluate(f, z, [] if first is None else leaves(first))
        first = _map(Tensor.detach, fz) if first is None else first
        z = _step(z, fz, damping)
    return z, first


def attach_series(f: Map, z: State, steps: int, damping: float) -> tuple[State, State]:
    """The backward of `npg` for a state without a graph; also F at that state, detached."""
    if transformed():
        raise RuntimeError(
            "npg by a fixed number of steps cannot be differentiated by torch.func; choose "
            "gradient 'upg', or a solver with tol > 0"
        )
    points = [t.detach().requires_grad_() for t in leaves(z)]
    with torch.enable_grad():
        value = leaves(f(rebuild(z, points)))
    for point in points:  # their gradients, which the last backward pass fills, are not used
        point.register_post_accumulate_grad_hook(forget_grad)
    state = _Series.apply(steps, damping, len(points), *value, *points)
    return rebuild(z, state), rebuild(z, [t.detach() for t in value])


class _Series(torch.autograd.Function):
    """Identity in value to the solved state; λ Σ_{t<k} (λJᵀ + (1−λ)I)ᵗ g enters F's backward."""

    @staticmethod
    def forward(ctx: Any, steps: int, damping: float, n: int, *tensors: Tensor) -> Any:
        ctx.value, ctx.points, ctx.settings = tensors[:n], tensors[n:], (steps, damping)
        return tuple(t.detach().clone() for t in tensors[n:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        steps, damping = ctx.settings
        total = list(cotangents)
        for _ in range(steps - 1):
            with torch.enable_grad():
                products = torch.autograd.grad(
                    ctx.value, ctx.points, total, retain_graph=True, materialize_grads=True
                )
            total = [
                g + damping * p + (1 - damping) * t
                for g, p, t in zip(cotangents, products, total, strict=True)
            ]
        none = (None,) * len(ctx.points)
        return (None, None, None, *(damping * t for t in total), *none)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD)


def _evaluate(f: Map, z: State, answers: Sequence[Tensor]) -> State:
    """F(z), from a map that must not write into z nor into the `answers` of earlier calls."""
    if torch.compiler.is_compiling():  # nothing counts writes there
        return f(z)
    tensors = [*leaves(z), *answers]
    counts = [writes(t) for t in tensors]
    fz = f(z)
    if counts != [writes(t) for t in tensors]:
        raise ValueError(WROTE)
    return fz


def mixing_weights(gram: Sequence[Sequence[Tensor]], ridge: float | None) -> list[Tensor]:
    """`solved_weights` (B,) each, from the lower triangle of the Gram matrices, entries (B,)."""
    n = len(gram)
    rows = [torch.stack([gram[max(i, j)][min(i, j)] for j in range(n)], -1) for i in range(n)]
    return list(solved_weights(torch.stack(rows, -2), ridge).unbind(-1))


def difference_penalty(f: Map, state: State, size: float) -> Tensor:
    """Estimate ‖∂F/∂h‖²_F / d by a finite difference in place of a double backward.

    Mean of ‖F(h + εv) − F(h)‖² / ε² over v ~ N(0, I), divided by d: E‖Jv‖² = ‖J‖²_F as E‖vᵀJ‖² is,
    which `jacobian_penalty` takes. A map that has a first derivative only (a compiled one) will do.

    Args:
        f: the map, weights tracked.
        state: h; it is detached.
        size: ε; well above the rounding of F's dtype (0.1 for bfloat16).

    Returns:
        Scalar, float32 or wider.
    """
    points = [t.detach() for t in leaves(state)]
    value = leaves(f(rebuild(state, points)))
    nearby_value = leaves(f(rebuild(state, [z + size * torch.randn_like(z) for z in points])))
    change = [
        (a.to(_wide(a)) - b.to(_wide(b))).square().sum()
        for a, b in zip(nearby_value, value, strict=True)
    ]
    return torch.stack(change).sum() / (size * size * sum(z.numel() for z in points))


def _step(z: State, fz: State, damping: float) -> State:
    if damping == 1:
        return fz
    pairs = zip(leaves(z), leaves(fz), strict=True)
    return rebuild(fz, [torch.lerp(a, b, damping) for a, b in pairs])


def _residuals(z: State, fz: State, layout: Layout | None) -> tuple[Tensor, Tensor]:
    """‖F(h) − h‖ and the same over ‖F(h)‖, per cell."""
    with torch.no_grad():
        change = [
            b.to(_wide(b)) - a.to(_wide(b)) for a, b in zip(leaves(z), leaves(fz), strict=True)
        ]
        absolute = _inner(change, change, layout).sqrt()
        return absolute, quotient(absolute, _inner(leaves(fz), leaves(fz), layout).sqrt())


def _inner(x: Sequence[Tensor], y: Sequence[Tensor], layout: Layout | None) -> Tensor:
    """Inner products per cell, (B,), (B, T) or (graphs,), summed in float32 at least."""
    start = 2 if isinstance(layout, Causal) else 1
    parts = [
        (a.to(_wide(a)) * b.to(_wide(b))).flatten(start).sum(start)
        for a, b in zip(x, y, strict=True)
    ]
    sums = torch.stack(parts).sum(0)
    return layout.total(sums) if isinstance(layout, Segments) else sums


def _gram(x: Sequence[Tensor], y: Sequence[Tensor], layout: Layout | None) -> Tensor:
    """Sums of inner products over what decides a cell's mixing weights."""
    products = _inner(x, y, layout)
    if not isinstance(layout, Causal):
        return products
    if layout.valid is not None:
        products = products * layout.valid
    return products.cumsum(1)


def _mix(parts: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> list[Tensor]:
    mixture = []
    for leaf in zip(*parts, strict=True):
        shape = weights[0].shape + (1,) * (leaf[0].ndim - weights[0].ndim)
        mixture.append(sum(t * w.reshape(shape) for t, w in zip(leaf, weights, strict=True)))
    return mixture


def _map(function: Callable[[Tensor], Tensor], state: State) -> State:
    return rebuild(state, [function(t) for t in leaves(state)])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

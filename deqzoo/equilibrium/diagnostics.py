"""Measurements at an equilibrium: its spectral radius, and how right a gradient is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deqzoo.equilibrium.gradients import Gradient, make_gradient
from deqzoo.equilibrium.layer import GradientSpec, SolverSpec, fixed_point
from deqzoo.equilibrium.layout import Causal, Layout, Rows, begin
from deqzoo.equilibrium.maps import Matrices, recording
from deqzoo.equilibrium.solvers import Solver, make_solver
from deqzoo.equilibrium.solvers.loop import scaled_norm
from deqzoo.equilibrium.state import State


@recording()
def spectral_radius(
    f: Callable[[State], State],
    state: State,
    n_iter: int = 60,
    estimator: Literal["growth", "rayleigh"] = "growth",
    v0: State | None = None,
    generator: torch.Generator | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Estimate ρ(∂F/∂h) of every sample by power iteration on v ↦ Jᵀv.

    Args:
        f: the map on states.
        state: where to linearise.
        n_iter: products.
        estimator: "growth" averages log ‖Jᵀv‖ / ‖v‖ over the last two thirds of the iterations,
            which also holds for complex leading pairs; "rayleigh" is the last |⟨Jᵀv, v⟩ / ⟨v, v⟩|,
            as the official implementations print it.
        v0: start, standard normal if None.
        generator: source of the random start.
        layout: what one sample is, `Rows()` by default; the nodes of a graph need `Segments`. The
            positions of a sequence (`Causal`) are one sample together, padding left out.

    Returns:
        (B,), or (graphs,) for `Segments`, in float32 or wider.

    Raises:
        ValueError: unknown estimator, n_iter < 1, or a start that does not fit the state or is 0.
    """
    if estimator not in ("growth", "rayleigh"):
        raise ValueError(f"unknown estimator {estimator!r}; choose growth or rayleigh")
    if n_iter < 1:
        raise ValueError(f"n_iter must be at least 1, got {n_iter}")
    layout, matrix = begin(layout or Rows(), state)
    point = matrix.detach().clone().requires_grad_()
    out = Matrices(f, layout)(point)
    if v0 is None:
        v = torch.randn(point.shape, generator=generator, dtype=point.dtype).to(point.device)
    else:
        v = layout.to_matrix(v0)
        if v.shape != point.shape:
            raise ValueError(f"v0 must have {point.shape[0]} rows as the state, got {v.shape[0]}")
    # Jᵀ carries v to earlier positions: a factor per position would change the iteration.
    cells = layout.adjoint() if isinstance(layout, Causal) else layout
    wide = torch.promote_types(point.dtype, torch.float32)
    if not out.requires_grad:  # a constant map
        return (scaled_norm(v, cells) * 0).to(wide)
    tiny = torch.finfo(wide).tiny
    logs = []
    quotient = v.new_zeros(())
    v = _without_padding(v, layout)
    if v0 is not None:
        rows = cells.total(_without_padding(v.new_ones(len(v)), layout))
        if bool(((scaled_norm(v, cells) == 0) & (rows > 0)).any()):
            raise ValueError("v0 must not be 0 in any sample: every product would be 0")
    v = _unit(v, cells)
    for _ in range(n_iter):
        (w,) = torch.autograd.grad(out, point, v, retain_graph=True, materialize_grads=True)
        w = _without_padding(w, layout)
        norm = scaled_norm(v, cells).to(wide).clamp_min(tiny)  # 1, but for rounding
        quotient = (cells.total((w.to(wide) * v).sum(1)) / norm.square()).abs()
        logs.append((scaled_norm(w, cells).to(wide) / norm).clamp_min(tiny).log())
        v = _unit(w, cells)
    if estimator == "rayleigh":
        return quotient
    return torch.stack(logs[n_iter // 3 :]).mean(0).exp()


def _unit(v: Tensor, cells: Layout) -> Tensor:
    """Rows (R, D) with the norm of each cell made 1, where it is not 0."""
    norm = scaled_norm(v, cells)
    return (v / cells.spread(torch.where(norm > 0, norm, 1)).unsqueeze(1)).to(v.dtype)


def _without_padding(v: Tensor, layout: Layout) -> Tensor:
    return layout.total(v) if isinstance(layout, Causal) else v


@dataclass(frozen=True)
class Fidelity:
    """One gradient mode held against the exact gradient.

    Attributes:
        gradient: its settings.
        cosine: cosine per parameter group, and "all".
        relative_error: ‖g − exact‖ / ‖exact‖ per group, and "all".
        norm_ratio: ‖g‖ / ‖exact‖ per group, and "all".
        seconds: wall time of forward and backward.
        saved_bytes: distinct storage that the recorded graph keeps for the backward pass.
    """

    gradient: dict[str, Any]
    cosine: dict[str, float]
    relative_error: dict[str, float]
    norm_ratio: dict[str, float]
    seconds: float
    saved_bytes: int


EXACT = {
    "name": "implicit",
    "solver": {"name": "anderson", "max_steps": 200, "tol": 1e-7, "window": 8},
}
"""Adjoint settings that count as exact in float32; float64 models may pass tighter ones."""


@recording()
def gradient_fidelity(
    model: nn.Module | Callable[[State], State],
    batch: Mapping[str, Any] | State,
    gradients: GradientSpec | Sequence[GradientSpec],
    *,
    loss: Callable[[State], Tensor] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    layout: Layout | None = None,
    solver: SolverSpec | None = None,
    exact: GradientSpec = EXACT,
    groups: Callable[[str], str] | None = None,
) -> list[Fidelity]:
    """Compare gradient modes with the exact implicit gradient on one batch.

    For a whole model, or, where `loss` is given, for a map of your own:

        gradient_fidelity(f, h0, ["jfb", "npg"], loss=lambda h: h.sum(), parameters={"weight": w})

    Args:
        model: called as `model(**batch, solver=..., gradient=...)` with a `Solver` (or None) and a
            `Gradient`, returns an object with `loss`. Its training mode is left as it is, and so
            are its buffers (batch statistics); random masks are drawn alike for every mode.
            With `loss`: the map on states.
        batch: keyword arguments with labels. With `loss`: the start state.
        gradients: modes to compare, or one.
        loss: of the solution, a scalar; makes `model` a map.
        parameters: of a map that is no module, by name: tensors that require a gradient.
        layout: of a map: what one sample is, `Rows()` by default.
        solver: forward solver for all of them; None keeps the model's own, or a tight one for maps.
        exact: the mode that counts as exact.
        groups: group of a parameter name; by default its first component.

    Returns:
        One `Fidelity` per mode.

    Raises:
        ValueError: arguments for maps without `loss`, a map without parameters, or a loss that is
            no scalar or does not depend on them.
    """
    group_of = groups or (lambda name: name.split(".", 1)[0])
    if isinstance(gradients, (str, Mapping, Gradient)):
        gradients = [gradients]
    owner: Any = model
    inputs: Any = batch
    if loss is not None:
        owner, inputs = _MapWithLoss(model, loss, parameters, layout), {"start": batch}
        solver = _TIGHT if solver is None else solver
    elif parameters is not None or layout is not None or not isinstance(model, nn.Module):
        raise ValueError("for a map of your own, pass loss=, a function of the solution")
    forward_solver = None if solver is None else make_solver(solver)
    modes = [make_gradient(spec) for spec in gradients]  # mistakes come before any work
    reference, _, _ = _gradients(owner, inputs, forward_solver, make_gradient(exact))
    results = []
    for gradient in modes:
        mode_gradients, seconds, saved_bytes = _gradients(owner, inputs, forward_solver, gradient)
        cosine, error, ratio = compare_gradients(
            mode_gradients, reference, lambda name: ("all", group_of(name))
        )
        results.append(Fidelity(gradient.to_dict(), cosine, error, ratio, seconds, saved_bytes))
    return results


_TIGHT = {"name": "anderson", "max_steps": 200, "tol": 1e-6}


@dataclass(frozen=True)
class _WithLoss:
    loss: Tensor


class _MapWithLoss:
    """A map on states in the place of a model: solves, and returns the loss of the solution."""

    def __init__(
        self,
        f: Callable[[State], State],
        loss: Callable[[State], Tensor],
        parameters: Mapping[str, Tensor] | None,
        layout: Layout | None,
    ) -> None:
        self.f, self.loss, self.layout = f, loss, layout
        self.module = f if isinstance(f, nn.Module) else nn.Module()
        self.parameters = dict(self.module.named_parameters() if parameters is None else parameters)
        if not any(p.requires_grad for p in self.parameters.values()):
            raise ValueError(
                "the map has no parameters to compare gradients of: make it a module, or pass "
                "parameters={name: tensor} with tensors that require a gradient"
            )

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.parameters.items()

    def buffers(self) -> Iterable[Tensor]:
        return self.module.buffers()

    def __call__(self, start: State, solver: Solver, gradient: Gradient) -> _WithLoss:
        solution = fixed_point(self.f, start, solver=solver, gradient=gradient, layout=self.layout)
        return _WithLoss(self.loss(solution.state))


def _gradients(
    model: Any, batch: Mapping[str, Any], solver: Solver | None, gradient: Gradient
) -> tuple[dict[str, Tensor], float, int]:
    """Gradient by parameter name, seconds, and bytes saved for the backward pass."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start_time = time.perf_counter()
        with SavedTensors() as saved_tensors:
            loss = model(**batch, solver=solver, gradient=gradient).loss
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError("the loss must be one number that depends on the parameters")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        seconds = time.perf_counter() - start_time
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return gradients_by_name(parameters, gradients), seconds, saved_tensors.bytes


def gradients_by_name(
    parameters: Mapping[str, Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Gradients by parameter name; zero where a parameter plays no part."""
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


class SavedTensors:
    """Counts the distinct storage that graphs recorded inside the context keep for backward.

    Args:
        beside: tensors whose storage does not count, such as the weights.
    """

    def __init__(self, beside: Iterable[Tensor] = ()) -> None:
        self._beside = {tensor.untyped_storage().data_ptr() for tensor in beside}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if not tensor.is_sparse:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._beside:
                self._storages[storage.data_ptr()] = storage.nbytes()
        # An operation that saves its own output would otherwise hold itself, in a cycle that
        # Python's collector does not see.
        return tensor.detach()

    @property
    def bytes(self) -> int:
        """What was saved so far."""
        return sum(self._storages.values())

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def compare_gradients(
    gradients: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    groups_of: Callable[[str], Sequence[str]],
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Hold gradients against exact ones, by parameter name.

    Args:
        gradients: gradients; names that `exact` lacks are an error.
        exact: what they should be.
        groups_of: the groups that a parameter counts in.

    Returns:
        Cosine, relative error ‖g − exact‖ / ‖exact‖ and ‖g‖ / ‖exact‖, each by group; NaN where
        a norm is zero.
    """
    sums: dict[str, Tensor] = {}
    for name, g in gradients.items():
        a, b = g.double().flatten(), exact[name].double().flatten()
        entry = torch.stack((a @ a, b @ b, a @ b, (a - b) @ (a - b)))
        for group in groups_of(name):
            sums[group] = sums.get(group, 0) + entry
    cosine, error, ratio = {}, {}, {}
    for group, entry in sums.items():
        aa, bb, ab, dd = entry.tolist()
        scale = (aa * bb) ** 0.5
        cosine[group] = ab / scale if scale else float("nan")
        error[group] = (dd / bb) ** 0.5 if bb else float("nan")
        ratio[group] = (aa / bb) ** 0.5 if bb else float("nan")
    return cosine, error, ratio

"""Watching an image model think: its answer after every solver step, and what training keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from deqzoo.equilibrium import Rows, Solution, Solver, make_solver
from deqzoo.equilibrium.diagnostics import SavedTensors
from deqzoo.equilibrium.solvers.base import StepCallback


@dataclass(frozen=True)
class Watched:
    """One batch's solve, step by step.

    Attributes:
        probabilities: of the classes after every step (n, B, C); a picture whose solve has ended
            keeps its answer.
        residuals: in the solver's stop mode (n, B), likewise.
        final: probabilities of the answer (B, C). It is that of the state with the smallest
            residual, which need not be the last one.
        n_steps, residual, converged: the solver's report (B,).
    """

    probabilities: Tensor
    residuals: Tensor
    final: Tensor
    n_steps: Tensor
    residual: Tensor
    converged: Tensor

    def best_step(self, index: int) -> int:
        """The step, counted from 1, whose state is the answer."""
        steps = int(self.n_steps[index])
        return int(self.residuals[:steps, index].argmin()) + 1 if steps else 0


@torch.inference_mode()
def watch(
    model: Any,
    pixels: Tensor,
    solver: dict[str, Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Watched:
    """Solve a batch of pictures (B, 3, H, W) and read the answer off after every step.

    Args:
        model: an image classifier in evaluation mode.
        pixels: normalised.
        solver: change for this call.
        on_step: called with the number of every step; what it raises ends the solve.
    """
    f, start = getattr(model, "inference_map", model.equilibrium_map)(pixels)
    layout = Rows()
    residuals: list[Tensor] = []
    answers: list[Tensor] = []

    def answer(state: Any) -> Tensor:
        return model.classifier(model.head(tuple(state))).float().softmax(-1).cpu()

    def callback(step: int, matrix: Tensor, residual: Tensor) -> None:
        if on_step is not None:
            on_step(step)
        residuals.append(residual.float().cpu().clone())
        answers.append(answer(layout.to_state(matrix)))

    solution = model.solve(f, start, layout=layout, solver=solver, callback=callback)
    final, n_steps = answer(solution.state), solution.n_steps.cpu()
    residual = solution.residual.float().cpu()
    # Without a single finite state there was no step to see.
    history, path = torch.stack(answers or [final]), torch.stack(residuals or [residual])
    for index, steps in enumerate(n_steps.tolist()):
        history[steps:, index] = final[index]
        path[steps:, index] = residual[index]
    return Watched(history, path, final, n_steps, residual, solution.converged.cpu())


def watched_solver(settings: dict[str, Any], callback: StepCallback) -> Solver:
    """A solver that reports every step of every solve to a callback, as `Solver.solve` takes it."""
    solver = make_solver(settings)

    class Reporting(type(solver)):  # type: ignore[misc]
        def solve(self, f: Any, z0: Any, layout: Any = None, *_: Any, **__: Any) -> Solution:
            return super().solve(f, z0, layout, callback=callback)

    return Reporting(**{f.name: getattr(solver, f.name) for f in fields(solver)})


def training_memory(
    model: Any, pixels: Tensor, labels: Tensor, depths: Sequence[int]
) -> dict[str, list[int]]:
    """Bytes that a training step keeps for the backward pass, by depth.

    Args:
        model: an image classifier; weights are not counted, and gradients are not computed.
        pixels, labels: a batch.
        depths: solver steps of the equilibrium model, and layers of the same map unrolled.

    Returns:
        "equilibrium" (with the model's own gradient) and "unrolled", a figure for every depth.
    """
    weights = [*model.parameters(), *model.buffers()]
    memory: dict[str, list[int]] = {"equilibrium": [], "unrolled": []}
    for depth in depths:
        for name, gradient in (("equilibrium", None), ("unrolled", {"name": "unrolled"})):
            settings: Any = gradient and {**gradient, "steps": depth}
            with torch.enable_grad(), SavedTensors(weights) as saved_tensors:
                model(
                    pixel_values=pixels,
                    labels=labels,
                    solver={"max_steps": depth, "tol": 0.0},
                    gradient=settings,
                )
            memory[name].append(saved_tensors.bytes)
    return memory

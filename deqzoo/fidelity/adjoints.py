"""One recorded forward pass, many backward passes: gradients of all modes from the same graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deqzoo.equilibrium import Gradient, Layout, Solution, Solver, fixed_point, make_solver
from deqzoo.equilibrium.diagnostics import gradients_by_name
from deqzoo.equilibrium.gradients.base import Map, Problem, attach_cotangent
from deqzoo.equilibrium.gradients.phantom import neumann_series
from deqzoo.equilibrium.solvers.base import StepRule
from deqzoo.errors import UserError
from deqzoo.models.base import DEQPreTrainedModel

_GROWTH_LIMIT = 1e3  # beyond it, sums of powers of Jᵀ would lose digits in float32


@dataclass
class AdjointSystem:
    """The linear system (I − Jᵀ) w = g of one equilibrium.

    Attributes:
        layout: what one independent sample is.
        product: v ↦ Jᵀv at the equilibrium.
        powers: g, Jᵀg, Jᵀ²g, … of the last cotangent, as far as they were needed; every Neumann
            series is a combination of them.
        residual: largest relative residual of the last solve of the system.
        on_evaluation: called before every product.
    """

    layout: Layout
    product: Map | None = None
    powers: list[Tensor] = field(default_factory=list)
    residual: float = 0.0
    on_evaluation: Callable[[], None] | None = None

    def receive(self, product: Map, cotangent: Tensor) -> None:
        """Take the cotangent of a backward pass; products of an equal one are kept."""
        self.product = with_callback(product, self.on_evaluation)
        if not self.powers or not torch.equal(self.powers[0], cotangent):
            self.powers = [cotangent]

    def power(self, j: int) -> Tensor:
        """Jᵀʲg."""
        assert self.product is not None
        while len(self.powers) <= j:
            self.powers.append(self.product(self.powers[-1]))
        return self.powers[j]

    def neumann(self, steps: int, damping: float) -> Tensor:
        """λ Σ_{t<k} (λJᵀ + (1−λ)I)ᵗ g, as a combination of powers where that is accurate."""
        last = self.power(steps - 1)
        if last.norm() > _GROWTH_LIMIT * self.powers[0].norm():
            assert self.product is not None
            return neumann_series(self.product, self.powers[0], steps, damping)
        total = torch.zeros_like(last)
        for j in range(steps):
            weight = damping * sum(
                math.comb(t, j) * damping**j * (1 - damping) ** (t - j) for t in range(j, steps)
            )
            total.add_(self.powers[j], alpha=weight)
        return total

    def solve(self, solver: Solver) -> Tensor:
        """w = Jᵀw + g by a solver."""
        product, cotangent = self.product, self.powers[0]
        assert product is not None
        solution = solver.solve(
            lambda w: product(w) + cotangent, cotangent, layout=self.layout.adjoint()
        )
        self.residual = float(solution.rel_residual.max())
        return solution.state


Rule = Callable[[AdjointSystem], Tensor]
"""What enters F's backward in place of the cotangent."""


def no_rule(system: AdjointSystem) -> Tensor:
    """No gradient passes the equilibrium: only that of the head is left."""
    return torch.zeros_like(system.powers[0])


def neumann_rule(steps: int, damping: float) -> Rule:
    """The Neumann phantom gradient."""
    return lambda system: system.neumann(steps, damping)


def solver_rule(spec: Mapping[str, Any] | Solver) -> Rule:
    """The implicit gradient, its linear system solved as described."""
    solver = make_solver(spec)
    return lambda system: system.solve(solver)


@dataclass(frozen=True)
class Switchable(Gradient):
    """A gradient whose rule is exchanged between backward passes of the same graph."""

    current: list[Rule] = field(default_factory=lambda: [no_rule])
    systems: list[AdjointSystem] = field(default_factory=list)
    on_evaluation: Callable[[], None] | None = None

    name: ClassVar[str] = "switchable"

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        system = AdjointSystem(problem.layout, on_evaluation=self.on_evaluation)
        self.systems.append(system)

        def turn(product: Map, cotangent: Tensor) -> Tensor:
            system.receive(product, cotangent)
            return self.current[-1](system)

        return attach_cotangent(problem, state, turn)


@dataclass(frozen=True)
class Held(Solver):
    """A solver that returns a solution found earlier."""

    solution: Solution | None = None

    name: ClassVar[str] = "held"

    def solve(self, f: Callable[..., Any], z0: Any, *_: Any, **__: Any) -> Solution:
        assert self.solution is not None
        return replace(self.solution)

    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        raise AssertionError("a held solution takes no steps")


@contextlib.contextmanager
def intercepted(model: nn.Module, solve: Callable[..., Solution]) -> Iterator[None]:
    """Solve the equilibria of a model by `solve(owner, f, z0, layout, solver, gradient)`."""
    owners = [m for m in model.modules() if isinstance(m, DEQPreTrainedModel)]

    def answer(
        owner: DEQPreTrainedModel,
        f: Any,
        z0: Any,
        layout: Any = None,
        solver: Any = None,
        gradient: Any = None,
        **_: Any,
    ) -> Solution:
        return solve(owner, f, z0, layout, solver, gradient)

    for owner in owners:
        owner.solve = partial(answer, owner)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for owner in owners:
            del owner.solve


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass in training mode writes into buffers (batch statistics).

    By copies in their places: the recorded graph may read the buffers themselves.
    """
    before = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, copy in before:
            if not torch.equal(getattr(module, name), copy):
                setattr(module, name, copy)


class RecordedModel:
    """A model's forward pass on one batch, ready for backward passes with any adjoint rule.

    Args:
        model: called as `model(**batch)`, returns an object with `loss`.
        batch: keyword arguments with labels.
        solver: settings of the forward solver, over the model's own.
        on_evaluation: called before every evaluation of a map and every product with its Jacobian;
            what it raises ends the work.

    Attributes:
        maps: the equilibrium maps, in the order of the forward pass.
        solutions: their solutions, detached.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        solver: Mapping[str, Any] | None = None,
        on_evaluation: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.batch = model, batch
        self.on_evaluation = on_evaluation
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.maps: list[Any] = []
        self.solutions: list[Solution] = []
        self.layouts: list[Layout | None] = []
        self._switch = Switchable(on_evaluation=on_evaluation)

        def solve(owner: Any, f: Any, z0: Any, layout: Any, _: Any, __: Any) -> Solution:
            f = with_callback(f, on_evaluation)
            with torch.no_grad():
                solution = fixed_point(f, z0, solver=owner.resolve_solver(solver), layout=layout)
            self.maps.append(f)
            self.solutions.append(solution)
            self.layouts.append(layout)
            return fixed_point(
                f, z0, solver=Held(solution=solution), gradient=self._switch, layout=layout
            )

        with seeded(), intercepted(model, solve), kept_buffers(model):
            self.loss = model(**batch).loss
        if not self.solutions:
            raise UserError(f"{type(model).__name__} solves no equilibrium with this configuration")

    def gradients(self, rule: Rule) -> dict[str, Tensor]:
        """Gradient of the loss by parameter name."""
        self._switch.current[-1] = rule
        gradients = torch.autograd.grad(
            self.loss, list(self.parameters.values()), retain_graph=True, allow_unused=True
        )
        return gradients_by_name(self.parameters, gradients)

    def residuals(self) -> tuple[float, float]:
        """Largest relative residual of the forward solves, and of the last adjoint solves."""
        forward = max(float(s.rel_residual.max()) for s in self.solutions)
        return forward, max(system.residual for system in self._switch.systems)

    def replayed(self, gradient: Mapping[str, Any]) -> Tensor:
        """The loss of a forward pass with another gradient from the same solutions.

        With several equilibria in a row each one depends on the value that the one before it
        returned, so they are solved again.
        """
        if len(self.solutions) != 1 or gradient["name"] == "unrolled":
            with kept_buffers(self.model):
                return self.model(**self.batch, gradient=dict(gradient)).loss

        def solve(owner: Any, f: Any, z0: Any, layout: Any, _: Any, spec: Any) -> Solution:
            solver = Held(solution=self.solutions[0])
            f = with_callback(f, self.on_evaluation)
            return fixed_point(
                f, z0, solver=solver, gradient=owner.resolve_gradient(spec), layout=layout
            )

        with intercepted(self.model, solve), kept_buffers(self.model):
            return self.model(**self.batch, gradient=dict(gradient)).loss


def with_callback(f: Callable[[Any], Any], on_evaluation: Callable[[], None] | None) -> Any:
    """A function that calls `on_evaluation` before every call."""
    if on_evaluation is None:
        return f

    def call(argument: Any) -> Any:
        on_evaluation()
        return f(argument)

    return call


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The same random masks in every pass, with gradients on."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        yield

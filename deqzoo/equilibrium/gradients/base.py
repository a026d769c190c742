"""What a gradient is: the way a solved state gets its backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from deqzoo.equilibrium.layout import Layout
from deqzoo.equilibrium.solvers.solution import BackwardReport

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A solved equilibrium, as the gradients see it.

    Attributes:
        f: the map on matrices (R, D), weights and inputs attached to the graph.
        products: the same map for vector-Jacobian products only; it may be detached from weights
            and inputs.
        layout: what one independent sample is.
        checkpoint: recompute each recorded step in the backward pass instead of storing it.
        report: where an implicit gradient notes how its linear solve went.
    """

    f: Map
    products: Map
    layout: Layout
    checkpoint: bool
    report: BackwardReport


@dataclass(frozen=True)
class Gradient(ABC):
    """Settings of one way to differentiate an equilibrium.

    Attributes:
        name: what `make_gradient` knows it by.
        can_checkpoint: whether it records a chain of steps, whose graphs can be recomputed one by
            one in the backward pass; one graph alone is needed whole in the end.
        needs_solve: whether it starts from a solution.
    """

    name: ClassVar[str]
    can_checkpoint: ClassVar[bool] = False
    needs_solve: ClassVar[bool] = True

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON dict; `make_gradient` reads it back."""
        return {"name": self.name, **asdict(self)}

    @abstractmethod
    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        """Return the state (R, D) with this backward pass; `state` carries no graph."""


def recorded_steps(problem: Problem, z: Tensor, steps: int, damping: float) -> Tensor:
    """Apply h ← h + damping · (F(h) − h) `steps` times, recording the graph."""

    def step(h: Tensor) -> Tensor:
        fh = problem.f(h)
        return fh if damping == 1 else torch.lerp(h, fh, damping)

    for _ in range(steps):
        z = recompute(step, z, use_reentrant=False) if problem.checkpoint else step(z)
    return z


def attach_cotangent(
    problem: Problem, state: Tensor, solve: Callable[[Map, Tensor], Tensor]
) -> Tensor:
    """Return `state` by value, with a backward that runs `solve` and then one backward of F.

    `solve(product, g)` turns the incoming cotangent g (R, D) into the one that enters F(state);
    `product(v)` is Jᵀv at `state`. F is recorded once: the memory does not grow with the number
    of products. A map that offers a detached twin is recorded twice, so that the products never
    compute weight gradients, even in a compiled backward.
    """
    point = state.detach().requires_grad_()
    with torch.enable_grad():
        if problem.products is problem.f:
            # The full backward also reaches `point`: nobody reads that gradient.
            point.register_post_accumulate_grad_hook(_forget_grad)
            value = recorded = problem.f(point)
        else:
            recorded = problem.products(point)
            value = problem.f(state.detach())
    if not recorded.requires_grad or not _reaches_more_than(value, point):
        return state.detach()
    return _Adjoint.apply(value, state.detach(), recorded, point, solve)


def _reaches_more_than(value: Tensor, point: Tensor) -> bool:
    """Whether a backward pass of `value` ends anywhere but at `point`: with frozen weights and
    inputs the adjoint system would be solved for nobody."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", point) is not point:
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _forget_grad(tensor: Tensor) -> None:
    tensor.grad = None


class _Adjoint(torch.autograd.Function):
    """Identity in value to the solved state; replaces the cotangent on its way into F."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        state: Tensor,
        recorded: Tensor,
        point: Tensor,
        solve: Callable[[Map, Tensor], Tensor],
    ) -> Tensor:
        # `recorded` stays attached here: its graph is what the products differentiate. It hangs
        # on this node and not the other way round, so nothing keeps the graph alive in a cycle.
        ctx.recorded, ctx.point, ctx.solve = recorded, point, solve
        return state.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives through the implicit and npg gradients are not defined here; "
                "choose gradient 'upg', 'jfb' or 'unrolled' to differentiate twice"
            )

        def product(vector: Tensor) -> Tensor:
            with torch.enable_grad():
                (out,) = torch.autograd.grad(
                    ctx.recorded, ctx.point, vector, retain_graph=True, allow_unused=True
                )
            return torch.zeros_like(ctx.point) if out is None else out

        return ctx.solve(product, cotangent), None, None, None, None

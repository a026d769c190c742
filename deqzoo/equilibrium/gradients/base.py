"""What a gradient is: the way a solved state gets its backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from deqzoo.equilibrium.layout import Layout, Rows, begin
from deqzoo.equilibrium.maps import recording
from deqzoo.equilibrium.solvers.solution import BackwardReport
from deqzoo.equilibrium.transforms import has_tangent, transformed

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
        max_steps: of the solver, for gradients that take its place.
        visit: called with (k, state) after the k-th step of `recorded_steps`, or None.
    """

    f: Map
    products: Map
    layout: Layout
    checkpoint: bool
    report: BackwardReport
    max_steps: int = 1
    visit: Callable[[int, Tensor], None] | None = None


@dataclass(frozen=True)
class Cost:
    """What a gradient adds to a solve.

    Attributes:
        evaluations: recorded evaluations of the map, products with Jᵀ and weight gradients, of
            which each counts as one evaluation of the map.
        graphs: evaluations whose graph is kept for the backward pass, unless it is recomputed.
    """

    evaluations: float
    graphs: int


@dataclass(frozen=True)
class Gradient(ABC):
    """Settings of one way to differentiate an equilibrium.

    Attributes:
        name: what `make_gradient` knows it by.
        can_checkpoint: whether it records a chain of steps, whose graphs can be recomputed one by
            one in the backward pass; one graph alone is needed whole in the end.
        needs_solve: whether it starts from a solution; else `attach` gets the start, and what it
            returns is measured and reported.
    """

    name: ClassVar[str]
    can_checkpoint: ClassVar[bool] = False
    needs_solve: ClassVar[bool] = True

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON dict; `make_gradient` reads it back."""
        return {"name": self.name, **asdict(self)}

    @abstractmethod
    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        """Return the state (R, D) with this backward pass.

        `state` is a solution without a graph, or the start where `needs_solve` is False.
        """

    def cost(
        self,
        max_steps: int,
        *,
        checkpoint: bool = False,
        detached: bool = False,
        products: float | None = None,
    ) -> Cost:
        """Count what `attach` and the backward pass cost, on a state of a single number.

        Args:
            max_steps: of the solver.
            checkpoint: whether recorded steps are recomputed, where the gradient can do that.
            detached: whether the map has a detached twin, as a compiled one does.
            products: number that an adjoint solve spends; None assumes a typical one.
        """
        tally = _Tally()
        with recording():
            weight = torch.zeros(1, 1, requires_grad=True)
            layout, state = begin(Rows(), torch.zeros(1, 1))

            def f(h: Tensor) -> Tensor:
                return _Pass.apply(h, _WeightPass.apply(weight, tally), tally)

            def twin(h: Tensor) -> Tensor:
                return _Pass.apply(h, weight.detach(), tally)

            checkpoint = checkpoint and self.can_checkpoint
            second = twin if detached else f
            problem = Problem(f, second, layout, checkpoint, BackwardReport(), max_steps)
            out = self.attach(problem, state)
            graphs = tally.evaluations
            if out.requires_grad:
                out.sum().backward()
        return Cost(tally.evaluations + tally.passes, graphs)


@dataclass
class _Tally:
    evaluations: int = 0
    passes: int = 0


class _Pass(torch.autograd.Function):
    """One evaluation of a map, h ↦ h / 2 + weight, counted in both directions."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, tally: _Tally) -> Tensor:
        ctx.save_for_backward(h)
        ctx.tally = tally
        tally.evaluations += 1
        return h / 2 + weight

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # what a checkpoint recomputes
        ctx.tally.passes += 1
        return cotangent / 2, cotangent, None


class _WeightPass(torch.autograd.Function):
    """Counts the backward passes that reach the weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tally: _Tally) -> Tensor:
        ctx.tally = tally
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        ctx.tally.passes += 1
        return cotangent, None


def recorded_steps(problem: Problem, z: Tensor, steps: int, damping: float) -> Tensor:
    """Apply h ← h + damping · (F(h) − h) `steps` times, recording the graph."""

    f = problem.f  # not `problem`: a graph that holds it would make a reference cycle

    def step(h: Tensor) -> Tensor:
        fh = f(h)
        return fh if damping == 1 else torch.lerp(h, fh, damping)

    for k in range(1, steps + 1):
        z = recompute(step, z, use_reentrant=False) if problem.checkpoint else step(z)
        if problem.visit is not None:
            problem.visit(k, z)
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
    if transformed():
        return _attach_functional(problem, state.detach(), solve)
    point = state.detach().requires_grad_()
    with torch.enable_grad():
        if problem.products is problem.f:
            # The full backward also reaches `point`, whose gradient is not used.
            point.register_post_accumulate_grad_hook(forget_grad)
            value = recorded_value = problem.f(point)
        else:
            recorded_value = problem.products(point)
            value = problem.f(state.detach())
    if has_tangent(value):
        raise RuntimeError(FORWARD)
    if not value.requires_grad or not _reaches_more_than(value, point):
        return state.detach()

    def product(vector: Tensor) -> Tensor:
        if not recorded_value.requires_grad:  # a map that does not read its state
            return torch.zeros_like(point)
        with torch.enable_grad():
            (out,) = torch.autograd.grad(
                recorded_value, point, vector, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(point) if out is None else out

    return _Adjoint.apply(value, state.detach(), product, solve)


def _attach_functional(
    problem: Problem, state: Tensor, solve: Callable[[Map, Tensor], Tensor]
) -> Tensor:
    """`attach_cotangent` under the transforms of torch.func, whose tensors have no hooks."""

    def cotangent(grad_output: Tensor) -> Tensor:
        pull = torch.func.vjp(problem.products, state)[1]
        with torch.no_grad():
            return solve(lambda vector: pull(vector)[0], grad_output)

    return _Functional.apply(problem.f(state), state, cotangent)


def _reaches_more_than(value: Tensor, point: Tensor) -> bool:
    """Whether a backward pass of `value` ends anywhere but at `point`: with frozen weights and
    inputs the adjoint system need not be solved."""
    visited_nodes, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited_nodes:
            continue
        visited_nodes.add(node)
        if getattr(node, "variable", point) is not point:
            return True
        if type(node).__name__ == "CheckpointFunctionBackward":  # weights do not show behind it
            return True
        stack.extend(next_node for next_node, _ in node.next_functions)
    return False


def forget_grad(tensor: Tensor) -> None:
    """Hook for a leaf whose gradient is not used."""
    tensor.grad = None


TWICE = (
    "second derivatives through the implicit and npg gradients are not defined here; "
    "choose gradient 'upg', 'jfb' or 'unrolled' to differentiate twice"
)
FORWARD = (
    "forward-mode derivatives (jvp, jacfwd, hessian, forward_ad) through the implicit and npg "
    "gradients are not defined here; use vjp, jacrev or grad, or choose gradient 'upg', 'jfb' or "
    "'unrolled'"
)
_OUTSIDE = (
    "the implicit and npg gradients solve a system in the backward pass, which cannot reach into a "
    "finished torch.func.vmap: write vmap(grad(...)) instead of grad(vmap(...)), or choose "
    "gradient 'upg', 'jfb' or 'unrolled'"
)


class _Functional(torch.autograd.Function):
    """`_Adjoint` for torch.func."""

    @staticmethod
    def forward(value: Tensor, state: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, _, ctx.cotangent = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (value,) = ctx.saved_tensors
        return _Refused.apply(TWICE, ctx.cotangent(grad_output), value, grad_output), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(FORWARD)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], value: Tensor, state: Tensor, cotangent: Any
    ) -> tuple[Tensor, Any]:
        """Derivatives taken outside of vmap are refused: the map is gone by then."""
        return _Refused.apply(_OUTSIDE, state, value), in_dims[1]


class _Refused(torch.autograd.Function):
    """The first tensor; differentiating it, or the others through it, is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, tensor: Tensor, *others: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(FORWARD)


class _Adjoint(torch.autograd.Function):
    """Identity in value to the solved state; replaces the cotangent on its way into F."""

    @staticmethod
    def forward(
        value: Tensor, state: Tensor, product: Map, solve: Callable[[Map, Tensor], Tensor]
    ) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # `product` holds the graph it differentiates. That hangs on this node and not the other
        # way round, so nothing keeps the graph alive in a cycle; and it is no input of this node,
        # whose backward would otherwise pass through it once more.
        _, _, ctx.product, ctx.solve = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        return ctx.solve(ctx.product, cotangent), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(FORWARD)

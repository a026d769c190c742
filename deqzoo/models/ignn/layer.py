"""The implicit graph layer: X = relu(W X A + B), with B made from the node features.

Gu, Chang, Zhu, Sojoudi, El Ghaoui, Implicit Graph Neural Networks, NeurIPS 2020. Node data lie in
rows here: x = relu(A^T x W^T + b) for x of shape (n, m).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from deqzoo.equilibrium import BatchMap, DetachableMap, Selection
from deqzoo.equilibrium.transforms import transformed
from deqzoo.models.ignn.dense import times_transposed
from deqzoo.models.ignn.projection import project_rows, rounding, row_norm
from deqzoo.models.ignn.sparse import Adjacency

_LARGE = 1 << 25
"""Bytes; glibc takes larger tensors from the system, not from memory that it holds."""
_BLOCK = 4096
"""Nodes."""


class GraphMap(BatchMap, DetachableMap):
    """The map z -> relu(A^T z W^T + b) of one layer on one batch of graphs.

    Args:
        weight: (m, m), W as it enters the equation (projected).
        injection: (n, m), b.
        adjacency: of the n nodes.
        official_gradient: reproduce the official code's gradient of W, G A X^T in place of
            G A^T X^T: equal for undirected graphs, wrong for directed ones.
    """

    def __init__(
        self,
        weight: Tensor,
        injection: Tensor,
        adjacency: Adjacency,
        official_gradient: bool = False,
    ) -> None:
        self.weight = weight
        self.injection = injection
        self.adjacency = adjacency
        self.official_gradient = official_gradient

    def __call__(self, state: Tensor) -> Tensor:
        tensors = (state, self.weight, self.injection)
        values = self.adjacency.values
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, values)):
            return _Step.apply(*tensors, values, self.adjacency, self.official_gradient)
        if _is_large(state):
            return _step_in_blocks(*tensors, self.adjacency)
        return _step(*tensors, self.adjacency)[0]

    def select(self, selection: Selection) -> GraphMap:
        """Restrict the map to the graphs that a solver goes on with."""
        return GraphMap(
            self.weight,
            selection.state(self.injection),
            self.adjacency.select(selection.rows),
            self.official_gradient,
        )

    def detached(self) -> GraphMap:
        """Return the same map without gradients to weight, injection and edges."""
        return GraphMap(
            self.weight.detach(),
            self.injection.detach(),
            self.adjacency.detached(),
            self.official_gradient,
        )


def _step(
    state: Tensor, weight: Tensor, injection: Tensor, adjacency: Adjacency
) -> tuple[Tensor, Tensor]:
    """Return relu(A^T z W^T + b) and A^T z."""
    spread = adjacency.transposed.product(state)
    return times_transposed(spread, weight, plus=injection).relu_(), spread


def _is_large(state: Tensor) -> bool:
    """Whether a tensor is so large that malloc gets new pages from Linux for each one."""
    usual = state.device.type == "cpu" and state.dtype in (torch.float32, torch.float64)
    if not usual or torch.compiler.is_exporting() or transformed():
        return False
    return state.numel() * state.element_size() > _LARGE


@torch.no_grad()
def _step_in_blocks(
    state: Tensor, weight: Tensor, injection: Tensor, adjacency: Adjacency
) -> Tensor:
    """Return what `_step` does, a few thousand nodes at a time: A^T z stays in the caches."""
    transpose, weight = adjacency.transposed, weight.t()
    result = torch.empty_like(injection)
    for first in range(0, len(state), _BLOCK):
        rows = slice(first, min(first + _BLOCK, len(state)))
        spread = transpose.product_rows(state, rows.start, rows.stop)
        torch.addmm(injection[rows], spread, weight, out=result[rows]).relu_()
    return result


class _Step(torch.autograd.Function):
    """One evaluation with the activation fused, recorded as a single node."""

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        weight: Tensor,
        injection: Tensor,
        values: Tensor,
        adjacency: Adjacency,
        official_gradient: bool,
    ) -> Tensor:
        result, spread = _step(state, weight, injection, adjacency)
        ctx.save_for_backward(state, weight, result)
        ctx.spread = spread if ctx.needs_input_grad[1] else None
        ctx.adjacency = adjacency
        ctx.official_gradient = official_gradient
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, weight, result = ctx.saved_tensors
        local = torch.ops.aten.threshold_backward(grad, result, 0)  # through the relu
        needs_state, needs_weight, needs_injection, needs_values = ctx.needs_input_grad[:4]
        grad_state = grad_weight = grad_values = None
        if needs_state or needs_values:
            into_spread = times_transposed(local, weight.T)
        if needs_state:
            grad_state = ctx.adjacency.matmul(into_spread)
        if needs_values:
            grad_values = ctx.adjacency.entry_products(state, into_spread)
        if needs_weight:
            spread = ctx.spread
            if ctx.official_gradient:
                spread = ctx.adjacency.matmul(state)
            elif torch.is_grad_enabled():  # second derivatives: A^T z must depend on z
                spread = ctx.adjacency.propagate(state)
            grad_weight = times_transposed(local.T, spread.T)
        grad_injection = local if needs_injection else None
        return grad_state, grad_weight, grad_injection, grad_values, None, None


class ClippedSpectralNorm(nn.Module):
    """Scale a weight by min(1, gain / sigma) per row, sigma its estimated largest singular value.

    The variant that the TorchDEQ recipes train PPI with: one power iteration per training call,
    none in evaluation, and no correction of a negative estimate.
    """

    left: Tensor
    right: Tensor

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(out_features, 1))
        self.register_buffer("left", torch.ones(out_features) / math.sqrt(out_features))
        self.register_buffer("right", torch.ones(in_features) / math.sqrt(in_features))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                right = nn.functional.normalize(weight.T @ self.left, dim=0, eps=1e-12)
                left = nn.functional.normalize(weight @ right, dim=0, eps=1e-12)
                self.right.copy_(right)
                self.left.copy_(left)
        # clones: the buffers change in place in the next call, before a late backward
        sigma = self.left.clone() @ weight @ self.right.clone()
        return weight * (self.gain / sigma).clamp(max=1)


class ImplicitGraphLayer(nn.Module):
    """The parameters of one layer; the model solves its equation.

    Args:
        in_features: p.
        out_features: m.
        local_injection: add the node's own features, B = Omega_1 U A + Omega_2 U, in place of
            B = Omega_1 U A.
        kappa: the weight's infinity norm is kept at most kappa / (spectral radius of A); None
            leaves it free.
        spectral_norm: see `ClippedSpectralNorm`.
        official: keep the official code's parameters that nothing uses (`local_weight`, `bias`),
            project the stored weight in every call, and use its gradient of W.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        local_injection: bool = False,
        kappa: float | None = 0.9,
        spectral_norm: bool = False,
        official: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.local_injection = local_injection
        self.kappa = kappa
        self.official = official
        self.state_weight = nn.Parameter(torch.empty(out_features, out_features))  # W
        self.neighbor_weight = nn.Parameter(torch.empty(out_features, in_features))  # Omega_1
        self.local_weight: nn.Parameter | None = None  # Omega_2
        if local_injection or official:
            self.local_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features, 1)) if official else None
        sizes = [out_features, in_features] + [in_features] * local_injection
        self.norms = nn.ModuleList(
            ClippedSpectralNorm(out_features, size) for size in (sizes if spectral_norm else [])
        )

    @property
    def scale(self) -> float:
        """Weights start uniform in [-scale, scale]; the output width decides for all of them."""
        return 1 / math.sqrt(self.out_features)

    def weights(self) -> list[Tensor]:
        """Return W, Omega_1 and, where used, Omega_2, normalised."""
        plain: list[Tensor] = [self.state_weight, self.neighbor_weight]
        if self.local_injection and self.local_weight is not None:
            plain.append(self.local_weight)
        if not self.norms:
            return plain
        return [norm(weight) for norm, weight in zip(self.norms, plain, strict=True)]

    def forward(self, features: Tensor, adjacency: Adjacency, radius: float) -> GraphMap:
        """Return the map whose fixed point is the layer's output.

        Args:
            features: (n, p), dense or sparse COO.
            adjacency: A.
            radius: spectral radius of A that the bound on W is made for.
        """
        if self.official:
            self.project_(radius)
        state_weight, neighbor_weight, *local_weight = self.weights()
        weight, bound = state_weight, self.bound(radius)
        # Elsewhere a look at the weight would wait for the device.
        if bound is not None and (weight.device.type != "cpu" or not self._meets(weight, radius)):
            # The optimiser left W outside; the gradient passes the projection unchanged.
            values = project_rows(weight.detach(), bound)
            weight = _StraightThrough.apply(weight, values)
        if features.is_sparse or features.shape[1] >= self.out_features:
            injection = adjacency.propagate(linear(features, neighbor_weight))
        else:
            injection = linear(adjacency.propagate(features), neighbor_weight)
        if local_weight:
            injection = injection + linear(features, local_weight[0])
        return GraphMap(weight, injection, adjacency, self.official)

    def bound(self, radius: float) -> float | None:
        """Return the largest allowed infinity norm of W, or None where there is none."""
        if self.kappa is None or radius <= 0:
            return None
        return self.kappa / radius

    @torch.no_grad()
    def allows(self, radius: float) -> bool:
        """Whether graphs of a spectral radius are solved with the weight as it is."""
        return self._meets(self.weights()[0], radius)

    def excess(self, radius: float) -> float:
        """Return by how much the stored weight's infinity norm exceeds the bound (0: it is met)."""
        bound = self.bound(radius)
        if bound is None or self.norms:
            return 0.0
        tolerance = rounding(self.state_weight.dtype)
        return max(0.0, row_norm(self.state_weight) - bound * (1 + tolerance))

    @torch.no_grad()
    def project_(self, radius: float) -> None:
        """Project the stored weight in place; with a spectral norm the derived one is projected."""
        bound = self.bound(radius)
        if bound is not None and not self.norms:
            self.state_weight.copy_(project_rows(self.state_weight, bound))

    def _meets(self, weight: Tensor, radius: float) -> bool:
        bound = self.bound(radius)
        if torch.compiler.is_exporting():  # checked before the export
            return True
        return bound is None or row_norm(weight) <= bound * (1 + rounding(weight.dtype))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, replacement: Tensor) -> Tensor:
        return replacement.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def linear(features: Tensor, weight: Tensor) -> Tensor:
    """Return features @ weight^T for dense or sparse COO features (n, p)."""
    if features.is_sparse:
        return torch.sparse.mm(features, weight.T)
    return _Linear.apply(features, weight)


class _Linear(torch.autograd.Function):
    """features @ weight^T by `times_transposed`, backward too."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(features, weight)
        return times_transposed(features, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features, weight = ctx.saved_tensors
        needs_features, needs_weight = ctx.needs_input_grad
        grad_features = times_transposed(grad, weight.T) if needs_features else None
        return grad_features, times_transposed(grad.T, features.T) if needs_weight else None

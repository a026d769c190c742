"""Losses that keep an equilibrium solvable, and losses on the way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from deqzoo.equilibrium.maps import OnceDifferentiableMap, recording
from deqzoo.equilibrium.state import State, in_order_of, leaves, rebuild


@recording()
def jacobian_penalty(
    f: Callable[[State], State],
    state: State,
    n_probes: int = 1,
    probes: Sequence[State] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate ‖∂F/∂h‖²_F / d at a state, averaged over the batch (Bai, Koltun, Kolter 2021).

    Hutchinson's estimator: mean over probes v ~ N(0, I) of ‖vᵀJ‖² / numel. The result can be
    differentiated with respect to whatever F depends on, but not through the state, which is
    detached; this needs F's double backward, so an F that was compiled must be run uncompiled, as
    an `OnceDifferentiableMap` is here.
    It is zero for a constant F.

    Args:
        f: the map.
        state: where to linearise, usually an equilibrium.
        n_probes: probes drawn when `probes` is not given.
        probes: states to use instead of random ones.
        generator: source of the random probes.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: n_probes < 1, no probes, or probes or answers of other shapes than the state's.
    """
    if probes is None and n_probes < 1:
        raise ValueError(f"n_probes must be at least 1, got {n_probes}")
    if isinstance(f, OnceDifferentiableMap):
        f = f.twice_differentiable()
    points = [t.detach().clone().requires_grad_() for t in leaves(state)]
    answer = f(rebuild(state, [t.clone() for t in points]))  # f may work in place
    outputs = _leaves_like(state, answer, "the map must return a state like its input")
    if probes is not None:
        if not probes:
            raise ValueError("probes must hold at least one state; None draws them")
        probe_tensors = [
            _leaves_like(state, probe, "a probe must be like the state") for probe in probes
        ]
    else:
        probe_tensors = [
            [torch.randn(t.shape, generator=generator).to(t) for t in points]
            if generator is not None
            else [torch.randn_like(t) for t in points]
            for _ in range(n_probes)
        ]
    size = max(sum(t.numel() for t in points), 1)
    wide = torch.promote_types(points[0].dtype, torch.float32)  # half-precision sums overflow
    indices = [i for i, t in enumerate(outputs) if t.requires_grad]
    if not indices:
        return points[0].new_zeros((), dtype=wide)
    terms = []
    for directions in probe_tensors:
        products = torch.autograd.grad(
            [outputs[i] for i in indices],
            points,
            [directions[i] for i in indices],
            retain_graph=True,
            create_graph=True,
            materialize_grads=True,
        )
        squares = torch.stack([p.to(wide).square().sum() for p in products])
        terms.append(squares.sum() / size)
    return torch.stack(terms).mean()


def _leaves_like(state: State, other: State, requirement: str) -> list[Tensor]:
    """The tensors of a state in the order of another one, whose shapes they must have."""
    tensors = leaves(in_order_of(other, state))
    shapes, expected_shapes = ([tuple(t.shape) for t in each] for each in (tensors, leaves(state)))
    if shapes != expected_shapes:
        raise ValueError(
            f"expected tensors of shapes {expected_shapes}, got {shapes}: {requirement}"
        )
    return tensors


def correction_weights(
    n: int, kind: Literal["exp", "linear", "const"] = "exp", gamma: float = 0.8
) -> list[float]:
    """Weights of n states on the way to the equilibrium, the last of which is the equilibrium.

    "exp" gives γ^(n−j), "linear" 1 − γ (n−j)/n and "const" γ for every state but the last, whose
    weight is 1 (Bai et al. 2022, fixed-point correction).

    Raises:
        ValueError: unknown kind or n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rules: dict[str, Callable[[int], float]] = {
        "exp": lambda distance: gamma**distance,
        "linear": lambda distance: 1 - gamma * distance / n,
        "const": lambda distance: gamma if distance else 1.0,
    }
    if kind not in rules:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(rules)}")
    return [rules[kind](n - j) for j in range(1, n + 1)]


def fixed_point_correction(
    loss: Callable[[State], Tensor],
    states: Sequence[State],
    kind: Literal["exp", "linear", "const"] = "exp",
    gamma: float = 0.8,
) -> Tensor:
    """Weighted sum of a loss over states on the way to the equilibrium, the last one included.

    Args:
        loss: scalar loss of one state.
        states: `Solution.samples` followed by `Solution.state`.
        kind: see `correction_weights`.
        gamma: likewise.
    """
    weights = correction_weights(len(states), kind, gamma)
    terms = [weight * loss(state) for weight, state in zip(weights, states, strict=True)]
    return torch.stack(terms).sum()

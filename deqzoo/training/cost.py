"""FLOPs of a training step, counted in evaluations of the map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from deqzoo.equilibrium import JFB, NPG, UPG, Implicit, Unrolled, make_gradient


def count_flops(function: Callable[[], Any]) -> float:
    """FLOPs (two per multiply-add) of the convolutions and matrix products of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def gradient_cost(
    gradient: dict[str, Any], adjoint_evals: float = 0.0, detached: bool = False
) -> float:
    """Cost of the graph and the backward pass in forward evaluations of the map.

    Forward counts 1, a product with the transposed Jacobian 1, weight gradients 1 more.

    Args:
        gradient: its settings.
        adjoint_evals: products that an implicit gradient spent on average.
        detached: whether the map is recorded a second time for the products.
    """
    chosen = make_gradient(gradient)
    if isinstance(chosen, UPG):
        return 3.0 * chosen.steps
    if isinstance(chosen, JFB):
        return 3.0
    if isinstance(chosen, NPG):
        return (chosen.steps - 1) + 3.0 + float(detached)
    if isinstance(chosen, Implicit):
        return adjoint_evals + 3.0 + float(detached)
    assert isinstance(chosen, Unrolled)
    return 3.0 * (chosen.steps or 0)

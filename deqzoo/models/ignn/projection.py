"""Euclidean projections of a weight onto the set that keeps an implicit graph layer well posed.

X = phi(W X A + B) has one solution for every B when ||W||_inf <= kappa / rho(A) with kappa < 1 (Gu
et al., Implicit Graph Neural Networks, 2020). ||W||_inf is the largest absolute row sum, so the
projection treats each row by itself: the projection onto an L1 ball.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(dtype: torch.dtype) -> float:
    """Relative excess over the norm bound that counts as met: weights and sums are rounded."""
    return max(1e-6, torch.finfo(dtype).eps)


def project_rows(weight: Tensor, bound: float) -> Tensor:
    """Return the closest matrix whose absolute row sums are at most `bound`; weight (m, k).

    Rows that meet the bound up to rounding come back unchanged, bit for bit, so that projecting
    twice is projecting once. Sorting method of Duchi et al. (2008),
    all rows at once, in float32 or wider.
    """
    magnitude = _wide(weight).abs()
    outside = magnitude.sum(dim=1, keepdim=True) > bound * (1 + rounding(weight.dtype))
    if bound <= 0:
        return torch.zeros_like(weight)
    sorted_magnitude = magnitude.sort(dim=1, descending=True).values
    excess = sorted_magnitude.cumsum(dim=1) - bound
    rank = torch.arange(1, weight.shape[1] + 1, dtype=magnitude.dtype, device=weight.device)
    active = (sorted_magnitude * rank > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, active - 1) / active
    shrunk_weight = weight.sign() * (magnitude - threshold).clamp_min(0)
    return torch.where(outside, shrunk_weight.to(weight.dtype), weight)


def row_norm(weight: Tensor) -> float:
    """Return the infinity norm: the largest absolute row sum."""
    return float(row_sums(weight.detach()).max()) if weight.numel() else 0.0


def row_sums(weight: Tensor) -> Tensor:
    """Return the absolute row sums of weight (m, k), (m,) in float32 or wider."""
    return _wide(weight).abs().sum(dim=1)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))

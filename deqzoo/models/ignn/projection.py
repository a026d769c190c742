"""Euclidean projections of a weight onto the set that keeps an implicit graph layer well posed.

X = phi(W X A + B) has one solution for every B when ||W||_inf <= kappa / rho(A) with kappa < 1 (Gu
et al., Implicit Graph Neural Networks, 2020). ||W||_inf is the largest absolute row sum, so the
projection treats each row by itself: the projection onto an L1 ball.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_rows(weight: Tensor, bound: float) -> Tensor:
    """Return the closest matrix whose absolute row sums are at most `bound`; weight (m, k).

    Rows inside the ball come back unchanged, bit for bit. Sorting method of Duchi et al. (2008),
    all rows at once, in float32 or wider.
    """
    magnitude = _wide(weight).abs()
    outside = magnitude.sum(dim=1, keepdim=True) > bound
    if bound <= 0:
        return torch.zeros_like(weight)
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - bound
    rank = torch.arange(1, weight.shape[1] + 1, dtype=magnitude.dtype, device=weight.device)
    active = (ordered * rank > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, active - 1) / active
    shrunk = weight.sign() * (magnitude - threshold).clamp_min(0)
    return torch.where(outside, shrunk.to(weight.dtype), weight)


def project_columns(weight: Tensor, bound: float) -> Tensor:
    """Return the closest matrix whose absolute column sums are at most `bound`."""
    return project_rows(weight.T, bound).T


def project_rows_and_columns(weight: Tensor, bound: float) -> Tensor:
    """Project the rows, then the columns: both norms are at most `bound` afterwards.

    Shrinking columns can only shrink row sums, so one pass of each is enough.
    """
    return project_columns(project_rows(weight, bound), bound)


def row_norm(weight: Tensor) -> float:
    """Return the infinity norm: the largest absolute row sum."""
    return float(row_sums(weight.detach()).max()) if weight.numel() else 0.0


def row_sums(weight: Tensor) -> Tensor:
    """Return the absolute row sums of weight (m, k), (m,) in float32 or wider."""
    return _wide(weight).abs().sum(dim=1)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))

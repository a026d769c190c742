"""Metrics of classifiers and of equilibria, from per-sample numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()


def per_class_accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    """Share of each class's rows that are right: one entry per class, NaN without rows."""
    right = (logits.argmax(-1) == labels).double()
    n_classes = logits.shape[-1]
    totals = torch.bincount(labels, minlength=n_classes)
    return (torch.bincount(labels, weights=right, minlength=n_classes) / totals).tolist()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats."""
    return torch.nn.functional.cross_entropy(logits.double(), labels).item()


def expected_calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence.

    sum_b (n_b / n) |accuracy_b - confidence_b| (Guo et al. 2017); a bin holds (b/n, (b+1)/n].
    """
    confidence, prediction = logits.double().softmax(-1).max(-1)
    right = (prediction == labels).double()
    bins = (confidence * n_bins).ceil().long().clamp(1, n_bins) - 1
    gaps = torch.zeros(n_bins, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return (gaps.abs().sum() / len(labels)).item()


def equilibrium_summary(n_steps: Tensor, residual: Tensor, converged: Tensor) -> dict[str, float]:
    """How well a set of samples was solved.

    Args:
        n_steps: solver steps (N,); a solve of n steps evaluates F n + 1 times.
        residual: relative residuals (N,).
        converged: bool (N,).
    """
    steps, residual = n_steps.double(), residual.double()
    return {
        "n_steps_mean": steps.mean().item(),
        "n_steps_p95": steps.quantile(0.95).item(),
        "f_evaluations_per_sample": steps.mean().item() + 1,
        "residual_median": residual.nanquantile(0.5).item(),
        "residual_p95": residual.nanquantile(0.95).item(),
        "converged_share": converged.double().mean().item(),
    }

"""The figures of the zoo: one registry for evaluations, cards, the store's gate and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading a checkpoint's files needs no torch
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation.

    Attributes:
        words: what people call it.
        pattern: how a headline shows it; `percent` is a hundred times the value.
        higher_is_better: direction.
        share: whether it is a share of 1, shown in % and compared by differences; others are
            compared by ratios.
        hub: the Hub's name and title of it, for figures of a test split that cards' metadata list.
        baseline: name of the figure of the best constant answer, if there is one.
    """

    words: str
    pattern: str = "{value:.4g}"
    higher_is_better: bool = True
    share: bool = False
    hub: tuple[str, str] | None = None
    baseline: str | None = None

    def show(self, value: float) -> str:
        """The value as a headline: "91.10 %", "perplexity 100.98"."""
        return self.pattern.format(value=value, percent=100 * value)

    def distance(self, value: float, other: float) -> float:
        """How far two values are apart: a difference of shares, else relative to the second."""
        return abs(value - other) / (1.0 if self.share else abs(other))

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another one."""
        return value > other if self.higher_is_better else value < other


METRICS = {
    "accuracy": Metric(
        "accuracy",
        "{percent:.2f} %",
        share=True,
        hub=("accuracy", "Accuracy"),
        baseline="majority",
    ),
    "auc": Metric(
        "AUC", "AUC {value:.4f}", share=True, hub=("roc_auc", "Area under the ROC curve")
    ),
    "micro_f1": Metric(
        "micro-F1",
        "micro-F1 {percent:.2f} %",
        share=True,
        hub=("f1", "Micro-averaged F1"),
        baseline="constant_micro_f1",
    ),
    "perplexity": Metric(
        "perplexity",
        "perplexity {value:.2f}",
        higher_is_better=False,
        hub=("perplexity", "Perplexity"),
    ),
    "majority": Metric("accuracy of always naming the most frequent class", share=True),
    "constant_micro_f1": Metric("micro-F1 of the best answer that is always the same", share=True),
    "negative_log_likelihood": Metric("negative log likelihood, nats", higher_is_better=False),
    "expected_calibration_error": Metric(
        "expected calibration error", higher_is_better=False, share=True
    ),
    "n_steps_mean": Metric("solver steps, mean", higher_is_better=False),
    "n_steps_p95": Metric("solver steps, 95th percentile", higher_is_better=False),
    "f_evaluations_per_sample": Metric("evaluations of the map, mean", higher_is_better=False),
    "residual_median": Metric("relative residual, median", higher_is_better=False),
    "residual_p95": Metric("relative residual, 95th percentile", higher_is_better=False),
    "residual_max": Metric("relative residual, largest", higher_is_better=False),
    "converged_share": Metric("share that met the tolerance", share=True),
    "seconds_per_sample": Metric("seconds per sample", higher_is_better=False),
}
"""Every figure that an evaluation file may hold, by its name there."""


def words(name: str | None) -> str:
    """What people call a figure; the name itself, without underscores, where it is not known."""
    return METRICS[name].words if name in METRICS else (name or "quality").replace("_", " ")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()


def majority(labels: Tensor) -> float:
    """Accuracy of always naming the most frequent class."""
    return labels.bincount().max().item() / len(labels)


def per_class_accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    """Share of each class's rows that are right: one entry per class, NaN without rows."""
    right = (logits.argmax(-1) == labels).double()
    n_classes = logits.shape[-1]
    totals = labels.bincount(minlength=n_classes)
    return (labels.bincount(weights=right, minlength=n_classes) / totals).tolist()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.double(), labels).item()


def expected_calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence.

    sum_b (n_b / n) |accuracy_b - confidence_b| (Guo et al. 2017); a bin holds (b/n, (b+1)/n].
    """
    confidence, prediction = logits.double().softmax(-1).max(-1)
    right = (prediction == labels).double()
    bins = (confidence * n_bins).ceil().long().clamp(1, n_bins) - 1
    gaps = confidence.new_zeros(n_bins).index_add_(0, bins, right - confidence)
    return (gaps.abs().sum() / len(labels)).item()


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores (n,), ties counted half; labels are 0 or 1.

    NaN where only one class occurs.
    """
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    n_below = counts.cumsum(0) - counts
    rank = (n_below + (counts + 1) / 2).double()[inverse]  # mean rank of equal scores, from 1
    positive = labels == 1
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    excess = float(rank[positive].sum()) - n_positive * (n_positive + 1) / 2
    return excess / (n_positive * n_negative)


def micro_f1(predictions: Tensor, labels: Tensor) -> float:
    """Micro-averaged F1 = 2 TP / (2 TP + FP + FN) of binary predictions (n, c); 0 without any."""
    hits = float((predictions * labels).sum())
    total = float(predictions.sum() + labels.sum())
    return 2 * hits / total if total else 0.0


def constant_micro_f1(labels: Tensor) -> float:
    """Micro-F1 of the best answer that is the same for all rows of labels (n, c)."""
    from torch import arange

    counts = labels.double().sum(0).sort(descending=True).values
    n_named = len(labels) * arange(1, len(counts) + 1)
    return (2 * counts.cumsum(0) / (n_named + counts.sum())).max().item()


def best_threshold(logits: Tensor, labels: Tensor) -> float:
    """The probability from which a label should be named for the best micro-F1.

    Args:
        logits: (n, c), one per label.
        labels: (n, c) of 0 and 1.

    Returns:
        One threshold for all labels, halfway between the last probability that is named and the
        next lower one.
    """
    from torch import arange

    scores, order = logits.double().sigmoid().flatten().sort(descending=True)
    hits = labels.double().flatten()[order].cumsum(0)
    n_named = arange(1, len(scores) + 1, device=scores.device)
    f1 = 2 * hits / (n_named + hits[-1])
    f1[:-1][scores[:-1] == scores[1:]] = -1  # equal scores are named together
    best = int(f1.argmax())
    next_score = scores[best + 1] if best + 1 < len(scores) else scores.new_zeros(())
    return max(float((scores[best] + next_score) / 2), 1e-12)  # a probability, above 0


def classification_figures(
    logits: Tensor, labels: Tensor, threshold: float = 0.5
) -> dict[str, Any]:
    """The figures of a classifier, with the baselines of a constant answer.

    Args:
        logits: (n, c).
        labels: classes (n,), int64; or several labels per row, (n, c) of 0 and 1.
        threshold: probability from which one of several labels is named.

    Returns:
        Micro-F1 for several labels; else accuracy, likelihood and calibration, and the area under
        the ROC curve where there are two classes.
    """
    if labels.ndim == 2:
        return {
            "micro_f1": micro_f1((logits.sigmoid() > threshold).to(labels.dtype), labels),
            "constant_micro_f1": constant_micro_f1(labels),
        }
    figures = {"accuracy": accuracy(logits, labels), "majority": majority(labels)}
    if logits.shape[1] == 2:
        figures["auc"] = area_under_curve(logits[:, 1] - logits[:, 0], labels)
    return figures | {
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "expected_calibration_error": expected_calibration_error(logits, labels),
    }


def joined_summary(reports: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """`equilibrium_summary` of several batches' steps, residuals and, where told, convergence."""
    from torch import cat

    return equilibrium_summary(*(cat(list(values)) for values in zip(*reports, strict=True)))


def equilibrium_summary(
    n_steps: Tensor, residual: Tensor, converged: Tensor | None = None
) -> dict[str, float]:
    """How well a set of samples was solved.

    Args:
        n_steps: solver steps (N,); a solve of n steps evaluates F n + 1 times.
        residual: relative residuals (N,).
        converged: bool (N,), where it is known.
    """
    steps, residual = n_steps.double(), residual.double()
    summary = {
        "n_steps_mean": steps.mean().item(),
        "n_steps_p95": steps.quantile(0.95).item(),
        "f_evaluations_per_sample": steps.mean().item() + 1,
        "residual_median": residual.nanquantile(0.5).item(),
        "residual_p95": residual.nanquantile(0.95).item(),
    }
    if converged is not None:
        summary["converged_share"] = converged.double().mean().item()
    return summary

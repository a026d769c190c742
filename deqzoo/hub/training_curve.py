"""Quality against compute: a checkpoint's validation curve beside the published run."""

from __future__ import annotations

from typing import Any

from deqzoo.evaluation.chart import line_chart
from deqzoo.tasks.metrics import METRICS, words

PUBLISHED_CIFAR = {
    1.4: 38.1, 2.8: 49.4, 6.9: 64.1, 14.0: 78.6, 28.0: 84.2, 42.0: 87.3, 69.0: 89.4, 111.0: 90.4,
    166.0: 91.0, 222.0: 93.8, 277.0: 94.8, 304.0: 94.7,
}  # fmt: skip
"""PFLOP -> test accuracy in %: the authors' log of MDEQ LARGE on CIFAR-10 with UPG(5, 0.5), over
220 epochs; PFLOP counted from the architecture (33 evaluations of the map per picture)."""

PUBLISHED_LABEL = "authors' LARGE, test"


def points(
    record: dict[str, Any], metric: str | None = None
) -> tuple[str, list[tuple[float, float]]] | None:
    """Name of the figure, and (PFLOP, figure) of every validation of a run; shares in %.

    Args:
        record: of the run.
        metric: figure that the model is measured by; where its validations lack it, and where
            nothing was measured, the first known one stands for it.
    """
    rows = record.get("validation")
    if "pflop" not in record or not rows:
        return None  # graph models keep other records
    curve = [row for row in rows if row["pflop"] > 0]
    if len(curve) < 2:
        return None
    names = (key for key in (metric, *METRICS) if key in METRICS and METRICS[key].hub)
    name = next((key for key in names if key in curve[0]), None)
    if name is None:
        return None
    scale = 100 if METRICS[name].share else 1
    return name, [(row["pflop"], scale * row[name]) for row in curve]


def draw(name: str, record: dict[str, Any], metric: str | None = None) -> str | None:
    """The curve as SVG, on CIFAR-10 beside the published one; None for runs without one."""
    named_curve = points(record, metric)
    if named_curve is None:
        return None
    figure, curve = named_curve
    series = {"here, validation": curve}
    if is_cifar(record):
        series[PUBLISHED_LABEL] = sorted(PUBLISHED_CIFAR.items())
    return line_chart(
        series,
        title=f"{name}: {words(figure)} against compute",
        x_label="PFLOP spent in training",
        y_label=words(figure) + (", %" if METRICS[figure].share else ""),
        log_x=True,
        log_y=not METRICS[figure].share,
    )


def describe(record: dict[str, Any], metric: str | None = None) -> str | None:
    """The curve in words: what was reached for which compute, and what the published run took."""
    named_curve = points(record, metric)
    if named_curve is None:
        return None
    figure, curve = named_curve
    unit = " %" if METRICS[figure].share else ""
    shown_points = (
        curve if len(curve) <= 8 else [curve[i * (len(curve) - 1) // 7] for i in range(8)]
    )
    text = f"Validation {words(figure)} after so many PFLOP: " + ", ".join(
        f"{y:.1f}{unit} after {x:.3g}" for x, y in shown_points
    )
    if not is_cifar(record):
        return text + "."
    best = max(y for _, y in curve)
    later_points = [(x, y) for x, y in sorted(PUBLISHED_CIFAR.items()) if y >= best]
    if not later_points:
        return text + "."
    return (
        f"{text}. The authors' run of their largest model reaches {later_points[0][1]:.1f} % on "
        f"the test split after {later_points[0][0]:.3g} PFLOP (their log; PFLOP counted from the "
        "architecture)."
    )


def is_cifar(record: dict[str, Any]) -> bool:
    """Whether a run was trained on the data of the published curve."""
    return record.get("recipe", {}).get("data", {}).get("name") == "cifar10"

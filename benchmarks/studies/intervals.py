"""Means over seeds with what is known of them: spread, and intervals of paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}
"""97.5 % quantile of Student's t for the mean of so many values."""


def spread(values: list[float]) -> str:
    """Mean, and the sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t."""
    return T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def differences(mine: Mapping[str, float], others: Mapping[str, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [value - others[seed] for seed, value in mine.items() if seed in others]


def by_seed(cells: Mapping[str, Any], mark: str) -> dict[str, dict[str, Any]]:
    """Cells by variant and seed; keys are a variant, `mark` and a seed, and others are left out."""
    table: dict[str, dict[str, Any]] = {}
    for key, cell in cells.items():
        variant, _, seed = key.rpartition(mark)
        if seed.isdigit():
            table.setdefault(variant, {})[seed] = cell
    return table


def paired(mine: Mapping[str, float], others: Mapping[str, float]) -> str:
    """Differences of the seeds that both have, in words.

    Mean ± standard deviation and the 95 % interval of the mean by Student's t; "" for fewer than
    two pairs.
    """
    points = differences(mine, others)
    if len(points) < 2:
        return ""
    mean, half = statistics.mean(points), half_interval(points)
    return f"{spread(points)} ({mean - half:.1f} to {mean + half:.1f})"

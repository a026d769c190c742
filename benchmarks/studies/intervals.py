"""Means over seeds with what is known of them: spread, and intervals of paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}
"""97.5 % quantile of Student's t for the mean of so many values."""


def spread(values: list[float]) -> str:
    """Mean, and the sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def paired(mine: Mapping[str, float], others: Mapping[str, float]) -> str:
    """Differences of the seeds that both have.

    Mean ± standard deviation and the 95 % interval of the mean by Student's t; "" for fewer than
    two pairs.
    """
    found = [value - others[seed] for seed, value in mine.items() if seed in others]
    if len(found) < 2:
        return ""
    mean = statistics.mean(found)
    half = T_95[len(found)] * statistics.stdev(found) / len(found) ** 0.5
    return f"{spread(found)} ({mean - half:.1f} to {mean + half:.1f})"

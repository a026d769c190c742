"""Small charts as SVG, whose colours follow the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 370, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 42
N_COLOURS = 6
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A linear scale from data to pixels, with labelled ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[tuple[float, str]]

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def power_of_ten(exponent: float) -> str:
    """ "10⁻³" for -3; "3 · 10⁻³" is never needed."""
    return "10" + str(round(exponent)).translate(_SUPERSCRIPTS)


def residual_chart(residuals: Sequence[float], tolerance: float) -> str:
    """Residual per solver step on a logarithmic axis, with the tolerance as a dashed line."""
    points = [
        (float(step), math.log10(max(value, 1e-12)))
        for step, value in enumerate(residuals, start=1)
        if math.isfinite(value)
    ]
    level = math.log10(max(tolerance, 1e-12))
    heights = [y for _, y in points]
    # The tolerance's own line should not lie on the frame.
    low = math.floor(min([level - 0.05, *heights]))
    high = math.ceil(max([level + 0.05, *heights]))
    stride = max(1, math.ceil((high - low) / 5))
    ticks = [(float(t), power_of_ten(t)) for t in range(low, high + 1, stride)]
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, ticks)
    x = _step_axis(len(residuals))
    line_y = y(level)
    parts = [
        f'<line class="dz-tolerance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{line_y:.1f}" '
        f'y2="{line_y:.1f}"/>',
        f'<text class="dz-tolerance-label" x="{LEFT + 6}" y="{line_y - 6:.1f}">'
        f"tolerance {tolerance:.2g}</text>",
        _line(points, x, y, 0, "step {x:.0f}: residual 10^{y:.2f}"),
    ]
    summary = f"Residual per solver step; the last of {len(residuals)} is "
    summary += f"{residuals[-1]:.2g}" if residuals else "missing"
    title = "Distance to the equilibrium"
    return _figure(title, summary, x, y, parts, legend="")


def probability_chart(series: Mapping[str, Sequence[float]]) -> str:
    """Probability of some classes after each solver step."""
    length = max((len(values) for values in series.values()), default=0)
    ticks = [(t / 4, f"{25 * t} %") for t in range(5)]
    y = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP, ticks)
    x = _step_axis(length)
    parts, legend = [], []
    for index, (name, values) in enumerate(series.items()):
        points = [(float(k), v) for k, v in enumerate(values, start=1) if math.isfinite(v)]
        parts.append(_line(points, x, y, index, escape(name) + ", step {x:.0f}: {y:.1%}"))
        legend.append(
            f'<span class="dz-key"><i class="dz-chip dz-fill-{index % N_COLOURS}"></i>'
            f"{escape(name)}</span>"
        )
    summary = "Class probabilities per solver step: " + ", ".join(series)
    return _figure("What it would answer after each step", summary, x, y, parts, "".join(legend))


def _step_axis(length: int) -> Axis:
    last = max(length, 1)
    stride = max(1, math.ceil(last / 8))
    ticks = [(float(k), str(k)) for k in range(stride if stride > 1 else 1, last + 1, stride)]
    return Axis(1.0, float(max(last, 2)), LEFT + 10, WIDTH - RIGHT - 10, ticks)


def _line(points: Sequence[tuple[float, float]], x: Axis, y: Axis, index: int, tip: str) -> str:
    colour = index % N_COLOURS
    where = [(x(a), y(b)) for a, b in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in where)
    dots = "".join(
        f'<circle class="dz-fill-{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.2">'
        f"<title>{tip.format(x=point[0], y=point[1])}</title></circle>"
        for (a, b), point in zip(where, points, strict=True)
    )
    return f'<polyline class="dz-line dz-stroke-{colour}" points="{path}"/>{dots}'


def _figure(title: str, summary: str, x: Axis, y: Axis, parts: Sequence[str], legend: str) -> str:
    grid = [
        f'<line class="dz-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{label}</text>'
        for t, label in y.ticks
    ]
    grid += [
        f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{label}</text>'
        for t, label in x.ticks
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    grid.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">solver step</text>')
    return (
        f'<figure class="dz-chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f"{''.join(grid)}{''.join(parts)}</svg>"
        f'<div class="dz-legend">{legend}</div></figure>'
    )

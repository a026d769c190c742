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


def residual_chart(
    residuals: Sequence[float], tolerance: float, answer_step: int | None = None
) -> str:
    """Residual per solver step on a logarithmic axis, with the tolerance as a dashed line.

    `answer_step` marks the step whose state is the answer, where that is not the last one.
    """
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
        _answer_mark(x, answer_step),
    ]
    summary = f"Residual per solver step; the last of {len(residuals)} is "
    summary += f"{residuals[-1]:.2g}" if residuals else "missing"
    title = "Distance to the equilibrium"
    return _figure(title, summary, x, y, parts, legend="")


def _answer_mark(x: Axis, step: int | None) -> str:
    if step is None:
        return ""
    return (
        f'<line class="dz-answer" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"><title>the answer is that of step {step}</title></line>'
    )


def probability_chart(series: Mapping[str, Sequence[float]], answer_step: int | None = None) -> str:
    """Probability of some classes after each solver step; `answer_step` as in `residual_chart`."""
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
    parts.append(_answer_mark(x, answer_step))
    summary = "Class probabilities per solver step: " + ", ".join(series)
    return _figure("What it would answer after each step", summary, x, y, parts, "".join(legend))


def curves(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    tip: str,
    x_label: str = "solver step",
    log_y: bool = False,
    percent: bool = False,
    level: float | None = None,
) -> str:
    """Several lines over steps or depths.

    Args:
        title: of the chart.
        series: (x, y) of every line by its name.
        tip: format of what a point says, with x and y.
        x_label: below the axis.
        log_y: powers of ten on the vertical axis.
        percent: the values are shares.
        level: the tolerance, as a dashed line.
    """

    def place(value: float) -> float:
        return math.log10(max(value, 1e-12)) if log_y else value

    values = [place(v) for points in series.values() for _, v in points if math.isfinite(v)]
    if log_y:
        # The tolerance's own line should not lie on the frame.
        low = min(map(math.floor, [*values, place(level) - 0.05 if level else 0.0]))
        high = max(map(math.ceil, [*values, 0.0]))
        ticks = [(float(t), power_of_ten(t)) for t in range(low, high + 1)]
        y = Axis(low, high, HEIGHT - BOTTOM, TOP, ticks)
    elif percent:
        y = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP, [(t / 4, f"{25 * t} %") for t in range(5)])
    else:
        top = max(values, default=1.0)
        stride = _round_stride(top / 4)
        ticks = [(stride * t, f"{stride * t:g}") for t in range(math.ceil(top / stride) + 1)]
        y = Axis(0.0, ticks[-1][0], HEIGHT - BOTTOM, TOP, ticks)
    x = _step_axis(int(max((a for points in series.values() for a, _ in points), default=1)))
    parts, legend = [], []
    if level:
        line_y = y(place(level))
        parts.append(
            f'<line class="dz-tolerance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{line_y:.1f}" '
            f'y2="{line_y:.1f}"/>'
        )
        legend.append(f'<span class="dz-key">dashed: tolerance {level:.2g}</span>')
    for index, (name, points) in enumerate(series.items()):
        drawn = [(a, place(b)) for a, b in points if math.isfinite(b)]
        said = [tip.format(x=a, y=b) for a, b in points if math.isfinite(b)]
        parts.append(_drawn_line(drawn, said, x, y, index, escape(name)))
        legend.append(
            f'<span class="dz-key"><i class="dz-chip dz-fill-{index % N_COLOURS}"></i>'
            f"{escape(name)}</span>"
        )
    ends = ", ".join(
        f"{name} ends at " + tip.format(x=points[-1][0], y=points[-1][1])
        for name, points in series.items()
        if points
    )
    return _figure(title, f"{title}: {ends}", x, y, parts, "".join(legend), x_label)


def _round_stride(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not smaller."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 5, 10) if unit * step >= value * 0.999)


def _step_axis(length: int) -> Axis:
    last = max(length, 1)
    stride = max(1, math.ceil(last / 8))
    ticks = [(float(k), str(k)) for k in range(stride if stride > 1 else 1, last + 1, stride)]
    return Axis(1.0, float(max(last, 2)), LEFT + 10, WIDTH - RIGHT - 10, ticks)


def _line(points: Sequence[tuple[float, float]], x: Axis, y: Axis, index: int, tip: str) -> str:
    said = [tip.format(x=a, y=b) for a, b in points]
    return _drawn_line(points, said, x, y, index, "")


def _drawn_line(
    points: Sequence[tuple[float, float]],
    said: Sequence[str],
    x: Axis,
    y: Axis,
    index: int,
    name: str,
) -> str:
    colour = index % N_COLOURS
    where = [(x(a), y(b)) for a, b in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in where)
    dots = "".join(
        f'<circle class="dz-fill-{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.2">'
        f"<title>{name + ', ' if name else ''}{words}</title></circle>"
        for (a, b), words in zip(where, said, strict=True)
    )
    return f'<polyline class="dz-line dz-stroke-{colour}" points="{path}"/>{dots}'


def _figure(
    title: str,
    summary: str,
    x: Axis,
    y: Axis,
    parts: Sequence[str],
    legend: str,
    x_label: str = "solver step",
) -> str:
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
    grid.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{x_label}</text>')
    return (
        f'<figure class="dz-chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f"{''.join(grid)}{''.join(parts)}</svg>"
        f'<div class="dz-legend">{legend}</div></figure>'
    )

"""Line charts as SVG text, for files and for the demo's page; the same numbers, the same text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

Series = Mapping[str, Sequence[tuple[float, float]]]

COLOURS = (
    "#1f6fb4", "#d1493f", "#3a9b4a", "#8a5bb5", "#c88a1a", "#3bb0b5", "#c24d95", "#6f6f6f",
)  # fmt: skip
PAGE_COLOURS = 6
"""How many the demo's style sheet has."""
LEAST = 1e-12
"""What the page draws on a logarithmic axis for anything smaller, zero included."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class _Frame:
    """Size of a drawing, and its margins."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


_FILE = _Frame(560, 320, 62, 150, 30, 44)
_PAGE = _Frame(370, 240, 48, 10, 12, 42)


def line_chart(
    series: Series,
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """A file with named lines of points (x, y) and a legend; a single line without a name has none.

    Args:
        series: points by name; those that are not finite, or not positive on a logarithmic axis,
            are left out.
        title, x_label, y_label: texts.
        log_x, log_y: logarithmic axes.
        y_range: instead of the range of the points.
        x_ticks: instead of round ones.
    """
    frame = _FILE if list(series) != [""] else replace(_FILE, right=20)
    curves = {
        name: [
            (x, y)
            for x, y in points
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)
            and (y > 0 or not log_y)
        ]
        for name, points in series.items()
    }  # fmt: skip
    flat = [point for points in curves.values() for point in points] or [(1.0, 1.0)]
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    across = Axis([x for x, _ in flat], log_x, frame.left, right)
    up = Axis(y_range or [y for _, y in flat], log_y, bottom, frame.top)
    parts = [
        *sheet(frame.width, frame.height),
        label((frame.left + right) / 2, 18, title, size=13),
        label((frame.left + right) / 2, frame.height - 8, x_label),
        f'<g transform="translate(14,{frame.height / 2}) rotate(-90)">{label(0, 0, y_label)}</g>',
    ]
    for value in x_ticks or across.ticks():
        x = across.place(value)
        parts.append(f'<path d="M{x},{frame.top} V{bottom}" stroke="#ddd"/>')
        parts.append(label(x, bottom + 15, f"{value:g}"))
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<path d="M{frame.left},{y} H{right}" stroke="#ddd"/>')
        parts.append(label(frame.left - 5, y + 4, f"{value:g}", anchor="end"))
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = "" if number < len(COLOURS) else ' stroke-dasharray="5 3"'
        style = f'fill="none" stroke="{colour}" stroke-width="1.8"{dash}'
        positions = [(across.place(x), up.place(y)) for x, y in points]
        parts.append(f'<polyline points="{_path(positions)}" {style}/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.2" fill="{colour}"/>' for x, y in positions]
        if name:
            top, left = frame.top + 10 + 17 * number, frame.width - frame.right + 10
            parts.append(f'<path d="M{left},{top} h16" {style}/>')
            parts.append(label(left + 21, top + 4, name, anchor="start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def page_chart(
    series: Series,
    *,
    title: str,
    tip: str,
    x_label: str = "solver step",
    log_y: bool = False,
    percent: bool = False,
    level: float | None = None,
    mark: int | None = None,
) -> str:
    """A figure of the demo's page: coloured by its style sheet, light or dark; a tip per point.

    Args:
        series: points by name, x a whole number from 1 on; those that are not finite are left out.
        title: of the chart.
        tip: format of what a point says, with x and y.
        x_label: below the axis.
        log_y: powers of ten on the vertical axis.
        percent: the values are shares.
        level: the tolerance, as a dashed line.
        mark: the step whose state is the answer, where it deserves a line.
    """
    frame = _PAGE
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    curves = {
        name: [(x, max(y, LEAST) if log_y else y) for x, y in points if math.isfinite(y)]
        for name, points in series.items()
    }
    values = [y for points in curves.values() for _, y in points]
    values += [level] if level else []
    last = int(max((x for points in series.values() for x, _ in points), default=1))
    whole = values or [1.0] if log_y else [0.0, *values, LEAST]
    across = Axis((1.0, max(last, 2)), False, frame.left, right)
    up = Axis((0.0, 1.0) if percent else whole, log_y, bottom, frame.top)
    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0) if percent else up.ticks():
        y = up.place(value)
        tick_text = f"{100 * value:.0f} %" if percent else _power(value) if log_y else f"{value:g}"
        parts.append(f'<line class="dz-grid" x1="{frame.left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(_words(frame.left - 8, y + 4, tick_text, "end"))
    stride = max(1, math.ceil(last / 8))
    for step in range(stride, last + 1, stride):
        parts.append(_words(across.place(step), bottom + 19, str(step)))
    parts.append(_words((frame.left + right) / 2, frame.height - 4, x_label))
    legend = []
    if level:
        y = up.place(level)
        dashes = f'x1="{frame.left}" x2="{right}" y1="{y}" y2="{y}"'
        parts.append(f'<line class="dz-tolerance" {dashes}/>')
        legend.append(f'<span class="dz-key">dashed: tolerance {level:.2g}</span>')
    ends = []
    for number, (name, points) in enumerate(curves.items()):
        colour, before = number % PAGE_COLOURS, f"{name}, " if name else ""
        positions = [(across.place(x), up.place(y)) for x, y in points]
        tips = [escape(before + tip.format(x=x, y=y)) for x, y in points]
        parts.append(f'<polyline class="dz-line dz-stroke-{colour}" points="{_path(positions)}"/>')
        parts += [
            f'<circle class="dz-fill-{colour}" cx="{x}" cy="{y}" r="3.2"><title>{text}</title>'
            "</circle>"
            for (x, y), text in zip(positions, tips, strict=True)
        ]
        ends += tips[-1:]
        if name:
            chip = f'<i class="dz-chip dz-fill-{colour}"></i>'
            legend.append(f'<span class="dz-key">{chip}{escape(name)}</span>')
    if mark is not None:
        x = across.place(mark)
        parts.append(
            f'<line class="dz-answer" x1="{x}" x2="{x}" y1="{frame.top}" y2="{bottom}">'
            f"<title>the answer is that of step {mark}</title></line>"
        )
    return (
        f'<figure class="dz-chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(title)}, at the end: {"; ".join(ends)}">{"".join(parts)}</svg>'
        f'<div class="dz-legend">{"".join(legend)}</div></figure>'
    )


def sheet(width: float, height: float) -> list[str]:
    """The beginning of a file: its size and a white ground."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]


def label(x: float, y: float, text: str, size: int = 11, anchor: str = "middle") -> str:
    """A text in a file."""
    escaped_text = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escaped_text}</text>'


class Axis:
    """Maps values to positions and chooses round ticks.

    Args:
        values: what must fit.
        log: a logarithmic scale, for positive values.
        start, end: positions between which they lie, with a margin.
    """

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = self._scale(min(values)), self._scale(max(values))
        margin = (high - low) * 0.04 or 0.5
        self.low, self.high = low - margin, high + margin

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        """Position of a value, to a tenth."""
        share = (self._scale(value) - self.low) / (self.high - self.low)
        share = min(max(share, 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        span = self.high - self.low
        if self.log and span > 1.2:
            whole = range(math.ceil(self.low), math.floor(self.high) + 1)
            return [10.0**e for e in whole][:: max(1, len(whole) // 6)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
        first = math.ceil(low / step)
        count = math.floor(high / step) - first + 1
        return [float(f"{(first + i) * step:.10g}") for i in range(count)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _words(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _power(value: float) -> str:
    """ "10⁻³" for a power of ten, else the number."""
    exponent = math.log10(value)
    whole = math.isclose(exponent, round(exponent), abs_tol=1e-9)
    return "10" + str(round(exponent)).translate(_SUPERSCRIPTS) if whole else f"{value:g}"

"""Line and dot charts as SVG text; the same numbers always give the same text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 150, 30, 44
_ROW = 22
_COLOURS = (
    "#1f6fb4", "#d1493f", "#3a9b4a", "#8a5bb5", "#c88a1a", "#3bb0b5", "#c24d95", "#6f6f6f",
)  # fmt: skip

Series = Mapping[str, Sequence[tuple[float, float]]]


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
    """Named lines of points (x, y) with a legend; a single line without a name has none.

    Args:
        series: points by name; those that are not finite, or not positive on a logarithmic axis,
            are left out.
        title, x_label, y_label: texts.
        log_x, log_y: logarithmic axes.
        y_range: instead of the range of the points.
        x_ticks: instead of round ones.
    """
    side = 20 if list(series) == [""] else _RIGHT
    kept = {
        name: [
            (x, y)
            for x, y in points
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)
            and (y > 0 or not log_y)
        ]
        for name, points in series.items()
    }  # fmt: skip
    flat = [point for points in kept.values() for point in points] or [(1.0, 1.0)]
    across = _Axis([x for x, _ in flat], log_x, _LEFT, _WIDTH - side)
    up = _Axis(y_range or [y for _, y in flat], log_y, _HEIGHT - _BOTTOM, _TOP)
    middle = (_LEFT + _WIDTH - side) / 2
    parts = [
        *_sheet(_HEIGHT),
        _text(middle, 18, title, size=13),
        _text(middle, _HEIGHT - 8, x_label),
        f'<g transform="translate(14,{_HEIGHT / 2}) rotate(-90)">{_text(0, 0, y_label)}</g>',
    ]
    for value in x_ticks or across.ticks():
        x = across.place(value)
        parts.append(f'<path d="M{x},{_TOP} V{_HEIGHT - _BOTTOM}" stroke="#ddd"/>')
        parts.append(_text(x, _HEIGHT - _BOTTOM + 15, f"{value:g}"))
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<path d="M{_LEFT},{y} H{_WIDTH - side}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 5, y + 4, f"{value:g}", anchor="end"))
    for number, (name, points) in enumerate(kept.items()):
        parts += _line(number, name, points, across, up)
    return "\n".join([*parts, "</svg>"]) + "\n"


def dot_chart(
    rows: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, x_label: str
) -> str:
    """One line of dots per name, coloured by group, with a bar at the mean of every group.

    Args:
        rows: values by name and group; at least one value in all.
        title, x_label: texts.
    """
    left, right, legend = 190, _WIDTH - 20, 18
    groups = list(dict.fromkeys(group for row in rows.values() for group in row))
    top = _TOP + (legend if len(groups) > 1 else 0)
    bottom = top + _ROW * len(rows)
    values = [value for row in rows.values() for group in row.values() for value in group]
    across = _Axis(values, False, left, right)
    parts = [*_sheet(bottom + _BOTTOM), _text(_WIDTH / 2, 18, title, size=13)]
    parts.append(_text((left + right) / 2, bottom + _BOTTOM - 8, x_label))
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<path d="M{x},{top} V{bottom}" stroke="#ddd"/>')
        parts.append(_text(x, bottom + 15, f"{value:g}"))
    if len(groups) > 1:
        x = 20
        for number, group in enumerate(groups):
            colour = _COLOURS[number % len(_COLOURS)]
            parts.append(f'<circle cx="{x}" cy="{_TOP + 6}" r="3" fill="{colour}"/>')
            parts.append(_text(x + 8, _TOP + 10, group, anchor="start"))
            x += 26 + 6 * len(group)
    for place, (name, row) in enumerate(rows.items()):
        y = top + _ROW * (place + 0.5)
        parts.append(_text(left - 8, y + 4, name, anchor="end"))
        for group, found in row.items():
            colour = _COLOURS[groups.index(group) % len(_COLOURS)]
            mean = across.place(sum(found) / len(found))
            parts.append(f'<path d="M{mean},{y - 7} v14" stroke="{colour}" stroke-width="2"/>')
            parts += [
                f'<circle cx="{across.place(v)}" cy="{y}" r="3" fill="{colour}"/>' for v in found
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _sheet(height: float) -> list[str]:
    """The beginning of a drawing: its size and a white ground."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]


def _line(
    number: int,
    name: str,
    points: Sequence[tuple[float, float]],
    across: _Axis,
    up: _Axis,
) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    dash = "" if number < len(_COLOURS) else ' stroke-dasharray="5 3"'
    placed = [(across.place(x), up.place(y)) for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in placed)
    top = _TOP + 10 + 17 * number
    left = _WIDTH - _RIGHT + 10
    style = f'fill="none" stroke="{colour}" stroke-width="1.8"{dash}'
    legend = [
        f'<path d="M{left},{top} h16" {style}/>',
        _text(left + 21, top + 4, name, anchor="start"),
    ]
    return [
        f'<polyline points="{path}" {style}/>',
        *(f'<circle cx="{x}" cy="{y}" r="2.2" fill="{colour}"/>' for x, y in placed),
        *(legend if name else ()),
    ]


class _Axis:
    """Maps values to positions and chooses round ticks."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = self._scaled(min(values)), self._scaled(max(values))
        margin = (high - low) * 0.04 or 0.5
        self.low, self.high = low - margin, high + margin

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self.low) / (self.high - self.low)
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


def _text(x: float, y: float, text: str, size: int = 11, anchor: str = "middle") -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escaped}</text>'

"""A small line plot as SVG text; the same numbers always give the same text."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 28, 44


def line_plot(
    points: Sequence[tuple[float, float]], *, title: str, x_label: str, y_label: str
) -> str:
    """Points joined by a line over a logarithmic x axis, each with its values written out.

    Args:
        points: (x, y) with positive x, in ascending order, at least two.
        title, x_label, y_label: texts without markup.
    """
    xs = [log2(x) for x, _ in points]
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = (high - low or 1.0) * 0.15
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (log2(x) - xs[0]) / (xs[-1] - xs[0])
        up = (y - low) / (high - low)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    placed = [place(x, y) for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in placed)
    base = _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_WIDTH / 2, 16, title, size=13),
        f'<path d="M{_LEFT},{_TOP} V{base} H{_WIDTH - _RIGHT}" fill="none" stroke="#444"/>',
        f'<polyline points="{path}" fill="none" stroke="#1f6fb4" stroke-width="2"/>',
        _text(_WIDTH / 2, _HEIGHT - 8, x_label),
        f'<g transform="translate(14,{_HEIGHT / 2}) rotate(-90)">{_text(0, 0, y_label)}</g>',
    ]
    for (x, y), (left, top) in zip(points, placed, strict=True):
        parts.append(f'<circle cx="{left}" cy="{top}" r="3" fill="#1f6fb4"/>')
        parts.append(_text(left, top - 7, f"{y:g}"))
        parts.append(_text(left, base + 15, f"{x:g}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, size: int = 11) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}">{escaped}</text>'

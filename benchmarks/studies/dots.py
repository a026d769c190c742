"""Dot charts of studies: every run a dot, every mean a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deqzoo.evaluation.chart import COLOURS, Axis, label, sheet

_WIDTH, _TOP, _BOTTOM, _ROW = 560, 30, 44, 22


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
    across = Axis(values, False, left, right)
    parts = [*sheet(_WIDTH, bottom + _BOTTOM), label(_WIDTH / 2, 18, title, size=13)]
    parts.append(label((left + right) / 2, bottom + _BOTTOM - 8, x_label))
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<path d="M{x},{top} V{bottom}" stroke="#ddd"/>')
        parts.append(label(x, bottom + 15, f"{value:g}"))
    if len(groups) > 1:
        x = 20
        for number, group in enumerate(groups):
            colour = COLOURS[number % len(COLOURS)]
            parts.append(f'<circle cx="{x}" cy="{_TOP + 6}" r="3" fill="{colour}"/>')
            parts.append(label(x + 8, _TOP + 10, group, anchor="start"))
            x += 26 + 6 * len(group)
    for place, (name, row) in enumerate(rows.items()):
        y = top + _ROW * (place + 0.5)
        parts.append(label(left - 8, y + 4, name, anchor="end"))
        for group, found in row.items():
            colour = COLOURS[groups.index(group) % len(COLOURS)]
            mean = across.place(sum(found) / len(found))
            parts.append(f'<path d="M{mean},{y - 7} v14" stroke="{colour}" stroke-width="2"/>')
            parts += [
                f'<circle cx="{across.place(v)}" cy="{y}" r="3" fill="{colour}"/>' for v in found
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"

"""Why a DEQ: what the demo measures on the spot, and how it shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from deqzoo.errors import UserError
from deqzoo.evaluation.chart import page_chart
from deqzoo.evaluation.watch import Watched, training_memory, watch
from deqzoo.hub.card_texts import data_title
from deqzoo.models.readers import to_batch

from . import examples
from .guard import Deadline
from .images import data_url, open_picture, thumbnail
from .shelf import LoadedCheckpoint

DEPTHS = (1, 2, 4, 8, 16, 24, 32)


@dataclass(frozen=True)
class Measurement:
    """What one visit measures.

    Attributes:
        gradient: the model's own, in words.
        memory: bytes kept for backward, as of `training_memory` at `DEPTHS`.
        names: the classes.
        truths: class of every picture, by number.
        pictures: thumbnails as URLs, in the same order.
        trajectory: the solve of all of them.
        budget: solver steps and accuracy in the checkpoint's evaluation file, with what it counts.
        tolerance: of the solver.
    """

    gradient: str
    memory: dict[str, list[int]]
    names: list[str]
    truths: list[int]
    pictures: list[str]
    trajectory: Watched
    budget: tuple[str, list[tuple[float, float]]] | None
    tolerance: float

    @property
    def steps(self) -> int:
        """Of the longest solve."""
        return len(self.trajectory.probabilities)

    def answers(self, step: int) -> list[int]:
        """Class of every picture after so many steps."""
        at = min(max(step, 1), self.steps) - 1
        return self.trajectory.probabilities[at].argmax(1).tolist()

    def right(self, step: int) -> int:
        """How many pictures are named right after so many steps."""
        return sum(a == t for a, t in zip(self.answers(step), self.truths, strict=True))


def measure(checkpoint: LoadedCheckpoint, paths: Sequence[Path]) -> Measurement:
    """Solve the example pictures that a model knows, and measure a training step's memory.

    Raises:
        UserError: it knows none of them, or the time limit is over.
    """
    model, deadline = checkpoint.model, Deadline()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    known_paths = examples.known_pictures(paths, names)
    if not known_paths:
        raise UserError("none of the example pictures shows a class of this model; choose another")
    opened_pictures = [open_picture(path) for path in known_paths]
    pixels = to_batch(checkpoint.reader, opened_pictures, model)
    truths = [names.index(examples.shown_class(path, names) or "") for path in known_paths]
    trajectory = watch(model, pixels, on_step=deadline.check)
    memory = training_memory(model, pixels[:1], torch.tensor(truths[:1]), DEPTHS)
    gradient_settings = model.config.gradient
    gradient = gradient_settings["name"].upper() + (
        f" with {gradient_settings['steps']} steps" if gradient_settings.get("steps") else ""
    )
    return Measurement(
        gradient, memory, names, truths, [data_url(thumbnail(p)) for p in opened_pictures],
        trajectory, _budget(checkpoint), float(model.config.solver["tol"]),
    )  # fmt: skip


def _budget(checkpoint: LoadedCheckpoint) -> tuple[str, list[tuple[float, float]]] | None:
    for evaluation in checkpoint.entry.tests():
        budget: dict[str, Any] = evaluation.get("budget") or {}
        rows = budget.get("steps") or []
        if rows and "accuracy" in rows[0]:
            title = data_title(evaluation["data"]["name"])
            title = f"{budget['samples']:,} test pictures of {title}"
            return title, [(row["max_steps"], row["accuracy"]) for row in rows]
    return None


def memory_html(measurement: Measurement) -> str:
    """Memory of a training step against depth."""
    sizes = {
        "the map unrolled, layer by layer": measurement.memory["unrolled"],
        "as an equilibrium": measurement.memory["equilibrium"],
    }
    series = {
        name: [(d, size / 2**20) for d, size in zip(DEPTHS, values, strict=True)]
        for name, values in sizes.items()
    }
    chart = page_chart(
        series, title="Memory of a training step, in MiB", tip="depth {x:.0f}: {y:.1f} MiB",
        x_label="depth: solver steps, or layers",
    )  # fmt: skip
    deep = measurement.memory["unrolled"][-1] / 2**20
    flat = measurement.memory["equilibrium"][-1] / 2**20
    text = (
        f"One picture, one training step, measured here: what PyTorch keeps for the backward pass. "
        f"At depth {DEPTHS[-1]} the unrolled network keeps <b>{deep:.1f} MiB</b>, the equilibrium "
        f"<b>{flat:.1f} MiB</b>, as at any depth: its gradient ({measurement.gradient}) starts at "
        "the solution and does not pass through the solve."
    )
    return _section("Training memory does not grow with depth", text, chart)


def effort_html(measurement: Measurement) -> str:
    """The easiest and the hardest of the pictures side by side."""
    steps = measurement.trajectory.n_steps.tolist()
    easy, hard = steps.index(min(steps)), steps.index(max(steps))
    chart = page_chart(
        {
            kind: [
                (k + 1.0, float(measurement.trajectory.residuals[k, i]))
                for k in range(max(steps[i], 1))
            ]
            for kind, i in (("the easiest", easy), ("the hardest", hard))
        },
        title="Distance to the equilibrium", tip="step {x:.0f}: residual {y:.1e}", log_y=True,
        level=measurement.tolerance,
    )  # fmt: skip
    cards = "".join(
        f'<div class="dz-card"><img alt="{escape(measurement.names[measurement.truths[i]])}" '
        f'src="{measurement.pictures[i]}"/><div><b>{steps[i]} steps</b>'
        f'<div class="dz-note">{kind}: called {escape(measurement.names[answer])}</div></div></div>'
        for kind, i in (("the easiest", easy), ("the hardest", hard))
        for answer in (int(measurement.trajectory.final[i].argmax()),)
    )
    text = (
        f"The {len(steps)} example pictures that this model has a class for were solved in one "
        "batch. Each left when its own equilibrium was found; a network of layers would have "
        "spent the same on all of them."
    )
    return _section(
        "Easy inputs take fewer steps", text, f'<div class="dz-cards">{cards}</div>{chart}'
    )


def dial_html(measurement: Measurement, step: int) -> str:
    """What the answers are if the solve is stopped after so many steps."""
    step = min(max(int(step), 1), measurement.steps)
    answers, final = measurement.answers(step), measurement.answers(measurement.steps)
    same = sum(a == b for a, b in zip(answers, final, strict=True))
    total = len(answers)
    cards = []
    for i, (answer, truth) in enumerate(zip(answers, measurement.truths, strict=True)):
        is_right = answer == truth
        changes = "" if answer == final[i] else f"later {escape(measurement.names[final[i]])}"
        cards.append(
            f'<div class="dz-mini dz-{"right" if is_right else "wrong"}">'
            f'<img alt="{escape(measurement.names[truth])}" src="{measurement.pictures[i]}"/>'
            f"<span>{'✓' if is_right else '✗'} {escape(measurement.names[answer])}"
            f"<small>{changes}</small></span></div>"
        )
    return (
        f'<p class="dz-dial"><b>Stopped after {step} step{"s" * (step != 1)}</b>: '
        f"{measurement.right(step)} of {total} pictures named right; {same} of {total} answers are "
        f'the ones it ends with.</p><div class="dz-minis">{"".join(cards)}</div>'
    )


def dial_chart(measurement: Measurement) -> str:
    """Accuracy against effort, of the examples here and of the test pictures as measured before."""
    total = len(measurement.truths)
    label = f"these {total} pictures, measured here"
    series: dict[str, Any] = {
        label: [(k, measurement.right(k) / total) for k in range(1, measurement.steps + 1)]
    }
    if measurement.budget is not None:
        title, points = measurement.budget
        series[f"{title}, from its evaluation file"] = points
    chart = page_chart(
        series, title="Accuracy if stopped after so many steps", tip="{x:.0f} steps: {y:.1%}",
        percent=True,
    )  # fmt: skip
    text = (
        "Nothing has to be retrained to spend less: lower the budget of steps, and the answer of "
        "that moment is there. Most answers are settled long before the equilibrium is exact."
    )
    return _section("Effort is a dial, and you may stop early", text, chart)


def _section(title: str, text: str, content: str) -> str:
    return (
        f'<section class="dz-why"><h3>{escape(title)}</h3><p class="dz-note">{text}</p>'
        f"{content}</section>"
    )

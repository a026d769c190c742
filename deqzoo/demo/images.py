"""What the demo finds out about pictures, and how it shows it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deqzoo.equilibrium import Rows
from deqzoo.errors import UserError
from deqzoo.evaluation.classify import Classification, read_picture, to_batch

from .charts import probability_chart, residual_chart
from .guard import MAX_PICTURES, MAX_PIXELS, Deadline
from .shelf import Loaded

N_LINES = 5


@dataclass(frozen=True)
class Solve:
    """One picture's solve, step by step.

    Attributes:
        labels: all classes with their probabilities, best first.
        n_steps, residual, converged: the solver's report.
        residuals: after each step, in the solver's stop mode.
        probabilities: per class name its probability after each step; the classes that matter.
        seen: the picture as the model gets it.
        settings: of the solver, complete.
        seconds: wall time of the solve.
    """

    labels: list[tuple[str, float]]
    n_steps: int
    residual: float
    converged: bool
    residuals: list[float]
    probabilities: dict[str, list[float]]
    seen: Image.Image
    settings: dict[str, Any]
    seconds: float


def open_picture(path: Any) -> Image.Image:
    """A user's picture, safely.

    Raises:
        UserError: nothing there, no picture, or one with too many pixels.
    """
    if not path:
        raise UserError("there is no picture yet: upload one, paste one, or pick an example")
    path = Path(path)
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except Exception:  # what is wrong is said by read_picture below
        width = height = 0
    if width * height > MAX_PIXELS:
        raise UserError(
            f"the picture has {width} × {height} pixels; {MAX_PIXELS // 10**6} million are allowed"
        )
    try:
        return read_picture(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error


def open_pictures(paths: Sequence[Any], loaded: Loaded) -> tuple[list[Image.Image], Tensor]:
    """Thumbnails of several pictures, and the model's input (B, 3, H, W) made of them.

    One after another, so that only one of them is in memory in full.

    Raises:
        UserError: as `open_picture`.
    """
    small, batch = [], []
    for path in paths:
        picture = open_picture(path)
        small.append(thumbnail(picture))
        batch.append(to_batch(loaded.reader, [picture], loaded.model))
    return small, torch.cat(batch)


@torch.inference_mode()
def solve_picture(loaded: Loaded, picture: Image.Image, solver: dict[str, Any]) -> Solve:
    """Classify one picture and keep what the solver went through.

    The answer is the one of `deqzoo.evaluation.classify.classify` with the same settings.

    Raises:
        UserError: the time limit is over.
    """
    model, deadline = loaded.model, Deadline()
    pixels = to_batch(loaded.reader, [picture], model)
    f, start = model.mdeq.build_map(pixels)
    layout = Rows()
    residuals: list[float] = []
    answers: list[Tensor] = []

    def answer(state: Any) -> Tensor:
        return model.classifier(model.head(tuple(state))).float().softmax(-1)[0]

    def watch(_: int, matrix: Tensor, residual: Tensor) -> None:
        deadline.check()
        residuals.append(float(residual[0]))
        answers.append(answer(layout.to_state(matrix)))

    started = time.perf_counter()
    solution = model.solve(f, start, layout=layout, solver=solver, callback=watch)
    seconds = time.perf_counter() - started
    final = answer(solution.state)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    order = final.argsort(descending=True).tolist()
    history = torch.stack(answers)
    # The classes of the final answer and those that led on the way, the most probable first.
    leading = history.amax(0).argsort(descending=True).tolist()
    shown = order[: N_LINES - 2] + [i for i in leading if i not in order[: N_LINES - 2]]
    return Solve(
        labels=[(names[i], float(final[i])) for i in order],
        n_steps=int(solution.n_steps[0]),
        residual=float(solution.residual[0]),
        converged=bool(solution.converged[0]),
        residuals=residuals,
        probabilities={names[i]: history[:, i].tolist() for i in shown[:N_LINES]},
        seen=seen_picture(pixels[0], loaded.reader),
        settings={**model.config.solver, **solver},
        seconds=seconds,
    )


def seen_picture(pixels: Tensor, processor: Any) -> Image.Image:
    """The picture behind a normalised input (3, H, W)."""
    mean, std = (np.asarray(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    values = (pixels.numpy() * std + mean).clip(0, 1) * 255
    return Image.fromarray(values.round().astype(np.uint8).transpose(1, 2, 0))


def solve_html(solve: Solve) -> str:
    """Verdict and charts of one solve."""
    limit = solve.settings["max_steps"]
    if solve.converged:
        badge, mood = "Equilibrium found", "good"
        text = f"after <b>{solve.n_steps}</b> of at most {limit} steps"
    else:
        badge, mood = "Stopped early", "late"
        if solve.n_steps < limit:
            text = f"after <b>{solve.n_steps}</b> steps, which no longer came closer"
        else:
            text = f"the budget of <b>{limit}</b> steps ended before the tolerance was reached"
    facts = f"residual {solve.residual:.2g}, {solve.seconds * 1000:.0f} ms"
    side = solve.seen.size[0]
    classes = sorted(name for name, _ in solve.labels)
    known = f" It knows {len(classes)} kinds of things"
    known += f": {', '.join(classes)}." if len(classes) <= 12 else "."
    return (
        f'<div class="dz-verdict dz-{mood}"><img class="dz-seen" alt="the picture as the model '
        f'sees it" src="{data_url(solve.seen)}"/><div><span class="dz-badge">{badge}</span> {text}'
        f'<div class="dz-note">{facts}. The small picture is all the model sees: {side} × {side} '
        f'pixels.{escape(known)}</div></div></div><div class="dz-charts">'
        f"{residual_chart(solve.residuals, solve.settings['tol'])}"
        f"{probability_chart(solve.probabilities)}</div>"
    )


def check_count(paths: Sequence[Any] | None) -> list[Any]:
    """The files of the batch tab.

    Raises:
        UserError: none, or too many.
    """
    if not paths:
        raise UserError("there are no pictures yet: upload some, or pick the examples")
    if len(paths) > MAX_PICTURES:
        raise UserError(f"{len(paths)} pictures are too many at once; {MAX_PICTURES} are allowed")
    return list(paths)


def batch_html(
    pictures: Sequence[Image.Image], names: Sequence[str], found: Sequence[Classification]
) -> str:
    """A card per (small) picture with its answer and a bar for its solver steps."""
    longest = max(c.n_steps for c in found)
    cards = []
    for picture, name, result in zip(pictures, names, found, strict=True):
        label, probability = result.labels[0]
        share = 100 * result.n_steps / max(longest, 1)
        state = "converged" if result.converged else "not converged"
        cards.append(
            f'<div class="dz-card"><img alt="{escape(name)}" src="{data_url(picture)}"/>'
            f"<div><b>{escape(label)}</b> {probability:.0%}"
            f'<div class="dz-note">{escape(name)}</div>'
            f'<div class="dz-bar"><i class="{"" if result.converged else "dz-open"}" '
            f'style="width:{share:.0f}%"></i></div>'
            f'<div class="dz-note">{result.n_steps} steps, {state}</div></div></div>'
        )
    steps = [c.n_steps for c in found]
    summary = (
        f"{len(found)} pictures in one batch took {min(steps)} to {max(steps)} steps, "
        f"{sum(steps)} together: each one leaves when its own equilibrium is found."
    )
    return f'<p class="dz-note">{summary}</p><div class="dz-cards">{"".join(cards)}</div>'


def thumbnail(picture: Image.Image, side: int = 96) -> Image.Image:
    """A small RGB copy."""
    small = picture.copy()
    small.thumbnail((side, side))
    return small.convert("RGB")


def data_url(picture: Image.Image) -> str:
    """A PNG inside a URL."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()

"""What the demo finds out about pictures, and how it shows it."""

from __future__ import annotations

import base64
import io
import math
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

from deqzoo.data.pictures import read_picture
from deqzoo.errors import UserError
from deqzoo.evaluation.chart import page_chart
from deqzoo.evaluation.classify import Classification, classify_pixels
from deqzoo.evaluation.watch import watch, watched_solver
from deqzoo.models.mdeq.image_processing_mdeq import to_rgb
from deqzoo.models.readers import to_batch

from . import examples
from .guard import ENOUGH_PIXELS, MAX_ASPECT, MAX_PICTURES, MAX_PIXELS, Deadline
from .shelf import LoadedCheckpoint

N_LINES = 5


@dataclass(frozen=True)
class Solve:
    """One picture's solve, step by step.

    Attributes:
        labels: all classes with their probabilities, best first.
        n_steps, residual, converged: the solver's report.
        answer_step: the step whose state is the answer: the one nearest to the equilibrium.
        residuals: after each step, in the solver's stop mode.
        probabilities: per class name its probability after each step; the classes that matter.
        model_picture: the picture as the model gets it.
        settings: of the solver, complete.
        seconds: wall time of the solve.
    """

    labels: list[tuple[str, float]]
    n_steps: int
    residual: float
    converged: bool
    answer_step: int
    residuals: list[float]
    probabilities: dict[str, list[float]]
    model_picture: Image.Image
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
        return _bounded_picture(read_picture(path, MAX_PIXELS))
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error


def _bounded_picture(picture: Image.Image) -> Image.Image:
    """The part of a picture that the model looks at, in no more pixels than it needs.

    Scaling the shorter side of a picture of 300,000 × 1 pixels would make 300,000 × 32 of it, and
    every conversion of a very large one costs four bytes a pixel.
    """
    width, height = picture.size
    across, down = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    if (across, down) != picture.size:
        left, top = (width - across) // 2, (height - down) // 2
        picture = picture.crop((left, top, left + across, top + down))
    factor = math.isqrt(across * down // ENOUGH_PIXELS)
    if factor < 2:
        return picture
    mode = {"1": "L", "P": "RGBA" if "transparency" in picture.info else "RGB"}.get(picture.mode)
    mode = "I" if picture.mode.startswith("I;16") else mode  # which Pillow does not reduce
    picture = picture.convert(mode) if mode else picture
    info = picture.info
    picture = picture.reduce(factor)
    picture.info = info
    return picture


def open_pictures(
    paths: Sequence[Any], checkpoint: LoadedCheckpoint
) -> tuple[list[Image.Image], Tensor]:
    """Thumbnails of several pictures, and the model's input (B, 3, H, W) made of them.

    One after another, so that only one of them is in memory in full.

    Raises:
        UserError: as `open_picture`.
    """
    small, batch = [], []
    deadline = Deadline()
    for path in paths:
        deadline.check()
        picture = open_picture(path)
        small.append(thumbnail(picture))
        batch.append(to_batch(checkpoint.reader, [picture], checkpoint.model))
    return small, torch.cat(batch)


@torch.inference_mode()
def solve_picture(
    checkpoint: LoadedCheckpoint, picture: Image.Image, solver: dict[str, Any]
) -> Solve:
    """Classify one picture and keep the residual and the probabilities of every step.

    The answer is the one of `deqzoo.evaluation.classify.classify` with the same settings.

    Raises:
        UserError: the time limit is over, or no state was ever finite.
    """
    model, deadline = checkpoint.model, Deadline()
    pixels = to_batch(checkpoint.reader, [picture], model)
    start = time.perf_counter()
    trajectory = watch(model, pixels, solver, deadline.check)
    seconds = time.perf_counter() - start
    if not bool(trajectory.residual[0].isfinite()):
        raise UserError("there is no answer: the state of this picture was never finite")
    final, history = trajectory.final[0], trajectory.probabilities[:, 0]
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    order = final.argsort(descending=True).tolist()
    # The classes of the final answer and those that led on the way, the most probable first.
    leaders = history.amax(0).argsort(descending=True).tolist()
    shown_classes = order[: N_LINES - 2] + [i for i in leaders if i not in order[: N_LINES - 2]]
    return Solve(
        labels=[(names[i], float(final[i])) for i in order],
        n_steps=int(trajectory.n_steps[0]),
        residual=float(trajectory.residual[0]),
        converged=bool(trajectory.converged[0]),
        answer_step=trajectory.best_step(0),
        residuals=trajectory.residuals[:, 0].tolist(),
        probabilities={names[i]: history[:, i].tolist() for i in shown_classes[:N_LINES]},
        model_picture=seen_picture(pixels[0], checkpoint.reader),
        settings={**model.config.solver, **solver},
        seconds=seconds,
    )


def solve_batch(
    checkpoint: LoadedCheckpoint, pixels: Tensor, solver: dict[str, Any]
) -> list[Classification]:
    """Classify several prepared pictures (B, 3, H, W) together.

    Raises:
        UserError: the time limit is over, or nobody waits any more.
    """
    settings = checkpoint.model.resolve_solver(solver).to_dict()
    deadline_solver = watched_solver(settings, Deadline().check)
    return classify_pixels(checkpoint.model, pixels, top_k=1, solver=deadline_solver)


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
        mood = "late"
        astray = solve.answer_step < 0.8 * solve.n_steps
        badge = "No equilibrium found" if astray else "Stopped early"
        if solve.n_steps < limit:
            text = f"after <b>{solve.n_steps}</b> steps, which no longer came closer"
        else:
            text = f"the budget of <b>{limit}</b> steps ended before the tolerance was reached"
    mark = solve.answer_step if 0 < solve.answer_step < len(solve.residuals) else None
    if mark is not None:
        text += f"; the answer is that of step <b>{mark}</b>, the nearest to an equilibrium"
    facts = f"residual {solve.residual:.2g}, {solve.seconds * 1000:.0f} ms"
    side = solve.model_picture.size[0]
    classes = sorted(name for name, _ in solve.labels)
    classes_note = f" It knows {len(classes)} kinds of things"
    classes_note += f": {', '.join(classes)}." if len(classes) <= 12 else "."
    return (
        f'<div class="dz-verdict dz-{mood}"><img class="dz-seen" alt="the picture as the model '
        f'sees it" src="{data_url(solve.model_picture)}"/><div>'
        f'<span class="dz-badge">{badge}</span> {text}'
        f'<div class="dz-note">{facts}. The small picture is all the model sees: {side} × {side} '
        f'pixels.{escape(classes_note)}</div></div></div><div class="dz-charts">'
        f"{_residuals(solve, mark)}{_probabilities(solve, mark)}</div>"
    )


def _residuals(solve: Solve, mark: int | None) -> str:
    return page_chart(
        {"": list(enumerate(solve.residuals, 1))}, title="Distance to the equilibrium",
        tip="step {x:.0f}: residual {y:.1e}", log_y=True, level=solve.settings["tol"], mark=mark,
    )  # fmt: skip


def _probabilities(solve: Solve, mark: int | None) -> str:
    series = {name: list(enumerate(path, 1)) for name, path in solve.probabilities.items()}
    return page_chart(
        series, title="What it would answer after each step", tip="step {x:.0f}: {y:.1%}",
        percent=True, mark=mark,
    )  # fmt: skip


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
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    results: Sequence[Classification],
    labels: Sequence[str] = (),
) -> str:
    """A card per (small) picture with its answer and a bar for its solver steps.

    Where a file is named after one of the model's classes (`labels`), the card says whether the
    answer is that class.
    """
    longest = max(c.n_steps for c in results)
    cards = []
    n_right = n_known = 0
    for picture, name, result in zip(pictures, names, results, strict=True):
        label, probability = result.labels[0] if result.labels else ("no answer", 0.0)
        share = 100 * result.n_steps / max(longest, 1)
        state = "converged" if result.converged else "not converged"
        truth = examples.shown_class(name, labels)
        mark = "" if truth is None else " ✓" if truth == label else f" ✗, it is: {escape(truth)}"
        n_right += mark == " ✓"
        n_known += truth is not None
        cards.append(
            f'<div class="dz-card"><img alt="{escape(name)}" src="{data_url(picture)}"/>'
            f"<div><b>{escape(label)}</b> {probability:.0%}{mark}"
            f'<div class="dz-note">{escape(name)}</div>'
            f'<div class="dz-bar"><i class="{"" if result.converged else "dz-open"}" '
            f'style="width:{share:.0f}%"></i></div>'
            f'<div class="dz-note">{result.n_steps} steps, {state}</div></div></div>'
        )
    steps = [c.n_steps for c in results]
    summary = (
        f"{len(results)} pictures in one batch took {min(steps)} to {max(steps)} steps, "
        f"{sum(steps)} together: each one leaves when its own equilibrium is found."
    )
    if n_known:
        summary += (
            f" {n_known} of the files are named after a class of this model, and it names "
            f"<b>{n_right} of these {n_known}</b> right."
        )
    return f'<p class="dz-note">{summary}</p><div class="dz-cards">{"".join(cards)}</div>'


def thumbnail(picture: Image.Image, side: int = 96) -> Image.Image:
    """A small RGB copy."""
    small = to_rgb(picture).copy()
    small.thumbnail((side, side))
    return small


def data_url(picture: Image.Image) -> str:
    """A PNG inside a URL."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()

"""Draw an image model at work, step by step: README's moving picture.

python examples/showcase.py examples/pictures/*.* --output docs/showcase.gif
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from deqzoo import DEQModel
from deqzoo.data.pictures import read_picture
from deqzoo.errors import UserError
from deqzoo.evaluation.watch import Watched, training_memory, watch
from deqzoo.models.readers import load_processor, to_batch

WIDTH, HEIGHT, PANEL, TOP = 1080, 404, 352, 76
INK, GREY, BLUE, PALE, RED, GREEN = "#222222", "#666666", "#1f6fb4", "#e4ecf3", "#c8500a", "#0b7a53"
ROWS = 11
DEPTHS = (1, 2, 4, 8, 16, 24, 32)
FRAME, LAST = 160, 4000  # milliseconds


def text(canvas: ImageDraw.ImageDraw, x: float, y: float, words: str, size: int, ink: str) -> None:
    canvas.text((x, y), words, ink, ImageFont.load_default(size))


def heading(canvas: ImageDraw.ImageDraw, left: int, title: str, line: str) -> None:
    text(canvas, left, 18, title, 19, INK)
    text(canvas, left, 44, line, 14, GREY)


def draw_answer(
    image: Image.Image, left: int, picture: Image.Image, found: Watched, names: list[str], step: int
) -> None:
    """The first picture with its most probable classes after so many steps."""
    canvas = ImageDraw.Draw(image)
    heading(canvas, left, "It solves for its answer", "one map, iterated to its equilibrium")
    image.paste(ImageOps.fit(picture.convert("RGB"), (132, 132)), (left, TOP))
    steps = int(found.n_steps[0])
    at = min(step, steps)
    text(canvas, left + 148, TOP + 8, f"step {at}", 22, INK)
    text(canvas, left + 148, TOP + 42, f"residual {found.residuals[at - 1, 0]:.0e}", 15, GREY)
    if step >= steps and found.converged[0]:
        text(canvas, left + 148, TOP + 70, "equilibrium found", 16, GREEN)
    shown = found.final[0].topk(5).indices.tolist()
    for row, index in enumerate(shown):
        y = TOP + 154 + 27 * row
        probability = float(found.probabilities[at - 1, 0, index])
        text(canvas, left, y, names[index], 15, INK)
        canvas.rectangle((left + 96, y + 3, left + 276, y + 17), PALE)
        canvas.rectangle((left + 96, y + 3, left + 96 + 180 * probability, y + 17), BLUE)
        text(canvas, left + 284, y, f"{probability:.0%}", 15, INK)


def draw_batch(
    image: Image.Image,
    left: int,
    pictures: list[Image.Image],
    found: Watched,
    names: list[str],
    step: int,
) -> None:
    """A bar of steps per picture; each ends where its own equilibrium is found."""
    canvas = ImageDraw.Draw(image)
    heading(
        canvas, left, "Easy inputs take fewer steps", "one batch, each picture leaves by itself"
    )
    longest = int(found.n_steps.max())
    for row, picture in enumerate(pictures):
        y = TOP + 28 * row
        image.paste(ImageOps.fit(picture.convert("RGB"), (24, 24)), (left, y))
        steps = int(found.n_steps[row])
        at = min(step, steps)
        done = step >= steps and bool(found.converged[row])
        canvas.rectangle((left + 34, y + 5, left + 34 + 150 * at / longest, y + 19),
                         GREEN if done else BLUE)  # fmt: skip
        answer = names[int(found.probabilities[at - 1, row].argmax())]
        text(canvas, left + 192, y + 3, f"{at:>2}  {answer}", 15, GREEN if done else GREY)


def draw_memory(
    canvas: ImageDraw.ImageDraw, left: int, memory: dict[str, list[int]], step: int
) -> None:
    """What a training step keeps for the backward pass, up to the depth of this step."""
    heading(canvas, left, "Training memory stays flat", "MiB kept for backward, by depth")
    width, height, bottom = 290, 250, TOP + 268
    top = 1.15 * max(map(max, memory.values()))
    canvas.line((left, bottom - height, left, bottom, left + width, bottom), GREY, 1)
    for depth in DEPTHS[2:]:
        text(canvas, left + width * depth / DEPTHS[-1] - 8, bottom + 6, str(depth), 14, GREY)
    for name, ink, label in (
        ("unrolled", RED, "the map unrolled as layers"), ("equilibrium", BLUE, "as an equilibrium")
    ):  # fmt: skip
        points = [
            (left + width * d / DEPTHS[-1], bottom - height * size / top)
            for d, size in zip(DEPTHS, memory[name], strict=True)
            if d <= max(step, DEPTHS[0])
        ]
        canvas.line(points, ink, 3)
        for x, y in points:
            canvas.ellipse((x - 4, y - 4, x + 4, y + 4), ink)
        reached = memory[name][len(points) - 1] / 2**20
        y = bottom - height + (4 if name == "unrolled" else 26)
        text(canvas, left + 12, y, f"{label}: {reached:.0f} MiB", 15, ink)


def main(argv: list[str] | None = None) -> None:
    """Solve, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model", default="mdeq-tiny-cifar-upg")
    parser.add_argument("--output", type=Path, default=Path("docs/showcase.gif"))
    arguments = parser.parse_args(argv)
    pictures = [read_picture(path) for path in arguments.pictures[:ROWS]]
    model = DEQModel.from_pretrained(arguments.model).eval()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    pixels = to_batch(load_processor(model), pictures, model)
    found = watch(model, pixels)
    memory = training_memory(model, pixels[:1], torch.zeros(1, dtype=torch.long), DEPTHS)
    frames = []
    for step in range(1, max(int(found.n_steps.max()), DEPTHS[-1]) + 1):
        image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw_answer(image, 24, pictures[0], found, names, step)
        draw_batch(image, 24 + PANEL + 8, pictures, found, names, step)
        draw_memory(ImageDraw.Draw(image), 24 + 2 * PANEL + 24, memory, step)
        frames.append(image)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # One palette for all frames, that of the last, or colours would flicker.
    palette = frames[-1].quantize(160)
    first, *others = [frame.quantize(palette=palette, dither=0) for frame in frames]
    try:
        first.save(
            arguments.output,
            save_all=True,
            append_images=others,
            duration=[FRAME] * len(others) + [LAST],
            loop=0,
        )
    except ValueError as error:  # a suffix of no picture format
        raise UserError(f"cannot write {arguments.output}: {error}") from error


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"showcase.py: {error}", file=sys.stderr)
        sys.exit(2)

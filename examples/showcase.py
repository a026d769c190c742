"""Draw what an image model says about pictures: README's first figure.

python examples/showcase.py examples/pictures/* --output docs/showcase.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.evaluation.classify import Classification, classify, read_picture

WIDTH, ROW, SIDE, MARGIN = 860, 180, 150, 16
INK, GREY, BLUE, PALE = "#222222", "#6a6a6a", "#1f6fb4", "#e4ecf3"


def draw_row(canvas: ImageDraw.ImageDraw, top: int, result: Classification, budget: int) -> None:
    """Bars for the labels, and below them how the equilibrium was found."""
    left, bar = 2 * MARGIN + SIDE, 330
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    for index, (label, probability) in enumerate(result.labels):
        y = top + 26 * index
        canvas.text((left, y), label, INK, font)
        start = left + 130
        canvas.rectangle((start, y + 3, start + bar, y + 18), PALE)
        canvas.rectangle((start, y + 3, start + bar * probability, y + 18), BLUE)
        canvas.text((start + bar + 12, y), f"{probability:.1%}", INK, font)
    state = "converged" if result.converged else f"stopped at the limit of {budget}"
    report = f"equilibrium after {result.n_steps} solver steps, residual {result.residual:.0e}"
    canvas.text((left, top + 26 * len(result.labels) + 10), f"{report}, {state}", GREY, small)


def draw(paths: list[Path], results: list[Classification], title: str, budget: int) -> Image.Image:
    """One row per picture."""
    image = Image.new("RGB", (WIDTH, 48 + ROW * len(paths)), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, 14), title, GREY, ImageFont.load_default(16))
    for index, (path, result) in enumerate(zip(paths, results, strict=True)):
        top = 48 + ROW * index
        thumbnail = ImageOps.fit(read_picture(path).convert("RGB"), (SIDE, SIDE))
        image.paste(thumbnail, (MARGIN, top))
        draw_row(canvas, top, result, budget)
    return image


def main(argv: list[str] | None = None) -> None:
    """Classify and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model", default="mdeq-tiny-cifar-upg")
    parser.add_argument("--output", type=Path, default=Path("docs/showcase.png"))
    arguments = parser.parse_args(argv)
    pictures = [read_picture(path) for path in arguments.pictures]
    model = DEQModel.from_pretrained(arguments.model)
    results = classify(model, pictures, top_k=4)
    title = f"deqzoo classify, model {Path(model.config._name_or_path).name}"
    image = draw(arguments.pictures, results, title, model.config.solver["max_steps"])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(arguments.output, optimize=True)
    except ValueError as error:  # a suffix of no picture format
        raise UserError(f"cannot write {arguments.output}: {error}") from error


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"showcase.py: {error}", file=sys.stderr)
        sys.exit(2)

"""Tutorial: from a folder of pictures to a published image classifier.

    python examples/own_pictures.py                       # draws its own pictures first
    python examples/own_pictures.py pictures/ --publish ORG/NAME

`pictures/` holds a folder for each class. Every step is a command that you can type yourself; the
script prints it and runs it.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from deqzoo.cli import run


def step(title: str, *arguments: object) -> None:
    """Print a command and run it."""
    command = [str(argument) for argument in arguments]
    print(f"\n# {title}\n$ deqzoo {' '.join(command)}", flush=True)
    if code := run(command):
        sys.exit(code)


def draw_pictures(folder: Path, count: int, side: int = 64) -> None:
    """Circles, squares and triangles, in colours and places of their own."""
    draws = random.Random(0)
    for name in ("circle", "square", "triangle"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            ground, colour = (tuple(draws.randrange(256) for _ in range(3)) for _ in range(2))
            picture = Image.new("RGB", (side, side), ground)
            radius = draws.uniform(0.25, 0.4) * side
            x, y = (draws.uniform(radius, side - radius) for _ in range(2))
            canvas = ImageDraw.Draw(picture)
            if name == "circle":
                canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            else:
                sides = 4 if name == "square" else 3
                canvas.regular_polygon((x, y, radius), sides, draws.randrange(90), fill=colour)
            picture.save(folder / name / f"{number}.png")


def main(argv: list[str] | None = None) -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="folder of pictures per class")
    parser.add_argument("--model", default="mdeq-tiny-cifar-upg", help="to begin with")
    parser.add_argument("--output", type=Path, default=Path("my-pictures"))
    parser.add_argument("--count", type=int, default=20, help="pictures to draw of each class")
    parser.add_argument("--max-steps", type=int, help="of the training, for a quick look")
    parser.add_argument("--publish", help="repository on the Hub, ORG/NAME")
    settings = parser.parse_args(argv)
    data = settings.data or Path("shapes")
    if settings.data is None and not data.exists():
        draw_pictures(data, settings.count)
    quick = [] if settings.max_steps is None else ["--max-steps", settings.max_steps]
    step(
        "Train: a fifth of each class is measured, a tenth chooses the weights.",
        "finetune", settings.model, "--data", data, "--output", settings.output, *quick,
    )  # fmt: skip
    step(
        "Measure again: the pictures that the model was trained on are recognised and left out.",
        "evaluate", settings.output, "--data", data,
    )  # fmt: skip
    one = next(path for path in sorted(data.rglob("*")) if path.is_file())
    step(
        "Ask it, and watch its equilibrium being found.",
        "classify", one, "--model", settings.output, "--trace", "-",
    )  # fmt: skip
    step(
        "The effort is yours to choose: the same answer with three solver steps?",
        "classify", one, "--model", settings.output, "--max-steps", 3,
    )  # fmt: skip
    where = ["--dry-run"] if settings.publish is None else []
    step(
        "Publish it with its card (only listed here unless --publish names a repository).",
        "publish", settings.output, "--repo-id", settings.publish or "ORG/NAME", *where,
    )  # fmt: skip


if __name__ == "__main__":
    main()

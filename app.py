"""The demo: `python app.py`, then open http://127.0.0.1:7860. Also the entry point of a Space."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

# A Space has its own network; the page itself must not look for checkpoints there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "examples" / "pictures"


def arguments() -> argparse.Namespace:
    """The command line's options."""
    in_space = "SPACE_ID" in os.environ
    parser = argparse.ArgumentParser(description="The demo of deqzoo in the browser.")
    host, what = "0.0.0.0" if in_space else "127.0.0.1", "address to listen on; 0.0.0.0 for all"
    parser.add_argument("--host", default=host, help=f"{what} (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--share", action="store_true", help="also make a public link")
    parser.add_argument(
        "--graph-data", type=Path, metavar="DIR", default=HERE / "graphs",
        help="folder with the data sets COX2/ and PROTEINS/ (default: graphs/ beside this file)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    """Build the page and serve it."""
    options = arguments()
    if not 1 <= options.port <= 65535:
        fail(f"--port must be from 1 to 65535, got {options.port}")
    try:
        from deqzoo.demo.app import build_demo, launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        fail("the demo needs Gradio: pip install -e '.[demo,graph]'")
    demo = build_demo(PICTURES, options.graph_data)
    try:
        launch(demo, options.host, options.port, options.share, PICTURES)
    except OSError as error:
        fail(f"cannot listen on {options.host}:{options.port}: {error}")


def fail(message: str) -> NoReturn:
    """End with one line on stderr, as the command line does."""
    print(f"app.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

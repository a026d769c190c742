"""Tutorial: from a text file to a published language model that knows your words.

    python examples/own_text.py                    # takes Python's own help texts
    python examples/own_text.py notes.txt --publish ORG/NAME

Every step is a command that you can type yourself; the script prints it and runs it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deqzoo.cli import run


def step(title: str, *arguments: object) -> None:
    """Print a command and run it."""
    command = [str(argument) for argument in arguments]
    print(f"\n# {title}\n$ deqzoo {' '.join(command)}", flush=True)
    if code := run(command):
        sys.exit(code)


def write_text(path: Path, characters: int) -> None:
    """Python's help on its own language, which every installation has."""
    from pydoc_data.topics import topics

    lines = [line.strip() for topic in topics.values() for line in topic.splitlines()]
    path.write_text("\n".join(filter(None, lines))[:characters], encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, help="text file or folder of texts")
    parser.add_argument("--model", default="deq-transformer-wikitext2-jr-upg", help="to begin with")
    parser.add_argument("--output", type=Path, default=Path("my-text"))
    parser.add_argument("--characters", type=int, default=60_000, help="of Python's help texts")
    parser.add_argument("--max-steps", type=int, help="of the training, for a quick look")
    parser.add_argument("--publish", help="repository on the Hub, ORG/NAME")
    settings = parser.parse_args(argv)
    text = settings.text or Path("python-help.txt")
    if settings.text is None and not text.exists():
        write_text(text, settings.characters)
    quick = [] if settings.max_steps is None else ["--max-steps", settings.max_steps]
    step("How well does the model know such a text?", "perplexity", text, "--model", settings.model)
    step(
        "Train: words that the model lacks join its vocabulary; the last tenth is measured.",
        "finetune", settings.model, "--data", text, "--output", settings.output,
        "--tokenizer", "extend", *quick,
    )  # fmt: skip
    step("Measure the part held out.", "evaluate", settings.output, "--data", text)
    step("And the whole text again.", "perplexity", text, "--model", settings.output)
    where = ["--dry-run"] if settings.publish is None else []
    step(
        "Publish it with its card (only listed here unless --publish names a repository).",
        "publish", settings.output, "--repo-id", settings.publish or "ORG/NAME", *where,
    )  # fmt: skip


if __name__ == "__main__":
    main()

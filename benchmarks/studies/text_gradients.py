"""Two gradients of a text model, each with and without a Jacobian penalty, from one start.

    python benchmarks/studies/text_gradients.py

Draws the table from the training records and evaluation files in `text_gradients/`, which `deqzoo
train` and `deqzoo store` made of the recipes deq-transformer-wikitext2-{upg,implicit,jr-upg,
jr-implicit}. The zoo releases one of the four models, `deq-transformer-wikitext2-jr-upg`.
"""

from __future__ import annotations

from pathlib import Path

from cells import HERE, markdown_table, write_text

from deqzoo.records import read_evaluation
from deqzoo.zoo import read_json

FILES = HERE / "text_gradients"
RUNS = ("jr-upg", "jr-implicit", "upg", "implicit")


def row(folder: Path) -> list[str]:
    """One model: its gradient, its figures and what its own part of the training took."""
    training = read_json(folder / "training.json")
    validation, test = (
        read_evaluation(folder / f"wikitext-2-{split}.json") for split in ("validation", "test")
    )
    (stage,) = training["recipe"]["stages"]
    gradient = stage["gradient"]
    words = {"implicit": "implicit", "upg": "UPG k={steps} λ={damping:g}"}[gradient["name"]]
    results = test["results"]
    return [
        words.format(**gradient),
        "yes" if stage["jacobian"] else "no",
        f"{training['validation'][-1]['perplexity']:.1f}",
        f"{validation['results']['perplexity']:.1f}",
        f"{results['perplexity']:.1f}",
        f"{100 * (1 - results['converged_share']):.1f} %",
        f"{training['pflop'] - training['pflop_inherited']:.3f}",
    ]


def report() -> str:
    """The table in Markdown."""
    head = ["gradient", "Jacobian penalty", "logged validation words", "validation perplexity"]
    head += ["test perplexity", "test tokens above the tolerance", "PFLOP of the 0.6 epoch"]
    rows = [row(FILES / f"deq-transformer-wikitext2-{name}") for name in RUNS]
    return markdown_table(head, rows)


if __name__ == "__main__":
    write_text("text_gradients_table.md", report())

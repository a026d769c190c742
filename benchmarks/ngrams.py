"""What no network is needed for on text: Kneser-Ney n-grams of the corpora of the text models.

    python benchmarks/ngrams.py --data ROOT

Interpolated Kneser-Ney of orders 1 to 5 (Ney, Essen, Kneser 1994), one discount per order,
n1 / (n1 + 2 n2), on the training split alone: nothing is tuned. Every word of the test split is
scored after the words before it, ends of lines among them, as the text models are. ROOT holds
`wikitext` and `ptb_text_only`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from timing import markdown_table, write_results

from deqzoo.data.text import load_corpus

RESULTS = Path(__file__).resolve().parent / "results"
CORPORA = {"ptb": "ptb_text_only", "wikitext-2": "wikitext"}
ORDERS = 5


def probabilities(train: np.ndarray, test: np.ndarray, vocabulary: int) -> Iterator[np.ndarray]:
    """Probability (n,) of every test word after those before it, by models of order 1, 2, ...

    Args:
        train: word indices (m,), int64, below `vocabulary`.
        test: word indices (n,) that follow them.
        vocabulary: number of words; those never seen share what the discount leaves.
    """
    stream, first = np.concatenate((train, test)), len(train)
    # grams[n][t] names the n words that end at t, whichever split they are in.
    grams = [np.zeros(len(stream), dtype=np.int64), stream]
    for _ in range(1, ORDERS):
        key = grams[-1][:-1] * vocabulary + stream[1:]
        _, names = np.unique(key, return_inverse=True)
        grams.append(np.concatenate(([-1], names)))  # the first has no words before it
    lower = np.full(len(test), 1 / vocabulary)
    for order in range(1, ORDERS + 1):
        gram, context = grams[order], np.roll(grams[order - 1], 1)
        # Lower orders count the words that an n-gram follows, not how often it does.
        counted = grams[min(order + 1, ORDERS)][order:first]
        _, kept = np.unique(counted, return_index=True)
        kept = kept + order if order < ORDERS else np.arange(order - 1, first)
        counts = np.bincount(gram[kept], minlength=gram.max() + 1)
        types, where = np.unique(gram[kept], return_index=True)
        of_type = context[kept[where]]
        size = max(context.max(), 0) + 1
        total = np.bincount(of_type, weights=counts[types], minlength=size)
        followers = np.bincount(of_type, minlength=size)
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = once / (once + 2 * twice) if once else 0.5  # so that every word has a chance
        mine, after = counts[gram[first:]], context[first:]
        known = total[after] > 0
        scale = np.where(known, total[after], 1)
        share = np.where(known, discount * followers[after] / scale, 1.0)
        lower = np.maximum(mine - discount, 0) * known / scale + share * lower
        yield lower


def perplexity(chances: np.ndarray) -> float:
    """Of words with these probabilities."""
    return math.exp(-np.log(chances).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    root = parser.parse_args().data
    found = {}
    for name, folder in CORPORA.items():
        corpus = load_corpus(name, root / folder)
        train, test = (corpus.stream(split).numpy() for split in ("train", "test"))
        orders = probabilities(train, test, len(corpus.vocabulary))
        found[name] = {
            "samples": len(test),
            "perplexity": {str(n): perplexity(p) for n, p in enumerate(orders, start=1)},
        }
    head = ["corpus", *(f"{n} word{'s' if n > 1 else ''}" for n in range(1, ORDERS + 1))]
    rows = [[name, *row["perplexity"].values()] for name, row in found.items()]
    text = "Perplexity of test splits by order of interpolated Kneser-Ney:\n\n"
    write_results(RESULTS, "ngrams", {"corpora": found}, text + markdown_table(head, rows))


if __name__ == "__main__":
    main()

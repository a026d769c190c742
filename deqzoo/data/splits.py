"""The names that people give to the splits of data of their own."""

from __future__ import annotations

from collections.abc import Sequence

SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What people call the splits, in any case of letters; the words of `datasets`."""
SPLIT_OF = {word: split for split, words in SPELLINGS.items() for word in words}


def split_of(names: Sequence[str]) -> str | None:
    """The split that the first such name among `names` spells; None if none does."""
    return next((SPLIT_OF[n.casefold()] for n in names if n.casefold() in SPLIT_OF), None)

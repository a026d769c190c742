"""The names that people give to the splits of data of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deqzoo.errors import UserError

SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What people call the splits, in any case of letters; the words of `datasets`."""
SPLIT_OF = {word: split for split, words in SPELLINGS.items() for word in words}
SPLIT_COLUMN = "split"
"""The column of a table, in any case of letters, that says which split a row belongs to."""


def split_of(names: Sequence[str]) -> str | None:
    """The split that the first such name among `names` spells; None if none does."""
    return next((SPLIT_OF[n.casefold()] for n in names if n.casefold() in SPLIT_OF), None)


def named_split(word: Any, where: object) -> str:
    """The split that a cell of a table names.

    Args:
        word: in the cell.
        where: the table, for the message.

    Raises:
        UserError: it names none.
    """
    split = SPLIT_OF.get(str(word).strip().casefold())
    if split is None:
        raise UserError(
            f"{where} has {word!r} in the column {SPLIT_COLUMN}, which names train, validation or "
            "test in every row; rename the column if it means something else"
        )
    return split


def other_splits(where: object, split: str) -> UserError:
    """The error of a file that is named by a split, and has rows of others by its column."""
    return UserError(
        f"{where} has rows of other splits in its {split} split, by the column {SPLIT_COLUMN}: "
        "mend the column, or rename it if it means something else"
    )

"""Errors that are the user's to mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """One line that says what is wrong and how to mend it; the command line exits with code 2."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """An error's message without line breaks, or its type where it has none.

    Args:
        error: any.
        most: characters that are kept; None for all.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


@contextmanager
def as_user_error(what: str, *kinds: type[Exception], most: int | None = None) -> Iterator[None]:
    """Turn errors inside into a line of what went wrong, and why.

    Args:
        what: went wrong, the beginning of the line.
        kinds: types of the errors.
        most: characters of the reason that are kept; None for all.

    Raises:
        UserError: there was such an error.
    """
    try:
        yield
    except kinds as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{what}: {reason or one_line(error, most)}") from error

"""Errors that are the user's to mend."""


class UserError(ValueError):
    """One line that says what is wrong and how to mend it; the command line exits with code 2."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """An error's message without line breaks, or its type where it has none.

    Args:
        error: any.
        most: characters that are kept; None for all.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:most]

"""Errors that are the user's to mend."""


class UserError(ValueError):
    """One line that says what is wrong and how to mend it; the command line exits with code 2."""

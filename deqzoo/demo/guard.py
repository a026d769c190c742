"""Limits, and how mistakes become messages in the page instead of stack traces."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from deqzoo.errors import UserError

logger = logging.getLogger(__name__)

MAX_FILE = "20mb"
MAX_TEXT_CHARACTERS = 20_000
MAX_TEXT_FILE_BYTES = 200_000
MAX_PIXELS = 50_000_000
MAX_PICTURES = 24
MAX_NEW_WORDS = 200
MAX_STEPS = 100
MAX_GRAPH_FILE_BYTES = 10_000_000
TIME_LIMIT_SECONDS = 60.0


class Deadline:
    """Ends work that takes too long.

    Args:
        seconds: allowed from now on.
    """

    def __init__(self, seconds: float = TIME_LIMIT_SECONDS) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def check(self, *_: Any) -> None:
        """Callable as a callback of any kind.

        Raises:
            UserError: the time is up.
        """
        if time.monotonic() > self.end:
            raise UserError(
                f"this took more than {self.seconds:.0f} seconds and was stopped; "
                "try something smaller, or fewer steps"
            )


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its errors as messages of the page and of API clients.

    Works on generator functions, too. What is not the user's to mend goes to the log.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*arguments: Any) -> Iterator[Any]:
            try:
                yield from function(*arguments)
            except Exception as error:
                raise _message(error) from None

        return stream

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise _message(error) from None

    return call


def _message(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        text = str(error)
        if text.split(" ")[0].isalpha():  # else it starts with the name of a file
            text = text[:1].upper() + text[1:]
        return gr.Error(
            html.escape(text, quote=False), title="That did not work", print_exception=False
        )
    logger.error("request failed", exc_info=error)
    return gr.Error(
        "Something failed here, and it is not your fault. Please try again.",
        title="Internal error",
        print_exception=False,
    )


def whole_number(value: Any, name: str, low: int, high: int) -> int:
    """A whole number in a range.

    Raises:
        UserError: something else.
    """
    try:
        number = int(value)
        fits = number == float(value) and low <= number <= high
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UserError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return number


def real_number(value: Any, name: str, low: float, high: float) -> float:
    """A number in a range.

    Raises:
        UserError: something else.
    """
    try:
        number = float(value)
        fits = low <= number <= high
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return number

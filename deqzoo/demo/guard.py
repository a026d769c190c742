"""Limits, and how mistakes become messages in the page instead of stack traces."""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from deqzoo.errors import UserError

logger = logging.getLogger(__name__)

MAX_FILE = "20mb"
MAX_TEXT_CHARACTERS = 20_000
MAX_TEXT_FILE_BYTES = 200_000
MAX_PIXELS = 50_000_000
MAX_ASPECT = 4
ENOUGH_PIXELS = 4_000_000
MAX_PICTURES = 24
MAX_NEW_WORDS = 200
MAX_STEPS = 100
MAX_GRAPH_FILE_BYTES = 10_000_000
TIME_LIMIT_SECONDS = 60.0
#: That this process may use.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Deadline:
    """Ends work that takes too long, or that nobody waits for any more.

    Args:
        seconds: limit, from the start of this thread's request; from now on if there is none.
    """

    def __init__(self, seconds: float = TIME_LIMIT_SECONDS) -> None:
        self.seconds = seconds
        start, self.is_awaited = _REQUEST.get((time.monotonic(), lambda: True))
        self.end = start + seconds

    def check(self, *_: Any) -> None:
        """Callable as a callback of any kind.

        Raises:
            UserError: the time is up, or the request was given up.
        """
        if not self.is_awaited():
            raise UserError("stopped, since nobody waits for the answer any more")
        if time.monotonic() > self.end:
            raise UserError(
                f"this took more than {self.seconds:.0f} seconds and was stopped; "
                "try something smaller, or fewer steps"
            )


_REQUEST: ContextVar[tuple[float, Callable[[], bool]]] = ContextVar("request")
"""When the present request was taken up, and whether its sender still waits."""


@dataclass(eq=False)
class _Ticket:
    endpoint: str


class Gate:
    """Lets a few requests work at a time, one of each client in turn.

    One endpoint can hold all workers only while no request waits for another.

    Args:
        workers: requests that work at the same time.
        per_client: requests of one client that wait or work.
        per_endpoint: requests for one endpoint that wait, of all clients together.
        waiting: requests that wait, of all clients together.
    """

    def __init__(self, workers: int, per_client: int, per_endpoint: int, waiting: int) -> None:
        self.workers, self.per_client = workers, per_client
        self.per_endpoint, self.waiting = per_endpoint, waiting
        self._condition = threading.Condition()
        self._busy_endpoints: list[str] = []  # of each request that works
        self._clients: dict[str, int] = {}  # requests that wait or work
        self._queues: dict[str, deque[_Ticket]] = {}  # the client whose turn is next first

    @contextlib.contextmanager
    def enter(self, client: str, endpoint: str) -> Iterator[None]:
        """Wait for a turn, and keep it until the end.

        Raises:
            UserError: too many requests of this client, for this endpoint or of all, or the
                waiting took too long.
        """
        ticket, deadline = _Ticket(endpoint), Deadline()
        with self._condition:
            if self._clients.get(client, 0) >= self.per_client:
                raise UserError(
                    f"{self.per_client} of your requests are not answered yet; wait for them first"
                )
            endpoints = [
                waiting_ticket.endpoint
                for queue in self._queues.values()
                for waiting_ticket in queue
            ]
            if len(endpoints) >= self.waiting or endpoints.count(endpoint) >= self.per_endpoint:
                raise UserError("too many people are asking at the moment; try again in a minute")
            self._clients[client] = self._clients.get(client, 0) + 1
            queue = self._queues.setdefault(client, deque())
            queue.append(ticket)
            try:
                while len(self._busy_endpoints) >= self.workers or self._next() is not ticket:
                    self._condition.wait(1.0)
                    deadline.check()
            except BaseException:
                self._leave(client)
                raise
            finally:
                queue.remove(ticket)
                self._queues.pop(client)
                if queue:  # behind the others
                    self._queues[client] = queue
            self._busy_endpoints.append(endpoint)
            self._condition.notify_all()  # another may be next now
        try:
            yield
        finally:
            with self._condition:
                self._busy_endpoints.remove(endpoint)
                self._leave(client)

    def _next(self) -> _Ticket:
        first = [queue[0] for queue in self._queues.values()]
        share = max(1, self.workers - 1)
        return next((t for t in first if self._busy_endpoints.count(t.endpoint) < share), first[0])

    def _leave(self, client: str) -> None:
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]
        self._condition.notify_all()


#: `per_client` lets a school class behind one address ask at once; turns are taken by client.
GATE = Gate(workers=max(2, min(4, CORES)), per_client=32, per_endpoint=48, waiting=64)


@contextlib.contextmanager
def _request(endpoint: str) -> Iterator[None]:
    """A turn at the gate for the request that Gradio handles in this thread, and its clock."""
    request = LocalContext.request.get(None)
    host = getattr(getattr(request, "client", None), "host", None)
    event, blocks = LocalContext.event_id.get(None), LocalContext.blocks.get(None)

    def is_awaited() -> bool:
        jobs = blocks._queue.active_jobs if event is not None and blocks is not None else ()
        return all(one.alive for job in jobs for one in job or () if one._id == event)

    token = _REQUEST.set((time.monotonic(), is_awaited))
    try:
        with GATE.enter(host or "local", endpoint):
            yield
    finally:
        with contextlib.suppress(ValueError):  # a generator may end in another context
            _REQUEST.reset(token)


def guarded(
    function: Callable[..., Any], on_error: Callable[[gr.Error], Any] | None = None
) -> Callable[..., Any]:
    """The function with its errors as messages of the page and of API clients.

    It waits for its turn among the requests of all clients; the waiting counts as its time.
    Works on generator functions, too. Errors that the user cannot mend go to the log.

    Args:
        function: of an event.
        on_error: turns an error into the function's output; None raises it, as Gradio expects.
    """
    endpoint = f"{function.__module__}.{function.__qualname__}"
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*arguments: Any) -> Iterator[Any]:
            try:
                with _request(endpoint):
                    yield from function(*arguments)
            except Exception as error:
                if on_error is None:
                    raise _message(error) from None
                yield on_error(_message(error))

        return stream

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            with _request(endpoint):
                return function(*arguments)
        except Exception as error:
            if on_error is None:
                raise _message(error) from None
            return on_error(_message(error))

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


class SecurityHeaders:
    """Adds to every answer what keeps a browser from misusing it.

    Args:
        app: the ASGI application.
        frames: who may show the page in a frame, as a Content-Security-Policy says it.
    """

    def __init__(self, app: Any, frames: str) -> None:
        self.app = app
        policy = f"frame-ancestors {frames}; object-src 'none'; base-uri 'self'"
        self.headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"same-origin"),
        ]
        if frames == "'self'":
            self.headers.append((b"x-frame-options", b"SAMEORIGIN"))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def middleware(host: str, in_space: bool, share: bool) -> list[Middleware]:
    """Layers before the page: security headers and, for this machine only, a check of the host."""
    frames = "'self' https://huggingface.co https://*.hf.space" if in_space else "'self'"
    layers = [Middleware(SecurityHeaders, frames=frames)]
    if host in ("127.0.0.1", "localhost", "::1") and not share:
        # Else a foreign site whose name resolves to this machine could read the answers.
        names = ["127.0.0.1", "localhost", "[::1]", "::1"]
        layers.append(Middleware(TrustedHostMiddleware, allowed_hosts=names))
    return layers

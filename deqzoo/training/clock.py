"""Training by the clock: how far a run is, when its stages change, and when it has to end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence


class TimeBudget:
    """How much of a run's training time is over, so that its schedule ends when its time does.

    Only what happens inside `running()` counts: compilation, evaluation and saving do not.

    Args:
        seconds: of training.
        shares: of the stages, in any unit.
        clock: for tests.
    """

    def __init__(
        self,
        seconds: float,
        shares: Sequence[float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self.clock = seconds, clock
        self.counted_seconds = 0.0
        """Seconds until the last pause or end."""
        total = sum(shares)
        self.ends = [sum(shares[: i + 1]) / total for i in range(len(shares))]
        self.ends[-1] = 1.0
        self._since: float | None = None

    @property
    def used_seconds(self) -> float:
        """Seconds of training so far."""
        return self.counted_seconds + (0.0 if self._since is None else self.clock() - self._since)

    @property
    def progress(self) -> float:
        """Share of the time that is over, in [0, 1]."""
        return min(1.0, self.used_seconds / self.seconds)

    @property
    def stage(self) -> int | None:
        """Number of the stage that is due; None once the time is over."""
        progress = self.progress
        return next((i for i, end in enumerate(self.ends) if progress < end), None)

    def shorten(self, seconds: float) -> None:
        """Let the rest of the run take so many seconds of training at most."""
        self.seconds = min(self.seconds, self.used_seconds + max(seconds, 0.0))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        self._since = self.clock()
        try:
            yield
        finally:
            self.counted_seconds, self._since = self.used_seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside, within `running()`."""
        self.counted_seconds, self._since = self.used_seconds, None
        try:
            yield
        finally:
            self._since = self.clock()

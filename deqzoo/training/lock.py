"""One process at a time writes to the folder of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deqzoo.errors import UserError
from deqzoo.files import make_folder

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def lock(folder: Path, name: str = "lock") -> Iterator[None]:
    """Hold a folder, so that no second process (of another launch) writes to it.

    Where the system or the file system has no locks, nothing is held.

    Args:
        folder: of the run; made if it is not there.
        name: of the file that is locked, which is left as it is.

    Raises:
        UserError: another process holds it.
    """
    make_folder(folder)
    with (folder / name).open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder} is being trained by another process") from error
            except OSError:  # some network file systems
                pass
        yield

"""Kills a piece of work at each of its steps on the file system, for tests of what it leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"}
_KILLED = 77


def kills(work: Callable[[], Any], folder: Path, prepare: Callable[[], Any]) -> Iterator[int]:
    """Run `work` in a child that dies before its 1st, 2nd, ... change below `folder`.

    `prepare` sets the folder up before each run. Yields after each kill, until the work ends
    whole.
    """
    for limit in range(1, 1000):
        prepare()
        child = os.fork()
        if child == 0:
            _work_until(limit, work, str(folder.resolve()))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            assert limit > 2, "the work changed nothing"
            return
        assert code == _KILLED, f"the work itself failed (exit code {code})"
        yield limit
    raise AssertionError("the work does not come to an end")


def _work_until(limit: int, work: Callable[[], Any], folder: str) -> None:
    torch.set_num_threads(1)  # a fork has no threads of OpenMP
    left = limit

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, _, flags = arguments
            changes = flags & (os.O_WRONLY | os.O_RDWR)
        elif event in _CHANGES:
            path, changes = arguments[0], True
        elif event == "ctypes.dlsym":  # the call of renameat2, which no event names
            path, changes = folder, arguments[1] == "renameat2"
        else:
            return
        if not changes or not isinstance(path, (str, bytes, os.PathLike)):
            return
        # Deleting a tree names its files by their bare names, from inside.
        named = os.fsdecode(path)
        if os.path.isabs(named) and not os.path.realpath(named).startswith(folder):
            return
        left -= 1
        if left == 0:
            os._exit(_KILLED)

    code = 1
    try:
        sys.addaudithook(watch)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)

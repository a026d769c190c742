"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Growth over what was in use at the start, in bytes; None where it cannot be measured."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure how far memory grows inside the context.

    On a GPU this is PyTorch's own count. On the CPU it is the process's high-water mark, which
    Linux lets a process reset; memory that was freed before is returned to the system first.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    resident = _reset_high_water()
    yield peak
    if resident is not None:
        peak.bytes = max(0, _read("VmHWM") - resident)


def _reset_high_water() -> int | None:
    """Resident bytes now, with the high-water mark set back to them."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        return _read("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def _read(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024

"""Timing on a shared machine, and tables of what was measured."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def cpu_time(run: Callable[[], Any]) -> float:
    """Process CPU seconds of one call; unlike wall time it does not count other processes."""
    started = time.process_time()
    run()
    return time.process_time() - started


def stable_minima(
    runs: dict[str, Callable[[], Any]], seconds: float = 10.0, patience: int = 5
) -> dict[str, float]:
    """Least CPU time of each run, in seconds, taken in turns so that all meet the same machine.

    Turns go on until none of the minima has fallen by a percent for `patience` turns, or the time
    is up; there are at least three.

    Args:
        runs: what to time, by name.
        seconds: wall time after which no new turn starts.
        patience: turns without progress after which the minima count as stable.
    """
    least = dict.fromkeys(runs, float("inf"))
    deadline = time.perf_counter() + seconds
    turns = calm = 0
    while turns < 3 or (calm < patience and time.perf_counter() < deadline):
        calm += 1
        for name, run in runs.items():
            taken = cpu_time(run)
            if taken < 0.99 * least[name]:
                calm = 0
            least[name] = min(least[name], taken)
        turns += 1
    return least


def machine() -> dict[str, Any]:
    """What the numbers were taken on, with the load of the last minute."""
    return {
        "cpu": _cpu_name(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose numbers are given three significant digits."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_text(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def write_results(folder: Path, name: str, results: dict[str, Any], text: str) -> None:
    """Write `name`.json and `name`.md, and print the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), **results}
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    (folder / f"{name}.md").write_text(f"{text}\n\nMachine: {about}.\n")
    print(text)

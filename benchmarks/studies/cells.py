"""Results of a study, one cell at a time, in a JSON file that a later start goes on from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Cells:
    """Measured cells of a study by name.

    Args:
        name: of the study; the file is `name.json` beside this module.
    """

    def __init__(self, name: str, folder: Path = HERE) -> None:
        self.path = folder / f"{name}.json"
        self.done: dict[str, Any] = {}
        if self.path.is_file():
            self.done = json.loads(self.path.read_text(encoding="utf-8"))["cells"]

    def fill(
        self,
        wanted: Iterable[str],
        measure: Callable[[str], Any],
        weights_of: Callable[[str], str | None] | None = None,
    ) -> list[str]:
        """Measure the wanted cells that are missing, in order; returns those that still are.

        A cell whose measurement raises stays missing, with the reason on stderr.

        Args:
            weights_of: digest of the weights that a cell is measured on. It is kept in the cell
                (which must be a dict), and a cell of other weights is measured anew.
        """
        wanted = list(wanted)
        weights = {key: weights_of(key) for key in wanted} if weights_of else {}
        for key in wanted:
            if weights and self.done.get(key, {}).get("weights_sha256") != weights[key]:
                self.done.pop(key, None)
            if key in self.done:
                continue
            try:
                self.done[key] = measure(key)
                if weights:
                    self.done[key]["weights_sha256"] = weights[key]
            except Exception as error:  # whatever stops one cell must not stop the others
                print(f"{key}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            self.save(wanted)
            print(f"{key}: done", file=sys.stderr)
        return self.save(wanted)

    def save(self, wanted: list[str]) -> list[str]:
        """Write the cells and the list of missing ones."""
        missing = [key for key in wanted if key not in self.done]
        content = {"missing": missing, "cells": self.done}
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        fresh.rename(self.path)
        return missing


def write_text(name: str, text: str, folder: Path = HERE) -> None:
    """Keep a table or plot beside the results, and say where."""
    (folder / name).write_text(text, encoding="utf-8")
    print(folder / name, file=sys.stderr)


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

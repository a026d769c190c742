"""Folders import only from those below them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "deqzoo"

#: The lowest first; folders of one line know nothing of each other.
LAYERS = (
    ("errors",),
    ("zoo", "files"),
    ("sealed", "equilibrium"),
    ("records", "recipe"),
    ("models",),
    ("data",),
    ("tasks",),
    ("evaluation",),
    ("training", "fidelity"),
    ("hub",),
    ("demo",),
    ("cli",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def place(path: Path) -> str:
    """The folder or module of the package that a file belongs to; commands are `cli`."""
    if path.stem == "cli" or path.stem.endswith("_cli"):
        return "cli"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imported(path: Path) -> Iterator[str]:
    """Folders and modules of the package that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deqzoo."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "deqzoo":
            yield from (alias.name for alias in node.names if alias.name in LAYER)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name.split(".")[1] for name in names if name.startswith("deqzoo."))


@pytest.mark.parametrize("name", [name for name in LAYER if name != "cli"])
def test_no_import_leads_up(name: str) -> None:
    files = [p for p in ROOT.rglob("*.py") if place(p) == name]
    assert files
    upward = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in files
        for other in imported(path)
        if other != name and LAYER[other] >= LAYER[name]
    }
    assert not upward


def test_every_folder_has_its_layer() -> None:
    found = {place(path) for path in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert found == set(LAYER)

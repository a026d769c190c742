"""The core stands on torch and the standard library alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import deqzoo.equilibrium


def test_the_core_imports_torch_only() -> None:
    allowed = {"torch", "deqzoo", *sys.stdlib_module_names}
    folder = Path(deqzoo.equilibrium.__file__).parent
    sources = list(folder.rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, source
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, (source, name)
                if name.startswith("deqzoo"):
                    assert name.startswith("deqzoo.equilibrium"), (source, name)

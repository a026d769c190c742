"""README: its Python examples run, and what its commands name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image

from deqzoo.hub.cards import rendered_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_four_examples() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("index", range(4))
def test_examples_run(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(EXAMPLES[index], f"README example {index + 1}", "exec"), {})


def test_cards_and_table_are_up_to_date() -> None:
    def stored(path: Path) -> str:
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    stale = [path.name for path, text in rendered_files(ROOT).items() if stored(path) != text]
    assert not stale, "run `deqzoo cards`"


def test_first_command_names_a_bundled_picture() -> None:
    (command,) = re.findall(r"deqzoo classify (\S+)", README)
    assert (ROOT / command).is_file()


def test_showcase_draws_a_row_per_picture(tiny_mdeq: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("showcase", ROOT / "examples" / "showcase.py")
    showcase = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(showcase)
    pictures = [str(path) for path in sorted((ROOT / "examples" / "pictures").iterdir())]
    output = tmp_path / "docs" / "showcase.png"
    showcase.main([*pictures, "--model", str(tiny_mdeq), "--output", str(output)])
    with Image.open(output) as image:
        assert image.size == (showcase.WIDTH, 48 + 3 * showcase.ROW)
        assert len(image.getcolors(maxcolors=1_000_000)) > 1000  # the pictures are there

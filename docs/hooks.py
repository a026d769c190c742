"""Pages that are made from other files of the repository: model cards and studies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add a page per model card, their overview, and the studies."""
    names = []
    for card in sorted((ROOT / "model_cards").glob("*.md")):
        text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        pictures = {p.name for p in card.parent.glob("*.svg")}
        files.append(_page(config, f"models/{card.name}", _without_links(text, pictures)))
        names.append(card.stem)
    for picture in (ROOT / "model_cards").glob("*.svg"):
        files.append(_copy(config, f"models/{picture.name}", picture))
    rows = "\n".join(f"- [{name}]({name}.md)" for name in names)
    files.append(_page(config, "models/index.md", f"# Models\n\n{rows}\n"))
    measured = (ROOT / "benchmarks" / "own_data.md").read_text(encoding="utf-8")
    files.append(_page(config, "own-data-measured.md", measured))
    studies = ROOT / "benchmarks" / "studies"
    text = (studies / "README.md").read_text(encoding="utf-8")
    pictures = {p.name for p in studies.glob("*.svg")}
    for name in pictures:
        files.append(_copy(config, name, studies / name))
    files.append(_page(config, "studies.md", _without_links(text, pictures)))
    return files


def _page(config: Any, uri: str, text: str) -> File:
    return File.generated(config, uri, content=text)


def _copy(config: Any, uri: str, source: Path) -> File:
    return File.generated(config, uri, abs_src_path=str(source))


def _without_links(text: str, known: set[str]) -> str:
    """Links to files that the site does not have become plain text, pictures vanish."""

    def kept(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        if "://" in target or target.startswith("#") or target in known:
            return match.group(0)
        return "" if picture else label

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", kept, text)

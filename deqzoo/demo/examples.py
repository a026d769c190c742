"""The bundled example pictures: what they show, and their accessible names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

#: What a file shows whose name does not say it.
_SHOWS = {"chelsea": "cat"}

#: Gives the thumbnails of example pictures their accessible names: the files'.
NAME_THUMBNAILS = """
() => {
  const name = () => document.querySelectorAll('[id$="-examples"] button img').forEach((image) => {
    const file = decodeURIComponent(image.src.split('/').pop()).replace(/\\.[a-z]+$/, '');
    const words = 'Example: ' + file.replaceAll('_', ' ');
    if (image.alt === words) return;
    image.alt = words;
    image.closest('button').setAttribute('aria-label', words);
    image.closest('button').title = words;
  });
  name();
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
}
"""


def shown_class(path: Path | str, labels: Collection[str]) -> str | None:
    """The class that a file's name says it shows; None where it is no class of the model."""
    stem = Path(path).stem
    label = _SHOWS.get(stem, stem).replace("_", " ")
    return label if label in labels else None


def pictures_of_others(
    paths: Collection[Path], models: Mapping[str, Collection[str]], first: str
) -> dict[str, list[Path]]:
    """By model, the pictures that it knows and the first model does not."""
    unknown_paths = [path for path in paths if shown_class(path, models[first]) is None]
    known_paths = {name: known_pictures(unknown_paths, labels) for name, labels in models.items()}
    return {name: pictures for name, pictures in known_paths.items() if pictures}


def known_pictures(paths: Collection[Path], labels: Collection[str]) -> list[Path]:
    """The pictures whose class a model knows."""
    return [path for path in paths if shown_class(path, labels) is not None]

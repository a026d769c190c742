"""The demo as a Space of the Hub: its folder, and the upload of it."""

from __future__ import annotations

import re
import shutil
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from deqzoo.errors import UserError
from deqzoo.hub.integrity import published_files
from deqzoo.hub.publish import upload
from deqzoo.zoo import ORGANISATION, bundled_folder, list_models

_TREES = ("deqzoo", "examples/pictures")
#: Paths that an upload replaces; other files in the Space, such as added graphs, stay.
_OWN = re.compile(r"(deqzoo|examples/pictures)/.+")

_FRONT_MATTER = """---
title: Deep equilibrium models
emoji: 🎯
colorFrom: green
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
short_description: Watch networks solve for their answer
models:
{models}
---

# Networks that solve for their answer

The demo of deqzoo, a zoo of deep equilibrium models for images, text and graphs. It runs on the
processor with the checkpoints in `deqzoo/hub_configs`, and needs no network.

The graph tab offers made-up examples. For the data sets COX2 and PROTEINS, put their files into
`graphs/COX2` and `graphs/PROTEINS`, as `NAME_A.txt` and so on.
"""


def assemble(folder: Path) -> list[Path]:
    """Write the Space's files.

    The package and its checkpoints travel along, so that the Space does not depend on a release.

    Args:
        folder: to write to; must not exist or be empty.

    Returns:
        The files' paths inside the folder, sorted.

    Raises:
        UserError: the folder is not empty, this is no source checkout, or Gradio is not installed.
    """
    source = Path(__file__).resolve().parents[2]
    if not (source / "app.py").is_file():
        raise UserError("a Space is assembled inside a source checkout only; clone the repository")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name a new one")
    for part in _TREES:
        if folder.resolve().is_relative_to(source / part):
            raise UserError(f"{folder} lies in {source / part}, which the Space holds a copy of")
    front_page = readme()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("app.py", "LICENSE", "NOTICE"):
        shutil.copy(source / name, folder / name)
    ignore_patterns = shutil.ignore_patterns("__pycache__", "*.pyi", "hub_configs", "*.so")
    for part in _TREES:
        shutil.copytree(source / part, folder / part, ignore=ignore_patterns)
    for name in list_models():
        _copy_checkpoint(name, folder / "deqzoo" / "hub_configs" / name)
    (folder / "requirements.txt").write_text(requirements(source), encoding="utf-8")
    (folder / "README.md").write_text(front_page, encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def publish_space(repo_id: str, folder: Path, private: bool, token: str | None) -> str:
    """Upload an assembled folder in one commit, without what an older one left; the commit's id.

    Raises:
        UserError: the Hub refused, or could not be reached.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files
    ]
    api = HfApi(token=token)
    return upload(api, repo_id, operations, _OWN, private=private, kind="space")[0]


def requirements(source: Path) -> str:
    """What pip installs in the Space: the package's needs; Gradio comes with the Space."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["graph"]]
    return "\n".join(["--extra-index-url https://download.pytorch.org/whl/cpu", *needs]) + "\n"


def readme() -> str:
    """The Space's README with the front matter that the Hub reads.

    Raises:
        UserError: Gradio is not installed, so its version is unknown.
    """
    try:
        gradio = version("gradio")
    except PackageNotFoundError as error:
        raise UserError("the demo needs Gradio: pip install -e '.[demo,graph]'") from error
    names = [f"  - {ORGANISATION}/{name}" for name in list_models()]
    models = "\n".join(names)
    text = _FRONT_MATTER.format(gradio=gradio, models=models)
    return text if names else text.replace("models:\n\n", "")


def _copy_checkpoint(name: str, target: Path) -> None:
    folder = bundled_folder(name)
    if folder is None:
        return
    for path in published_files(folder):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / path, target / path)

"""Names of the zoo's checkpoints and the folders that hold them; standard library only."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deqzoo.errors import UserError, as_user_error

ORGANISATION = "deqzoo"
_PACKAGE = Path(__file__).resolve().parent
#: What `deqzoo classify` and the demo take when no model is named: quick on a CPU, and in every
#: wheel, so that the answer is the same however deqzoo was installed.
DEFAULT_IMAGE_MODEL = "mdeq-tiny-cifar-upg"

_STUDY = "benchmarks/studies/README.md compares them"
#: Names that the zoo released once -> what to use instead, and why.
WITHDRAWN = {
    "deq-transformer-wikitext2-upg": ("deq-transformer-wikitext2-jr-upg", _STUDY),
    "deq-transformer-wikitext2-implicit": ("deq-transformer-wikitext2-jr-upg", _STUDY),
    "deq-transformer-wikitext2-jr-implicit": ("deq-transformer-wikitext2-jr-upg", _STUDY),
}


def checkpoints_root() -> Path:
    """The folder of bundled checkpoints: of a source checkout, else of the installed package."""
    checkout = _PACKAGE.parent
    return (checkout if (checkout / "hatch_build.py").is_file() else _PACKAGE) / "hub_configs"


@dataclass(frozen=True)
class TaskInfo:
    """What models do, and where that task is found.

    Attributes:
        suffix: how the names of its model classes end.
        words: what people call it.
        unit: what a sample is, in the plural.
        training: "module:name" of the class (or function) that makes its `Task` of a recipe.
        evaluator: "module:name" of its `Evaluator`.
        finetuning: "module:name" of the function that makes a `Job` of a model and data of one's
            own; none where a task has no such data.
    """

    suffix: str
    words: str
    unit: str
    training: str
    evaluator: str
    finetuning: str | None = None


TASKS = {
    "image-classification": TaskInfo(
        "ForImageClassification",
        "image classification",
        "pictures",
        "deqzoo.tasks.lazy_images:image_task",
        "deqzoo.evaluation.images:ImageEvaluator",
        "deqzoo.tasks.images:finetuning",
    ),
    "language-modeling": TaskInfo(
        "ForCausalLM",
        "language modelling",
        "tokens",
        "deqzoo.tasks.text:LanguageModelingTask",
        "deqzoo.evaluation.text:TextEvaluator",
        "deqzoo.tasks.text:finetuning",
    ),
    "graph-classification": TaskInfo(
        "ForGraphClassification",
        "graph classification",
        "graphs",
        "deqzoo.tasks.graphs:GraphClassificationTask",
        "deqzoo.evaluation.graphs:GraphEvaluator",
        "deqzoo.tasks.graphs:finetuning",
    ),
    "node-classification": TaskInfo(
        "ForNodeClassification",
        "node classification",
        "nodes",
        "deqzoo.tasks.nodes:NodeClassificationTask",
        "deqzoo.evaluation.graphs:NodeEvaluator",
    ),
}
"""Tasks by the names that recipes and evaluation files use; a task of your own is one entry."""


def task_of(architecture: str) -> str | None:
    """The task of a model class by its name; None for models without a head."""
    return next((name for name, t in TASKS.items() if architecture.endswith(t.suffix)), None)


def task_words(architecture: str) -> str:
    """What the models of a class do, in words."""
    task = task_of(architecture)
    return "features" if task is None else TASKS[task].words


def list_models(pattern: str = "*", task: str | None = None) -> list[str]:
    """Names of the bundled checkpoints, sorted.

    Args:
        pattern: with wildcards, as "mdeq*" or "*-upg"; without any, a part of the name ("cifar").
        task: in words, or a part of them ("image").

    Raises:
        UserError: no model of the zoo could do such a task.
    """
    task_names = [info.words for info in TASKS.values()]
    if task is not None and not any(task in words for words in task_names):
        raise UserError(f"unknown task {task!r}; the tasks are {', '.join(task_names)}")
    root = checkpoints_root()
    if not root.is_dir():
        return []
    names = sorted(
        folder.name
        for folder in root.iterdir()  # a name with a dot is a checkpoint that is being stored
        if not folder.name.startswith(".") and (folder / "config.json").is_file()
    )
    names = fnmatch.filter(names, pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    if task is None:
        return names
    return [name for name in names if task in task_words(_architecture(root / name))]


def _architecture(folder: Path) -> str:
    return (read_json(folder / "config.json").get("architectures") or ["?"])[0]


def bundled_folder(name: str) -> Path | None:
    """The folder of a zoo name, `deqzoo/NAME` or bare; None where it is not bundled.

    Raises:
        UserError: the name is withdrawn.
    """
    bare = bare_name(name)
    if bare in list_models():
        return checkpoints_root() / bare
    check_withdrawn(bare)
    return None


def check_withdrawn(name: str) -> None:
    """Say what takes the place of a name that the zoo has no more.

    Raises:
        UserError: the name is withdrawn.
    """
    if name in WITHDRAWN:
        replacement, reason = WITHDRAWN[name]
        raise UserError(f"{name} is withdrawn: use {replacement} ({reason})")


def bundled_source(name: Any, revision: str | None = None) -> Any:
    """The folder of a zoo name, for what loads by name or folder; anything else stays.

    A folder of that name goes first, and a revision asks for the Hub.

    Raises:
        UserError: the name is withdrawn.
    """
    is_name = isinstance(name, (str, os.PathLike))
    if not is_name or revision not in (None, "main") or Path(name).is_dir():
        return name
    folder = bundled_folder(os.fspath(name))
    return name if folder is None else str(folder)


def bare_name(name: str) -> str:
    """The name without the zoo's own organisation."""
    return name.removeprefix(f"{ORGANISATION}/")


def own_name(name: str | os.PathLike[str]) -> str:
    """What a model is called by its zoo name or folder, which may be the working folder."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else bare_name(path.name)


def suggestion(name: str) -> str:
    """A clause for error messages that lists the nearest names, or the known ones."""
    names = list_models()
    if matches := difflib.get_close_matches(bare_name(name), names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(matches)}?"
    return f"the zoo's models are {', '.join(names)}" if names else "no checkpoint is bundled"


def resolve_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """The local folder or bundled checkpoint of a name; None where only the Hub could have it.

    A bundled checkpoint is that of today: another revision is the Hub's.

    Raises:
        UserError: a path to something else than a folder with a configuration, or a withdrawn name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"folder {path} has no config.json, so it holds no model")
        return path.resolve()
    if path.is_file():
        raise UserError(f"{path} is a file; name the folder that holds config.json and the weights")
    return bundled_folder(str(name)) if revision in (None, "main") else None


def resolve_bundled(name: str | os.PathLike[str]) -> Path:
    """As `resolve_folder`, for work that needs the files at hand.

    Raises:
        UserError: no such folder or bundled checkpoint.
    """
    folder = resolve_folder(name)
    if folder is None:
        raise UserError(f"unknown model {str(name)!r}: {suggestion(str(name))}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: unreadable file, broken JSON, or JSON that is no object.
    """
    with as_user_error(f"cannot read {path}", OSError):
        data = path.read_bytes()
    with as_user_error(f"{path} is not valid JSON", ValueError):
        content = json.loads(data.decode("utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content

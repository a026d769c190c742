"""The bundled checkpoints by task; each is loaded when it is first used, and once."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import deqzoo.zoo
from deqzoo.equilibrium import SOLVERS
from deqzoo.errors import UserError
from deqzoo.hub.catalogue import Entry, best_first, entry
from deqzoo.models.auto import DEQModel
from deqzoo.models.readers import load_processor, load_tokenizer

from .guard import MAX_STEPS, real_number, whole_number

IMAGES = "image classification"
TEXT = "language modelling"
GRAPHS = "graph classification"
NODES = "node classification"

#: What a tab says where the family has no checkpoint: the commands that train one and store it.
TRAINING = {
    IMAGES: "deqzoo train recipes/mdeq-tiny-cifar-upg.yaml && "
    "deqzoo store runs/mdeq-tiny-cifar-upg",
    TEXT: "deqzoo train recipes/deq-transformer-ptb-upg.yaml && "
    "deqzoo store runs/deq-transformer-ptb-upg",
    GRAPHS: "deqzoo train recipes/ignn-proteins-upg.yaml --data DIR && "
    "deqzoo store runs/ignn-proteins-upg --data DIR",
}
TOLERANCES = (1e-6, 1e-1)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model with what reads its input: an image processor, a tokenizer, or nothing."""

    entry: Entry
    model: Any
    reader: Any


class Shelf:
    """Checkpoints of this process, shared by all users."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._models: dict[str, LoadedCheckpoint] = {}

    def entries(self, task: str) -> list[Entry]:
        """Sound checkpoints of a task: the default one, then the others, the best first."""
        checkpoints = []
        for name in deqzoo.zoo.list_models():
            try:
                checkpoints.append(entry(name))
            except UserError:  # a damaged folder must not take the page down
                continue
        metric = "perplexity" if task == TEXT else "accuracy"
        ranked_checkpoints = best_first((e for e in checkpoints if e.task == task), metric)
        # The text style of WikiText fits what people write; Penn Treebank's does not.
        return sorted(
            ranked_checkpoints,
            key=lambda e: (e.name != deqzoo.zoo.DEFAULT_IMAGE_MODEL, "ptb" in e.name),
        )

    def labels(self, name: str, task: str) -> list[str]:
        """The classes of a checkpoint, without loading its weights."""
        checkpoint = next((e for e in self.entries(task) if e.name == name), None)
        return list((checkpoint.config.get("label2id") or {}) if checkpoint else {})

    def names(self, task: str) -> list[str]:
        """Names of a task's checkpoints, the default one first."""
        return [e.name for e in self.entries(task)]

    def get(self, name: Any, task: str) -> LoadedCheckpoint:
        """A checkpoint of a task by its name; the default one where the name is empty.

        Raises:
            UserError: no such checkpoint, or its files are damaged.
        """
        names = self.names(task)
        if not names:
            raise UserError(f"no checkpoint for {task} is bundled; train one: {TRAINING[task]}")
        name = name or names[0]
        if name not in names:
            raise UserError(f"unknown checkpoint {str(name)[:80]!r}; choose {' or '.join(names)}")
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._models:
                self._models[name] = self._load(entry(name), task)
        return self._models[name]

    def _load(self, checkpoint: Entry, task: str) -> LoadedCheckpoint:
        readers = {IMAGES: load_processor, TEXT: load_tokenizer}
        try:
            model = DEQModel.from_pretrained(checkpoint.folder).eval()
            return LoadedCheckpoint(
                checkpoint, model, readers[task](model) if task in readers else None
            )
        except UserError as error:  # where the server keeps its files is nobody's business
            raise UserError(str(error).replace(f"{checkpoint.folder.parent}/", "")) from error


def solver_settings(name: Any, max_steps: Any, tolerance: Any) -> dict[str, Any]:
    """Per-call settings from what a user chose.

    Raises:
        UserError: a value is unknown or out of range.
    """
    if name not in SOLVERS:
        raise UserError(f"unknown solver {str(name)[:80]!r}; choose {', '.join(SOLVERS)}")
    return {
        "name": name,
        "max_steps": whole_number(max_steps, "the budget", 1, MAX_STEPS),
        "tol": real_number(tolerance, "the tolerance", *TOLERANCES),
    }

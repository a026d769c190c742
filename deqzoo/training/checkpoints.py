"""Which checkpoint of a run to go on from, and which to keep."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from deqzoo.errors import UserError
from deqzoo.files import COMPLETE, damage
from deqzoo.recipe import Recipe, recorded_recipe
from deqzoo.tasks.base import Task

logger = logging.getLogger(__name__)


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that is sound; None where none was written to its end.

    Damaged ones are passed over, with one line in the log for each.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    paths = complete_checkpoints(Path(folder))
    for path in reversed(paths):
        if not (path / COMPLETE).read_bytes():
            logger.warning("%s carries no digests (an older version's); used unchecked", path)
            return str(path)
        fault = damage(path)
        if fault is None:
            return str(path)
        if os.environ.get("RANK", "0") == "0":
            logger.warning("checkpoint %s is passed over: %s", path, fault)
    if paths:
        raise UserError(
            f"every checkpoint in {folder} is damaged; remove that folder to train from the start"
        )
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints `checkpoint-STEP` that were written to their end, the oldest first."""
    paths = (path for path in folder.glob("checkpoint-[0-9]*") if (path / COMPLETE).exists())
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]))


def keep_newest(folder: Path) -> None:
    """Delete all checkpoints but the newest two, and those that a kill cut off."""
    newest_paths = complete_checkpoints(folder)[-2:]
    for path in folder.glob("checkpoint-*"):
        if path not in newest_paths:
            (path / COMPLETE).unlink(missing_ok=True)  # first: a half-deleted one counts as none
            shutil.rmtree(path, ignore_errors=True)


def conditions(recipe: Recipe, task: Task, bf16: bool, device: torch.device) -> dict[str, Any]:
    """What, beside a checkpoint's own content, decides how a run goes on."""
    return {
        "recipe": recipe.to_dict(),
        "data": task.describe(),
        "precision": "bf16" if bf16 else "float32",
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def differences(old_settings: Any, new_settings: Any, place: str = "") -> list[str]:
    """Where two nested settings differ, a clause for each; keys that are new do not count."""
    old_settings, new_settings = (
        json.loads(json.dumps(value, default=str)) for value in (old_settings, new_settings)
    )
    if isinstance(old_settings, dict) and isinstance(new_settings, dict):
        if "recipe" in old_settings:  # as an older version wrote it: with this one's defaults
            stored_recipe = recorded_recipe(old_settings)
            old_settings = (
                old_settings
                if stored_recipe is None
                else {**old_settings, "recipe": stored_recipe.to_dict()}
            )
        return [
            clause
            for key in old_settings
            for clause in differences(
                old_settings[key], new_settings.get(key), f"{place}.{key}" if place else key
            )
        ]
    if old_settings == new_settings:
        return []
    return [f"{place} was {_short(old_settings)}, is {_short(new_settings)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}..."

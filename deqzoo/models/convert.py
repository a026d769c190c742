"""What all converters share: reading checkpoint and settings files, and the output folder."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deqzoo.errors import UserError

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the state dict beside their own counters."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file, without the prefix of data-parallel training.

    Args:
        path: `.safetensors`, or a pickle, which is read with `weights_only=True`; the state dict
            itself, or under "state_dict", "model_state_dict" or "model".

    Raises:
        UserError: the file is missing, damaged, unsafe, or holds no state dict.
    """
    content = _load(path)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise UserError(
            f"{path} holds no state dict (names with tensors), nor one under "
            f"{', '.join(map(repr, _WRAPPERS))}"
        )
    if not content:
        raise UserError(f"{path} holds an empty state dict")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes fails in arbitrary ways
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            raise UserError(
                f"{path} holds more than tensors ({forbidden[1]}) and was not loaded, since that "
                "could run code: save the bare state dict, best as .safetensors"
            ) from error
        raise UserError(
            f"cannot read {path} as a checkpoint: it is damaged or of another format "
            f"({type(error).__name__})"
        ) from error


def read_settings(path: Path, presets: Iterable[str]) -> dict[str, Any]:
    """Return the JSON object in a file of settings, given in place of a preset's name.

    Args:
        path: the file.
        presets: the names that would have been understood too.

    Raises:
        UserError: the file is missing or holds no JSON object.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is neither a JSON file nor a preset; the presets are {', '.join(presets)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON object of settings: {one_line(error)}") from error
    if not isinstance(values, dict) or not isinstance(values.get("config", {}), dict):
        where = " under 'config'" if isinstance(values, dict) else ""
        raise UserError(f"{path} holds no JSON object with settings{where}")
    return values


def output_folder(path: str | Path) -> Path:
    """Return the folder to write, which need not exist.

    Raises:
        UserError: a file is in its place.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"output {path} is a file; name a folder")
    return path


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__

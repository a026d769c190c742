"""What all converters share: reading checkpoint and settings files, and the output folder."""

from __future__ import annotations

import difflib
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deqzoo.errors import UserError, as_user_error

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the state dict beside their own counters."""


def read_state_dict(path: Path, weights: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file, without prefixes that wrappers of modules add.

    Args:
        path: `.safetensors`, or a pickle, which is read with `weights_only=True`; the state dict
            itself, or under "state_dict", "model_state_dict" or "model".
        weights: the key of the state dict, where a file has several (weights and their average).

    Raises:
        UserError: the file is missing, damaged, unsafe, holds no state dict or several, or weights
            that are no finite floating-point numbers.
    """
    content = _load(path)
    while isinstance(content, Mapping) and not _is_state_dict(content):
        candidates = [
            str(key)
            for key, value in content.items()
            if isinstance(value, Mapping)
            and (key in _WRAPPERS or (_is_state_dict(value) and all(type(k) is str for k in value)))
        ]
        if weights is not None:
            if weights not in content or not isinstance(content[weights], Mapping):
                raise UserError(
                    f"{path} has no weights {weights!r}; it has {', '.join(candidates) or 'none'}"
                )
            content, weights = content[weights], None
            continue
        if len(candidates) > 1:
            raise UserError(
                f"{path} holds several state dicts: choose one with --weights "
                f"({', '.join(candidates)})"
            )
        if not candidates or candidates[0] not in _WRAPPERS:
            break
        content = content[candidates[0]]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise UserError(
            f"{path} holds no state dict (names with tensors), nor one under "
            f"{', '.join(map(repr, _WRAPPERS))}"
        )
    if weights is not None:
        raise UserError(f"{path} is a state dict itself; leave --weights out")
    if not content:
        raise UserError(f"{path} holds an empty state dict")
    # Other tensors lie beside those with the prefix "sd.", see `without_companions`.
    companions = any(key.startswith("sd.") for key in content)
    result: dict[str, Tensor] = {}
    for key, tensor in content.items():
        name = _PREFIXES.sub("", key)
        if name in result:
            raise UserError(f"{path} holds {name} twice, with and without a prefix ({key})")
        if key.startswith("sd.") or not companions:
            _check_tensor(path, key, tensor)
        result[name] = tensor
    return result


_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
"""Of data-parallel training and of `torch.compile`."""


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    """Refuse weights that are no finite floating-point numbers; counters are whole numbers."""
    if not tensor.is_floating_point():
        if key.endswith("num_batches_tracked"):
            return
        raise UserError(f"{key} in {path} holds {tensor.dtype}, no floating-point weights")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{key} in {path} holds NaN or infinite values: the training diverged")


def check_settings(values: Mapping[str, Any], known_names: Iterable[str], path: str | Path) -> None:
    """Refuse a setting whose name is nearly a known one; others may belong to other tools.

    Raises:
        UserError: a misspelt name; the message suggests the known one.
    """
    names = list(known_names)
    for key in values:
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.85)
        if key not in names and near and near[0] not in values:
            raise UserError(f"{path}: unknown setting {key!r}; did you mean {near[0]!r}?")


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes fails in arbitrary ways
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and match:
            raise UserError(
                f"{path} holds more than tensors ({match[1]}) and was not loaded, since that "
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
        presets: names of the presets, for the message.

    Raises:
        UserError: the file is missing or holds no JSON object.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is neither a JSON file nor a preset; the presets are {', '.join(presets)}"
        )
    with as_user_error(f"{path} is not a JSON object of settings", OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
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

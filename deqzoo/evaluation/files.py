"""What every evaluation file records beside its numbers: weights, versions, time and command."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deqzoo.errors import as_user_error
from deqzoo.files import file_digest, replace_text
from deqzoo.records import read_evaluation
from deqzoo.sealed import record

_PACKAGES = ("deqzoo", "torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow")


def weights_digest(folder: Path) -> str | None:
    """SHA-256 over the names and contents of a folder's safetensors files; None without any."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_digest(file)}\0".encode())
    return digest.hexdigest()


def describe_model(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Name, class, size, weights and equilibrium settings of a loaded model."""
    folder = Path(model.config._name_or_path)
    return {
        "name": name,
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_sha256": weights_digest(folder) if folder.is_dir() else None,
        "solver": dict(model.config.solver),
        "gradient": dict(model.config.gradient),
    }


def describe_environment(model: PreTrainedModel) -> dict[str, Any]:
    """Versions and the kind of machine; nothing that identifies it."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": describe_device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def describe_device(device: torch.device) -> str:
    """ "cpu (x86_64)" or the accelerator's product name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def write_evaluation(path: Path, content: Mapping[str, Any], before: Path | None = None) -> Path:
    """Write an evaluation file; numbers that are not finite become null.

    Args:
        path: of the file.
        content: in the current format.
        before: the evaluation that it replaces, `path` by default: a test split that has been
            measured with other weights of the same name was looked at once more.

    Raises:
        UserError: the file cannot be written.
    """
    content = _with_looks(content, before or path)
    with as_user_error(f"cannot write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
        replace_text(path, text + "\n")
        record(path)
    return path


def _with_looks(content: Mapping[str, Any], before: Path) -> dict[str, Any]:
    """The content of a test split's evaluation with the number of weights that were measured."""
    data = dict(content["data"])
    if data.get("split") == "test" and data.get("complete"):
        data["looks"] = 1
        if before.is_file():
            old = read_evaluation(before)
            other = old["model"].get("weights_sha256") != content["model"].get("weights_sha256")
            data["looks"] = old["data"].get("looks", 1) + other
    return {**content, "data": data}


def finite(value: Any) -> Any:
    """The same nested value with None in place of NaN and infinities, as JSON knows none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value

"""Turns official and TorchDEQ IGNN checkpoints into a folder that `from_pretrained` loads.

Widths, heads and skips are read off the tensors; what they cannot tell (kappa, the adjacency, the
problem) comes from the configuration. Parameters that the published code never uses (`bias`, unused
Omega_2, the zero start X_0) are left out, unless the configuration asks for `official`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from deqzoo.errors import UserError, as_user_error
from deqzoo.models.convert import (
    check_settings,
    output_folder,
    read_settings,
    read_state_dict,
)
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import (
    IGNNForGraphClassification,
    IGNNForNodeClassification,
    IGNNPreTrainedModel,
)

PRESETS: dict[str, dict[str, Any]] = {
    "graphs": {"kappa": 0.9, "normalization": "augmented"},
    "ppi": {
        "kappa": 0.98,
        "normalization": "none",
        "problem_type": "multi_label_classification",
    },
    "ppi-torchdeq": {
        "kappa": 0.98,
        "normalization": "none",
        "local_injection": True,
        "problem_type": "multi_label_classification",
    },
    "amazon": {
        "kappa": 0.95,
        "normalization": "augmented",
        "problem_type": "multi_label_classification",
    },
    "chains": {
        "kappa": 0.9,
        "normalization": "augmented",
        "directed": True,
        "normalize_states": True,
    },
}
"""Settings of the published tasks, for `--config NAME`."""

_LAYER_NAMES = {
    "W": "state_weight",
    "Omega_1": "neighbor_weight",
    "Omega_2": "local_weight",
    "bias": "bias",
}
_NORM_NAMES = {"g": "gain", "u": "left", "v": "right"}
_LAYER_KEY = re.compile(r"^(ig|ignn\.)(\d+)\.(W|Omega_1|Omega_2|bias)(?:_(orig|g|u|v))?$")
_UNUSED = re.compile(r"^(?:X_0|(?:ig|ignn\.)\d+\.bias|ig\d+\.Omega_2)$")
_LINEAR_KEY = re.compile(r"^(?:V_(\d+)|proj\.(\d+)|(V))\.(weight|bias)$")


def convert(
    src: str | Path, config: str | Path, output: str | Path, weights: str | None = None
) -> Path:
    """Write a checkpoint as a `from_pretrained` folder.

    Args:
        src: the state dict, a file as `read_state_dict` takes it.
        config: a name from `PRESETS`, or a JSON file with settings of `IGNNConfig`.
        output: the folder to write.
        weights: key of the state dict in a file that has several.

    Returns:
        The folder.

    Raises:
        UserError: unreadable files, settings that do not fit, or tensors that are no IGNN's.
    """
    output = output_folder(output)
    model = build_model(read_state_dict(Path(src), weights), read_config(config))
    model.save_pretrained(output)
    return output


def read_config(config: str | Path) -> dict[str, Any]:
    """Return settings of `IGNNConfig` from a preset's name or a JSON file.

    A file may name a preset under "model" (any text that contains its name; the longest one
    counts) and overrides it;
    `nclass` and `nfeat` are accepted and checked against the tensors.

    Raises:
        UserError: neither, or no valid JSON object.
    """
    if str(config) in PRESETS:
        return dict(PRESETS[str(config)])
    values = read_settings(Path(config), PRESETS)
    values = {**values, **values.get("config", {})}
    settings = dict(PRESETS.get(_preset_of(values.get("model")), {}))
    setting_names = IGNNConfig().to_dict().keys() | {"problem_type", "id2label", "label2id"}
    check_settings(values, setting_names, config)
    settings.update({key: value for key, value in values.items() if key in setting_names})
    for source_name, name in (("nfeat", "num_features"), ("nclass", "num_labels")):
        if source_name in values:
            settings[name] = values[source_name]
    settings.pop("model_type", None)
    return settings


def build_model(
    state_dict: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> IGNNPreTrainedModel:
    """Return the model with a checkpoint's weights, in their dtype.

    Raises:
        UserError: keys or shapes that do not form an IGNN, or that contradict the settings.
    """
    structure = infer_structure(state_dict)
    for name in ("num_features", "num_labels", "hidden_sizes"):
        if name in settings and settings[name] != structure[name]:
            raise UserError(
                f"the configuration says {name}={settings[name]}, the tensors {structure[name]}"
            )
    architecture = structure.pop("architecture")
    fault = "the configuration does not fit"
    with as_user_error(fault, ValueError, TypeError, StrictDataclassError):
        config = IGNNConfig(**{**settings, **structure})
    names = {key: deqzoo_name(key, architecture, len(config.hidden_sizes)) for key in state_dict}
    counts = Counter(names.values())
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise UserError(
            f"the checkpoint holds {duplicates[0]} twice, in the spellings of two sources"
        )
    dtype = next(iter(state_dict.values())).dtype
    model = architecture(config).to(dtype)
    model_tensors = model.state_dict()
    tensors = {
        names[key]: tensor for key, tensor in state_dict.items() if names[key] in model_tensors
    }
    unknown_keys = sorted(
        k for k, name in names.items() if name not in model_tensors and not _UNUSED.match(k)
    )
    if unknown_keys:
        hint = "; set local_injection to true" if "Omega_2" in unknown_keys[0] else ""
        raise UserError(
            f"the checkpoint holds tensors that this model has no place for: "
            f"{', '.join(unknown_keys[:4])}{hint}"
        )
    missing_names = sorted(model_tensors.keys() - tensors.keys())
    if missing_names:
        raise UserError(f"the checkpoint lacks tensors for {', '.join(missing_names[:4])}")
    with as_user_error("the checkpoint does not fit", RuntimeError):
        model.load_state_dict(tensors)
    if not config.official:
        model.project_()
    return model.eval()


def infer_structure(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that the tensors decide, and the class under "architecture".

    Raises:
        UserError: no implicit layer or no last layer is among them, or one is no matrix.
    """
    torchdeq = any(key.startswith("ignn.") for key in state_dict)
    spectral = any(key.endswith(".W_orig") for key in state_dict)
    stem, suffix = ("ignn.", "_orig") if spectral else ("ignn." if torchdeq else "ig", "")
    first = 0 if torchdeq else 1
    shapes: list[tuple[int, int]] = []
    while (key := f"{stem}{first + len(shapes)}.Omega_1{suffix}") in state_dict:
        shapes.append(_matrix_shape(key, state_dict[key]))
    if not shapes:
        raise UserError(
            f"no implicit layer found among the keys ({', '.join(list(state_dict)[:5])})"
        )
    result: dict[str, Any] = {
        "num_features": shapes[0][1],
        "weight_norm": "spectral" if spectral else "none",
    }
    widths = [m for m, _ in shapes]
    skips = torchdeq or ("V_0.weight" in state_dict and "V.weight" in state_dict)
    if skips:
        last = f"proj.{len(shapes) - 1}.weight" if torchdeq else "V.weight"
        head = {"implicit_head": True, "skip_connections": True, "hidden_sizes": widths[:-1]}
        architecture: type[IGNNPreTrainedModel] = IGNNForNodeClassification
    else:
        is_graph = "V_1.weight" in state_dict
        last = "V_1.weight" if is_graph else "V.weight"
        head = {"hidden_sizes": widths}
        architecture = IGNNForGraphClassification if is_graph else IGNNForNodeClassification
    if last not in state_dict:
        raise UserError(f"the checkpoint has no {last}, the last linear layer")
    bias = last.replace(".weight", ".bias") in state_dict
    labels = _matrix_shape(last, state_dict[last])[0]
    return {
        **result,
        **head,
        "num_labels": labels,
        "classifier_bias": bias,
        "architecture": architecture,
    }


def deqzoo_name(key: str, architecture: type[IGNNPreTrainedModel], n_layers: int) -> str:
    """Return the name in deqzoo of a tensor of the official or the TorchDEQ code."""
    match = _LAYER_KEY.match(key)
    if match:
        stem, number, name, part = match.groups()
        number = int(number) - (1 if stem == "ig" else 0)
        prefix = f"ignn.layers.{number}." if number < n_layers else "implicit_head."
        if part in _NORM_NAMES:
            which = ("W", "Omega_1", "Omega_2").index(name)
            return f"{prefix}norms.{which}.{_NORM_NAMES[part]}"
        return prefix + _LAYER_NAMES[name]
    match = _LINEAR_KEY.match(key)
    if match:
        official, torchdeq, last, name = match.groups()
        if last or (torchdeq and int(torchdeq) == n_layers):
            return f"classifier.{name}"
        number = int(official or torchdeq)
        if architecture is IGNNForGraphClassification:
            return f"{'dense' if number == 0 else 'classifier'}.{name}"
        return f"ignn.skips.{number}.{name}"
    return key


def _matrix_shape(key: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise UserError(
            f"{key} must be a floating-point matrix, the checkpoint has {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor.shape[0], tensor.shape[1]


def _preset_of(description: Any) -> str:
    text = str(description).lower()
    if "graphclassification" in text:
        return "graphs"
    names = [name for name in PRESETS if name in text]
    return max(names, key=len, default="")  # "ppi-torchdeq" holds "ppi"

"""Turns the state dict of an official MDEQ into a folder that `from_pretrained` loads.

Understood sources: locuslab/deq, phantom_grad (which registers the map twice), the zoo of torchdeq
and the older locuslab/mdeq (with frozen working copies). Which tensors are weight-normalised,
whether the injection is transformed and which norms are affine is decided by the keys present; the
rest comes from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from deqzoo.errors import UserError, as_user_error
from deqzoo.models.convert import (
    check_settings,
    output_folder,
    read_settings,
    read_state_dict,
)

from .configuration_mdeq import MDEQConfig
from .image_processing_mdeq import MDEQImageProcessor
from .modeling_mdeq import MDEQForImageClassification
from .presets_mdeq import PRESETS

# Copies of the map that some sources register beside `fullstage`.
_COPIES = re.compile(r"^(fullstage_copy|full_stage_copy|deq\.func_copy|deq\.func)\.")

_MAP = "mdeq.transformation."
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^fullstage\.branches\.(\d+)\.blocks\.(\d+)\.gn(\d)\.", _MAP + r"branches.\1.\2.norm\3."),
        (r"^fullstage\.branches\.(\d+)\.blocks\.(\d+)\.", _MAP + r"branches.\1.\2."),
        (r"^fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.", _MAP + r"fuse.\1.\2.stages.\3."),
        (r"^fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.", _MAP + r"fuse.\1.\2.stages.0."),
        (r"^fullstage\.post_fuse_layers\.", _MAP + "post."),
        (r"^stage0\.0\.", "mdeq.injection.conv."),
        (r"^stage0\.1\.", "mdeq.injection.norm."),
        (r"^incre_modules\.(\d+)\.0\.bn(\d)\.", r"head.bottlenecks.\1.norm\2."),
        (r"^incre_modules\.(\d+)\.0\.downsample\.0\.", r"head.bottlenecks.\1.shortcut.conv."),
        (r"^incre_modules\.(\d+)\.0\.downsample\.1\.", r"head.bottlenecks.\1.shortcut.norm."),
        (r"^incre_modules\.(\d+)\.0\.", r"head.bottlenecks.\1."),
        (r"^downsamp_modules\.(\d+)\.0\.", r"head.downsamples.\1.conv."),
        (r"^downsamp_modules\.(\d+)\.1\.", r"head.downsamples.\1.norm."),
        (r"^final_layer\.0\.", "head.final.conv."),
        (r"^final_layer\.1\.", "head.final.norm."),
    )
)
_STEM = re.compile(r"^downsample\.(0|1|3|4|DS(\d+)(-BN)?)\.")
_STEM_NAMES = {
    "0": "convolutions.0",
    "1": "norms.0",
    "3": "convolutions.1",
    "4": "norms.1",
}

_OUR_STEM = re.compile(r"^mdeq\.stem\.(\w+)\.(\d+)")
_OUR_FUSE = re.compile(re.escape(_MAP) + r"fuse\.(\d+)\.(\d+)\.stages\.(\d+)\.")
_INVERSE_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^mdeq\.transformation\.branches\.(\d+)\.(\d+)\.", r"fullstage.branches.\1.blocks.\2."),
        (r"^mdeq\.transformation\.post\.", "fullstage.post_fuse_layers."),
        (r"^(fullstage\.branches\..*)\.norm(\d)\.", r"\1.gn\2."),
        (r"^(fullstage\..*)\.norm\.", r"\1.gnorm."),
        (r"^(fullstage\..*)\.magnitude$", r"\1.weight_g"),
        (r"^(fullstage\..*)\.direction$", r"\1.weight_v"),
        (r"^mdeq\.injection\.conv\.", "stage0.0."),
        (r"^mdeq\.injection\.norm\.", "stage0.1."),
        (r"^head\.bottlenecks\.(\d+)\.shortcut\.conv\.", r"incre_modules.\1.0.downsample.0."),
        (r"^head\.bottlenecks\.(\d+)\.shortcut\.norm\.", r"incre_modules.\1.0.downsample.1."),
        (r"^head\.bottlenecks\.(\d+)\.norm(\d)\.", r"incre_modules.\1.0.bn\2."),
        (r"^head\.bottlenecks\.(\d+)\.", r"incre_modules.\1.0."),
        (r"^head\.downsamples\.(\d+)\.conv\.", r"downsamp_modules.\1.0."),
        (r"^head\.downsamples\.(\d+)\.norm\.", r"downsamp_modules.\1.1."),
        (r"^head\.final\.conv\.", "final_layer.0."),
        (r"^head\.final\.norm\.", "final_layer.1."),
    )
)

# Names of the JSON files beside the reference numbers -> names of MDEQConfig.
_CONFIG_NAMES = {
    "channels": "channels",
    "head_channels": "head_channels",
    "final_channels": "final_channels",
    "expansion": "expansion",
    "num_groups": "num_groups",
    "stem_downsamples": "stem_downsamples",
    "image_size": "image_size",
    "num_classes": "num_labels",
    "blocks_per_branch": "blocks_per_branch",
    "big_kernels": "big_kernels",
    "dropout": "dropout",
    "unroll_layers": "unroll_layers",
}
_REQUIRED = tuple(_CONFIG_NAMES)[:8]


def convert(
    src: str | Path, config: str | Path, output: str | Path, weights: str | None = None
) -> Path:
    """Write an official checkpoint as a `from_pretrained` folder with model and image processor.

    Args:
        src: the state dict, a file as `read_state_dict` takes it.
        config: a preset's name, or a JSON file that names the architecture.
        output: the folder to write.
        weights: key of the state dict in a file that has several.

    Returns:
        The folder.

    Raises:
        UserError: unreadable files, an incomplete configuration, or keys that do not fit it.
    """
    output = output_folder(output)
    state_dict = normalise_keys(read_state_dict(Path(src), weights))
    model: Any = build_model(state_dict, read_config(config))
    model.save_pretrained(output)
    MDEQImageProcessor.for_config(model.config).save_pretrained(output)
    return output


def normalise_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official key names of any source -> those of locuslab/deq, copies of the map dropped."""
    result = {}
    for key, tensor in state_dict.items():
        if _COPIES.match(key):
            continue
        if key.startswith("full_stage."):
            key = "fullstage." + key.removeprefix("full_stage.")
        if key in result:
            raise UserError(f"the checkpoint holds {key} twice, in the spellings of two sources")
        result[key] = tensor
    return result


def official_to_deqzoo(key: str) -> str:
    """The name in `MDEQForImageClassification` of a tensor named as in locuslab/deq."""
    stem = _STEM.match(key)
    if stem:
        if stem[2]:
            name = f"{'norms' if stem[3] else 'convolutions'}.{int(stem[2]) - 1}"
        else:
            name = _STEM_NAMES[stem[1]]
        return f"mdeq.stem.{name}.{key[stem.end() :]}"
    for pattern, replacement in _RULES:
        if pattern.match(key):
            key = pattern.sub(replacement, key)
            break
    if key.startswith(_MAP):
        key = key.replace(".gnorm.", ".norm.")
        key = re.sub(r"\.weight_g$", ".magnitude", key)
        key = re.sub(r"\.weight_v$", ".direction", key)
    return key


def deqzoo_to_official(name: str) -> str:
    """The inverse of `official_to_deqzoo`, for messages about what a source lacks."""
    stem = _OUR_STEM.match(name)
    if stem:
        norm, index, rest = stem[1] == "norms", int(stem[2]), name[stem.end() :]
        if index > 1:
            return f"downsample.DS{index + 1}{'-BN' if norm else ''}{rest}"
        return f"downsample.{3 * index + norm}{rest}"
    fuse = _OUR_FUSE.match(name)
    if fuse:
        target, source, stage = fuse.groups()
        net = "net" if int(source) > int(target) else f"net.{stage}"
        name = f"fullstage.fuse_layers.{target}.{source}.{net}.{name[fuse.end() :]}"
    for pattern, replacement in _INVERSE_RULES:
        name = pattern.sub(replacement, name)
    return name


def read_config(config: str | Path) -> dict[str, Any]:
    """Settings of `MDEQConfig` from a preset's name or a JSON file.

    Raises:
        UserError: neither, or a file that lacks settings.
    """
    if str(config) in PRESETS:
        return dict(PRESETS[str(config)])
    values = read_settings(Path(config), PRESETS)
    check_settings(values, _CONFIG_NAMES, config)
    missing_settings = [name for name in _REQUIRED if name not in values]
    if missing_settings:
        raise UserError(f"{config} lacks the settings {', '.join(missing_settings)}")
    classes = values["num_classes"]
    if type(classes) is not int or classes < 1:
        raise UserError(f"{config}: num_classes must be a positive whole number, got {classes!r}")
    return {new: values[old] for old, new in _CONFIG_NAMES.items() if old in values}


def infer_structure(keys: set[str]) -> dict[str, Any]:
    """Settings of `MDEQConfig` that the keys of a state dict decide."""
    names = {official_to_deqzoo(key) for key in keys}

    def present(pattern: str) -> bool:
        expression = re.compile(re.escape(_MAP) + pattern)
        return any(expression.match(name) for name in names)

    scope = "none"
    for candidate, pattern in (
        ("block", r"branches\..*\.direction$"),
        ("block_post", r"post\..*\.direction$"),
        ("all", r"fuse\..*\.direction$"),
    ):
        if present(pattern):
            scope = candidate
    return {
        "weight_norm": scope,
        "injection_transform": any(name.startswith("mdeq.injection.") for name in names),
        "affine_block": present(r"branches\..*\.norm\d\.weight$"),
        "affine_fuse": present(r"fuse\..*\.norm\.weight$"),
        "affine_post": present(r"post\..*\.norm\.weight$"),
    }


def build_model(
    state_dict: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> MDEQForImageClassification:
    """A model with an official state dict (names of locuslab/deq), in the dtype of its tensors.

    Raises:
        UserError: one line that lists every unknown, missing and misshapen key.
    """
    settings = dict(settings) | infer_structure(set(state_dict))
    fault = "the configuration is not valid"
    with as_user_error(fault, ValueError, TypeError, OverflowError, StrictDataclassError):
        config = MDEQConfig(**settings)
    dtype = torch.float32
    dtypes = [t.dtype for t in state_dict.values() if t.is_floating_point()]
    if dtypes:
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
    tensors = {official_to_deqzoo(key): (key, tensor) for key, tensor in state_dict.items()}
    # On "meta" sizes that the checkpoint does not have are never allocated.
    with as_user_error(fault, RuntimeError), torch.device("meta"):
        model_tensors = MDEQForImageClassification(config).state_dict()
    _check_keys(tensors, model_tensors)
    model: Any = MDEQForImageClassification(config)
    model.to(dtype)
    model.load_state_dict({name: tensor for name, (_, tensor) in tensors.items()}, strict=False)
    model.config.dtype = dtype
    return model.eval()


def _check_keys(
    tensors: Mapping[str, tuple[str, Tensor]], model_tensors: Mapping[str, Tensor]
) -> None:
    """Compare names and shapes; the batch norms' counters are informational and may be missing."""
    unknown_keys = sorted(
        official for name, (official, _) in tensors.items() if name not in model_tensors
    )
    missing_keys = sorted(
        deqzoo_to_official(name)
        for name in model_tensors
        if name not in tensors and not name.endswith("num_batches_tracked")
    )
    misshapen_keys = sorted(
        f"{official} is {tuple(tensor.shape)}, expected {tuple(model_tensors[name].shape)}"
        for name, (official, tensor) in tensors.items()
        if name in model_tensors and tensor.shape != model_tensors[name].shape
    )
    problems = [
        f"{len(entries)} {title}: {_entry_list(entries)}"
        for title, entries in (
            ("unknown", unknown_keys),
            ("missing", missing_keys),
            ("misshapen", misshapen_keys),
        )
        if entries
    ]
    if problems:
        raise UserError(
            f"the checkpoint's keys do not fit the configuration: {'; '.join(problems)}"
        )


def _entry_list(entries: list[str], most: int = 20) -> str:
    """The entries, or the first of very many: a wrong preset misses hundreds of keys."""
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more

"""Checksums of a checkpoint's files, and one golden prediction that its weights must repeat."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deqzoo import sealed
from deqzoo.errors import UserError
from deqzoo.files import file_digest, replace_text
from deqzoo.models.auto import DEQModel
from deqzoo.sealed import CHECKSUMS, read_checksums, require_inside
from deqzoo.zoo import read_json

GOLDEN = "golden.json"
#: What a checkpoint folder may hold and publish; pickles are not among it.
PUBLISHED_SUFFIXES = (".json", ".safetensors", ".txt", ".yaml", ".svg", ".png")
#: A checkpoint's own part of its card, written by the command that made its figures.
NOTES = "notes.md"
#: What publishing renders from the other files.
UNSEALED = re.compile(r"\.eval_results/deqzoo\.yaml|[^/]+-(budget|training)\.svg")

# A tight solve, so that the numbers hardly depend on the machine's order of summation.
_GOLDEN_SOLVER = {"max_steps": 100, "tol": 1e-5}
_GOLDEN_TOLERANCE = 5e-3
_GOLDEN_WORDS = 200


def published_files(folder: Path) -> list[Path]:
    """Files of a checkpoint, relative to its folder and sorted, without card and checksums."""
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix in PUBLISHED_SUFFIXES or path == folder / NOTES)
    )


def sealed_files(folder: Path) -> list[Path]:
    """The published files that checksums cover: all but what publishing renders."""
    return [path for path in published_files(folder) if not UNSEALED.fullmatch(path.as_posix())]


def write_checksums(folder: Path) -> Path:
    """Record the SHA-256 of every sealed file, in the format of `sha256sum`.

    Raises:
        UserError: a link leads out of the folder.
    """
    require_inside(folder, deep=True)
    digests = {path.as_posix(): file_digest(folder / path) for path in sealed_files(folder)}
    return sealed.write_checksums(folder, digests)


def check_checksums(folder: Path) -> list[str]:
    """What is wrong with a folder's files, one line each; nothing if all is as recorded.

    Raises:
        UserError: the checksums are missing or unreadable, or a link leads out of the folder.
    """
    require_inside(folder, deep=True)
    recorded_digests = read_checksums(folder)
    present_files = {path.as_posix() for path in sealed_files(folder)}
    faults = [f"{name} is missing" for name in sorted(recorded_digests.keys() - present_files)]
    faults += [
        f"{name} is not in {CHECKSUMS}" for name in sorted(present_files - recorded_digests.keys())
    ]
    for name in sorted(recorded_digests.keys() & present_files):
        if file_digest(folder / name) != recorded_digests[name]:
            faults.append(f"{name} has changed")
    return faults


def seal(folder: Path) -> bool:
    """Record golden prediction and checksums; False where those of the folder hold already.

    A sound seal is left alone: a machine that rounds differently would write another prediction,
    and a kill before the checksums follow would leave the folder with neither seal. A broken one
    is taken off first, since weights are loaded only where they are as sealed.

    Raises:
        UserError: the folder's files do not make a model, or a link leads out of it.
    """
    holds = (folder / CHECKSUMS).is_file() and not check_checksums(folder)
    if not holds:
        (folder / CHECKSUMS).unlink(missing_ok=True)
    model = DEQModel.from_pretrained(folder)
    if holds and (folder / GOLDEN).is_file() and not check_golden(folder, model):
        return False
    write_golden(folder, model)
    write_checksums(folder)
    return True


def golden_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small input computed from the model's configuration alone."""
    config = model.config
    if model.main_input_name == "pixel_values":
        rows = torch.linspace(-1, 1, config.image_size)
        n_channels = getattr(config, "num_channels", 3)
        waves = [
            torch.sin((3 + c) * rows[:, None] + (2 + c) * rows[None, :]) for c in range(n_channels)
        ]
        return {"pixel_values": torch.stack(waves)[None]}  # (1, C, H, W)
    if model.main_input_name == "input_ids":
        ids = (torch.arange(24) * 7919 + 13) % config.vocab_size
        return {"input_ids": ids[None]}
    nodes = 10
    ring = torch.arange(nodes)
    edges = torch.stack([ring, ring.roll(-1)])
    features = torch.cos(torch.outer(ring + 1.0, torch.arange(config.num_features) + 1.0))
    return {"x": features, "edge_index": torch.cat([edges, edges.flip(0)], dim=1)}


def golden_prediction(model: PreTrainedModel) -> dict[str, list[float]]:
    """A model's logits for `golden_inputs`; of a language model those of the last token."""
    inputs = {key: value.to(model.device) for key, value in golden_inputs(model).items()}
    with torch.inference_mode():
        logits = model.eval()(**inputs, solver=_GOLDEN_SOLVER).logits.float()
    if logits.ndim == 3:  # (1, T, vocabulary)
        logits = logits[0, -1, :_GOLDEN_WORDS]
    return {"logits": [round(value, 6) for value in logits.flatten().tolist()]}


def write_golden(folder: Path, model: PreTrainedModel) -> Path:
    """Record the golden prediction of a folder's weights."""
    target = folder / GOLDEN
    replace_text(target, json.dumps(golden_prediction(model), indent=1) + "\n")
    return target


def check_golden(folder: Path, model: PreTrainedModel) -> list[str]:
    """How the model's answer differs from the recorded one, one line per fault.

    Raises:
        UserError: there is no record.
    """
    if not (folder / GOLDEN).is_file():
        raise UserError(f"{folder} has no {GOLDEN}; `deqzoo seal` writes it")
    recorded_logits = torch.tensor(
        read_json(folder / GOLDEN).get("logits", []), dtype=torch.float64
    )
    logits = torch.tensor(golden_prediction(model)["logits"], dtype=torch.float64)
    if recorded_logits.shape != logits.shape:
        return [
            f"{GOLDEN} records {recorded_logits.numel()} logits, the model gives {logits.numel()}"
        ]
    error = (recorded_logits - logits).abs().max().item()
    tolerance = _GOLDEN_TOLERANCE * recorded_logits.abs().max().item()
    if not error <= tolerance:
        return [f"golden logits differ by {error:.1e}, allowed is {tolerance:.1e}"]
    return []

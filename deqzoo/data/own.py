"""Data of one's own: how they are divided, and the record of what a model was trained on.

The record holds digests, so that a later evaluation leaves out what was trained on, wherever the
files lie by then.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deqzoo.errors import UserError
from deqzoo.zoo import read_json

RECORD = "own_data.json"
"""In a checkpoint: what it was trained on."""
SPLITS = ("train", "validation", "test")
HELD_OUT = 0.2
FEWEST = 5
"""Smallest validation part; where it would be smaller, the test part selects the weights."""


def stratified(
    labels: Tensor,
    share: float = HELD_OUT,
    seed: int = 0,
    digests: Sequence[str] | None = None,
) -> tuple[list[int], list[int]]:
    """Training rows, and a hold-out with its share of every class (N,).

    A class with at least two samples is in both; one with a single sample is only trained on.
    """
    train, _, held_out = three_parts(labels, share, 0.0, seed, digests)
    return train, held_out


def three_parts(
    labels: Tensor,
    share: float = HELD_OUT,
    validation: float = HELD_OUT / 2,
    seed: int = 0,
    digests: Sequence[str] | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Training, validation and test rows, divided class by class (N,).

    Copies of a sample, which have equal digests, are in one part.

    Args:
        labels: int64 (N,).
        share: of the test part, at least one sample of a class that has two.
        validation: share of the validation part. Where it has fewer than `FEWEST` rows in all,
            they are training rows.
        seed: of the draw.
        digests: of the samples.
    """
    draws = random.Random(seed)
    train: list[int] = []
    validation_rows: list[int] = []
    held_out: list[int] = []
    part_of_key: dict[str | int, list[int]] = {}
    for label in labels.unique().tolist():
        copies: dict[str | int, list[int]] = {}
        for row in (labels == label).nonzero().flatten().tolist():
            copies.setdefault(row if digests is None else digests[row], []).append(row)
        distinct = list(copies)
        draws.shuffle(distinct)
        count = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
        end = min(count + round(validation * len(distinct)), len(distinct) - 1)
        for place, key in enumerate(distinct):
            part = held_out if place < count else validation_rows if place < end else train
            part_of_key.setdefault(key, part).extend(copies[key])  # also where labels contradict
    if len(validation_rows) < FEWEST:
        train, validation_rows = train + validation_rows, []
    return sorted(train), sorted(validation_rows), sorted(held_out)


def chose_weights(record: dict[str, Any] | None, digests: Sequence[str]) -> dict[str, bool]:
    """The entry of an evaluation whose samples also selected the weights; else empty."""
    record = record or {}
    one = record.get("one_hold_out") and not set(digests).isdisjoint(record["validation"])
    return {"chose_weights": True} if one else {}


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """Store beside the weights what a model was trained on."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """What a local checkpoint was trained on; None where it does not say.

    Raises:
        UserError: the record is damaged.
    """
    path = Path(folder) / RECORD
    return read_json(path) if path.is_file() else None


def require_split(split: str) -> None:
    """Refuse what is no split of data of one's own.

    Raises:
        UserError: another name.
    """
    if split not in (*SPLITS, "all"):
        raise UserError(
            f"unknown split {split!r}; data of your own have {', '.join(SPLITS)} and all"
        )


_OPTIONS = {
    "--column": (
        "language-modeling",
        "names the texts in a table, but the model reads none; leave it out (the labels of "
        "pictures are named by finetune --label-column)",
    ),
    "--label-column": (
        "image-classification",
        "names the labels in a table of pictures, but the model reads none; leave it out",
    ),
    "--tokenizer": (
        "language-modeling",
        "is for texts, and this model reads none; leave it out",
    ),
}
"""Options of one task only: the task, and the message for models of other tasks."""


def require_task_of(option: str, task: str | None) -> None:
    """Refuse an option that is for models of another task.

    Raises:
        UserError: the model's task is another one.
    """
    option_task, reason = _OPTIONS[option]
    if task != option_task:
        raise UserError(f"{option} {reason}")


def rows_of_split(digests: Sequence[str], record: dict[str, Any], split: str) -> list[int]:
    """Rows of a split, see `unseen`; there may be none."""
    if split == "all":
        return list(range(len(digests)))
    apart = () if record.get("one_hold_out") else record.get("validation", ())
    place = dict.fromkeys(apart, "validation")
    place |= {digest: "train" for digest in record.get("train", ())}
    return [row for row, digest in enumerate(digests) if place.get(digest, "test") == split]


def unseen(digests: Sequence[str], record: dict[str, Any], split: str) -> list[int]:
    """Rows of a split: "train" are those that the model was trained on, "validation" those that
    chose its weights, "test" the others.

    Raises:
        UserError: another split, or one without samples.
    """
    require_split(split)
    rows = rows_of_split(digests, record, split)
    if not rows:
        what = "the model was trained on all of these" if split == "test" else "there are none"
        raise UserError(f"the {split} split of these data is empty: {what}; try --split all")
    return rows


def graph_digests(graphs: Sequence[Any], record: dict[str, Any] | None = None) -> list[str]:
    """A short SHA-256 of every graph's features, edges, their weights, and label.

    Args:
        graphs: torch_geometric `Data`.
        record: what the digests are compared with. Digests with weights begin with "w"; for a
            record without any, which is older, weights are left out here too.
    """
    record_digests = (
        [] if record is None else [*record.get("train", ()), *record.get("validation", ())]
    )
    is_old = bool(record_digests) and not any(digest.startswith("w") for digest in record_digests)
    digests = []
    for graph in graphs:
        weights = None if is_old else graph.edge_weight
        digest = hashlib.sha256()
        for tensor in (graph.x, graph.edge_index, graph.y, weights):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        begin = "" if weights is None else "w"
        digests.append((begin + digest.hexdigest())[:16])
    return digests

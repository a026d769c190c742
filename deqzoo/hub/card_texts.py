"""What the cards say about a family, its data and its papers: the content of `card_texts.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class FamilyText:
    """A family's part of a card."""

    about: str
    pipeline_tag: str
    snippet: str
    papers: Sequence[str]
    language: str | None = None


@dataclass(frozen=True)
class DataText:
    """A data set's part of a card.

    Attributes:
        repository: on the Hub; None where none is known to hold these data.
        title: its name.
        note: what to know about it.
        limits: what it means for a model trained on it.
        published: test figures of others.
        subset: what the Hub calls the part of the repository that is measured.
        beside: `published` in a few words, for README's table.
    """

    repository: str | None
    title: str
    note: str
    limits: str = ""
    published: str = ""
    subset: str = "default"
    beside: str = ""


@dataclass(frozen=True)
class ConvertedText:
    """A card for weights that their authors publish and the user converts."""

    family: str
    task: str
    title: str
    command: str
    source: str
    figure: str
    limits: str
    papers: Sequence[str]


#: Where an example names the checkpoint.
NAME_PLACE = "MODEL"

_TEXT = resources.files("deqzoo.hub").joinpath("card_texts.yaml").read_text(encoding="utf-8")
_CONTENT: dict[str, Any] = yaml.load(_TEXT, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
EQUILIBRIUM: str = _CONTENT["equilibrium"]
PICTURE_LIMITS: str = _CONTENT["picture_limits"]
FAMILY_TEXTS = {name: FamilyText(**text) for name, text in _CONTENT["families"].items()}
#: By task, in the words of `zoo.TASKS`: what a model cannot do, and what it is for.
TASK_LIMITS: dict[str, str] = {name: text["limits"] for name, text in _CONTENT["tasks"].items()}
TASK_USES: dict[str, str] = {name: text["uses"] for name, text in _CONTENT["tasks"].items()}
DATA_TEXTS = {name: DataText(**text) for name, text in _CONTENT["data"].items()}
CONVERTED = {name: ConvertedText(**text) for name, text in _CONTENT["converted"].items()}
PAPERS: dict[str, str] = _CONTENT["papers"]


def data_title(name: str) -> str:
    """What a data set is called; its own name where the cards know none."""
    return DATA_TEXTS[name].title if name in DATA_TEXTS else name

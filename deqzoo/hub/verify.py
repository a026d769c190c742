"""Whether a checkpoint is the one described: files, weights, prediction, card."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from deqzoo.errors import UserError, one_line
from deqzoo.evaluation.files import weights_digest
from deqzoo.hub.card_texts import FAMILY_TEXTS, NAME_PLACE
from deqzoo.hub.catalogue import Entry, entry
from deqzoo.hub.integrity import check_checksums, check_golden
from deqzoo.models.auto import DEQModel
from deqzoo.sealed import require_inside
from deqzoo.zoo import ORGANISATION, resolve_folder, suggestion


def verify_model(name: str, *, revision: str | None = None) -> list[str]:
    """What is wrong with a checkpoint, one line each; nothing if it is sound.

    Args:
        name: zoo name, local folder, or repository on the Hub (then downloaded).
        revision: of a repository on the Hub, which is then asked for bundled names, too.

    Raises:
        UserError: there is no such checkpoint, it cannot be fetched, or it is none of the zoo's.
    """
    folder = resolve_folder(name, revision) or _download(name, revision)
    try:
        require_inside(folder, deep=True)
    except UserError as error:  # and nothing of it is read
        return [str(error)]
    checkpoint = entry(str(folder))
    faults = []
    for check in (_files, _evaluations, _weights_and_prediction, _snippet):
        try:
            faults += check(checkpoint)
        except UserError as error:
            faults.append(str(error))
    return faults


def _download(name: str, revision: str | None) -> Path:
    try:
        repository = name if "/" in name else f"{ORGANISATION}/{name}"
        return Path(snapshot_download(repository, revision=revision))
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached or is switched off, and it is not cached"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = one_line(error, 160)
    raise UserError(f"unknown model {name!r}: {suggestion(name)} ({reason})")


def _files(checkpoint: Entry) -> list[str]:
    return check_checksums(checkpoint.folder)


def _evaluations(checkpoint: Entry) -> list[str]:
    """Evaluation files must be of these weights."""
    digest = weights_digest(checkpoint.folder)
    return [
        f"evaluation {stem} was made with other weights"
        for stem, evaluation in checkpoint.evaluations.items()
        if evaluation.get("model", {}).get("weights_sha256") != digest
    ]


def _weights_and_prediction(checkpoint: Entry) -> list[str]:
    return check_golden(checkpoint.folder, DEQModel.from_pretrained(checkpoint.folder))


def _snippet(checkpoint: Entry) -> list[str]:
    """Run the card's example on a stand-in picture, with the folder in place of the name.

    Its text is this package's own alone: the folder is the value of a variable, no part of it.
    """
    code = FAMILY_TEXTS[checkpoint.config["model_type"]].snippet
    try:
        with _scratch_folder(), contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "card", "exec"), {NAME_PLACE: str(checkpoint.folder)})
    except Exception as error:  # whatever the example raises is the finding
        return [f"the card's example fails: {type(error).__name__}: {error}"]
    return []


@contextlib.contextmanager
def _scratch_folder() -> Iterator[None]:
    """A working folder that holds picture.png."""
    old_folder = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        Image.linear_gradient("L").convert("RGB").save(Path(scratch) / "picture.png")
        os.chdir(scratch)
        try:
            yield
        finally:
            os.chdir(old_folder)

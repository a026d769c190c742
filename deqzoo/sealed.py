"""What a checkpoint's folder must satisfy before its files are read; standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from deqzoo.errors import UserError
from deqzoo.files import file_digest, replace_text
from deqzoo.zoo import read_json

CHECKSUMS = "SHA256SUMS"
_INDEX = "model.safetensors.index.json"


def require_inside(folder: Path, *, deep: bool = False) -> None:
    """Refuse a folder from which links or the weights' index lead out.

    Files of the Hub's cache are links to its blobs; they may lead anywhere in their repository's
    part of the cache.

    Args:
        folder: of a checkpoint.
        deep: look into subfolders too.

    Raises:
        UserError: a link or a name in the index leads out of the folder.
    """
    folder = folder.resolve()
    is_cached = folder.parent.name == "snapshots"
    root = folder.parent.parent if is_cached else folder
    for path in _paths(folder, deep):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise UserError(
                f"{path} is a link that leads out of its folder; put the file itself there"
            )
    if (folder / _INDEX).is_file():
        names = read_json(folder / _INDEX).get("weight_map")
        for name in set(names.values()) if isinstance(names, dict) else ():
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{folder / _INDEX} names {name!r}, which is no file beside it")


def require_weights_as_sealed(folder: Path) -> None:
    """Refuse weights that differ from the folder's checksums, where there are any.

    A file is read once for it; later calls only look at its size and time.

    Raises:
        UserError: weights that differ or are not recorded, or checksums that cannot be read.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    digests = read_checksums(folder)
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        if _digest(path, status.st_ino, status.st_size, status.st_mtime_ns) != digests.get(
            path.name
        ):
            raise UserError(
                f"{path} is not as {CHECKSUMS} beside it says, so it is damaged or was changed: "
                "fetch it again, or run `deqzoo seal` on the folder if the change is yours"
            )


def read_checksums(folder: Path) -> dict[str, str]:
    """The recorded SHA-256 of a folder's files, by name.

    Raises:
        UserError: the checksums are missing or unreadable.
    """
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {CHECKSUMS}; `deqzoo seal` writes it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CHECKSUMS}: {error}") from error


def record(path: Path) -> None:
    """Note a file that was written anew in the checksums of its checkpoint, where it is sealed.

    Args:
        path: of the file, in the checkpoint's folder or its folder `evaluation`.
    """
    folder = path.parent.parent if path.parent.name == "evaluation" else path.parent
    if (folder / CHECKSUMS).is_file():
        name = path.relative_to(folder).as_posix()
        write_checksums(folder, {**read_checksums(folder), name: file_digest(path)})


def write_checksums(folder: Path, digests: Mapping[str, str]) -> Path:
    """Write the digests of a folder's files, by name, in the format of `sha256sum`."""
    lines = [f"{digest}  {name}" for name, digest in sorted(digests.items())]
    replace_text(folder / CHECKSUMS, "\n".join(lines) + "\n")
    return folder / CHECKSUMS


def _paths(folder: Path, deep: bool) -> list[Path]:
    paths = []
    for place, folders, files in os.walk(folder):  # does not follow links
        paths += [Path(place) / name for name in (*folders, *files)]
        if not deep:
            break
    return sorted(paths)


@lru_cache(maxsize=256)
def _digest(path: Path, *_: int) -> str:
    return file_digest(path)

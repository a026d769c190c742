"""Files and folders that a kill or a power cut leaves old or new, never between.

What replaces an earlier result is written beside it, put on the disk, and takes its place at once.
A folder that is filled in place ends with a mark that carries the digests of its files, so that
one which was cut off or damaged is told from a sound one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from deqzoo.errors import UserError, as_user_error

COMPLETE = "complete"
"""The mark of a folder that was written to its end: JSON with the SHA-256 of every other file."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def make_folder(path: Path) -> None:
    """Make a run's folder, and those above it.

    Raises:
        UserError: it cannot be made.
    """
    with as_user_error(f"cannot make the folder {path}", OSError):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write a file or folder to, which takes the place of `path` afterwards.

    An exception inside leaves `path` as it was. The folder above must exist.

    Raises:
        UserError: a device or pipe is there, which would be replaced by a file.
        IsADirectoryError: a file would take the place of a folder.
        NotADirectoryError: the reverse.
    """
    path = Path(os.path.realpath(path))
    _require_ordinary(path)
    fresh = path.with_name(f".{path.name}.new")
    restore(path)
    _remove(fresh)
    try:
        yield fresh
        sync(fresh)
        _put(fresh, path)
    finally:
        restore(path)
        _remove(fresh)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill at any moment leaves the old or the new one, never a part."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def require_writable(path: Path) -> None:
    """Check where a file is to be written before the work whose result it holds.

    Raises:
        UserError: it is a folder or device, or below something that is no folder.
    """
    _require_ordinary(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    existing_parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing_parent.is_dir() or not os.access(existing_parent, os.W_OK):
        raise UserError(
            f"cannot write {path}: {existing_parent} is no folder that can be written to"
        )


def require_unclaimed(folder: Path, names: Sequence[str], what: str) -> None:
    """Check that a run replaces no files of others where it writes; empty folders are nobody's.

    Args:
        folder: of the run.
        names: of the files and folders that it writes there.
        what: makes such runs, for the message.

    Raises:
        UserError: one of them is there.
    """
    for path in (folder / name for name in names):
        is_empty = path.is_dir() and not any(path.iterdir())
        if path.exists() and not is_empty:
            raise UserError(
                f"{path} is there and of no run of {what}: it would be replaced; choose another "
                "--output"
            )


def restore(path: Path) -> None:
    """Put back a folder that a kill left under its temporary old name; see `_put`."""
    old = _old_path(path)
    if not old.exists():
        return
    if path.exists():
        _remove(old)
    else:
        old.rename(path)


def sync(path: Path) -> None:
    """Make a file, or a folder with all that is in it, outlast a power cut."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    _sync_one(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def visible_files(folder: Path) -> Iterator[Path]:
    """Files below a folder and those linked there, in the order of their names, no hidden ones.

    Links that lead nowhere are included, so that none is skipped silently.
    """
    for path in sorted(_through_links(folder)):
        if not is_hidden(path.relative_to(folder)) and (path.is_file() or not path.exists()):
            yield path


def is_hidden(file: PurePath) -> bool:
    """Whether a file, relative to its folder, is hidden, or left there by macOS or Windows."""
    system_files = ("__macosx", "thumbs.db", "desktop.ini")
    return any(part.startswith(".") or part.casefold() in system_files for part in file.parts)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, but not again where a command reads the same files twice."""
    logging.getLogger(__name__).warning(message)


def _through_links(folder: Path) -> Iterator[Path]:
    """Files below a folder and its linked ones, but not again through a link that leads back up."""
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(os.path.realpath(place))
        folders[:] = [f for f in folders if not here.is_relative_to(os.path.realpath(here / f))]
        yield from (Path(place) / name for name in names)


def mark_complete(folder: Path) -> None:
    """Put a folder on the disk and say in it what it holds; whatever comes later is not covered."""
    (folder / COMPLETE).unlink(missing_ok=True)
    sync(folder)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    replace_text(folder / COMPLETE, json.dumps({"sha256": digests}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that was marked as complete, in a clause; None if it is sound."""
    try:
        digests = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["sha256"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its file {COMPLETE!r} is damaged"
    for name, digest in digests:
        try:
            if file_digest(folder / name) != digest:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return None


def _require_ordinary(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a device or pipe, which no file may replace; name a file")


def _put(fresh: Path, path: Path) -> None:
    """Let `fresh` take the place of `path`; `fresh` may be left with what was there.

    Files are replaced at once everywhere. Folders are where the system can swap them (Linux);
    elsewhere the old one is renamed away first, and `restore` mends a kill between the two steps.
    """
    if not path.is_dir() or not fresh.is_dir():  # the system lets no file replace a folder
        fresh.replace(path)
    elif not _exchange(fresh, path):
        path.rename(_old_path(path))
        fresh.rename(path)
    _sync_one(path.parent)  # the renames


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (os.fsencode(first), os.fsencode(second))
    if rename is None:
        return False
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""The folder of a data set, and the files that a split of it is stored in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from deqzoo.errors import UserError, as_user_error, one_line


def parquet_shards(folder: Path, split: str) -> list[Path]:
    """Parquet files of a split, as the Hub and `datasets` name them; none if there are none.

    `train-00000-of-00002.parquet` (with a hash in old ones), or `train/0000.parquet`, in the folder
    or below it. Other names, as of backups, are not taken.

    Raises:
        UserError: several folders hold the split, or a part of it is missing.
    """
    name = re.compile(rf"{split}-\d+(-of-(?P<parts>\d+))?(-[0-9a-f]{{8,}})?\.parquet")
    candidates = ((path, name.fullmatch(path.name)) for path in folder.rglob(f"{split}-*.parquet"))
    shards = sorted((path, match) for path, match in candidates if match)
    files = [path for path, _ in shards] or sorted(folder.rglob(f"{split}/*.parquet"))
    folders = sorted({str(path.parent) for path in files})
    if len(folders) > 1:
        raise UserError(
            f"{folder} holds the {split} split more than once: {', '.join(folders[:3])}; name one "
            "of these folders"
        )
    parts = {int(match["parts"]) for _, match in shards if match["parts"]}
    if parts and parts != {len(shards)}:
        raise UserError(
            f"{folders[0]} holds {len(shards)} files of the {split} split, whose names say that "
            f"there are {' or '.join(map(str, sorted(parts)))}"
        )
    return files


def local_folder(data: str | os.PathLike[str] | None) -> Path | None:
    """The local folder that `data` names; None where it names a repository, or is None.

    Raises:
        UserError: a path at which there is no folder.
    """
    if data is None:
        return None
    folder = Path(data).expanduser()
    if folder.is_dir():
        return folder
    if str(data).startswith((".", "/", "~")) or folder.is_file():
        raise UserError(f"data folder {data} does not exist or is no folder")
    return None


def open_dataset(user: str, fault: str, **options: Any) -> Any:
    """What `datasets.load_dataset` opens with these options; its failures in one line.

    Raises:
        UserError: `datasets` is missing (the message begins with `user`, as "ImageNet needs"), or
            it fails (the message is `fault` and the reason).
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{user} datasets: pip install 'deqzoo[train]'") from error
    # `datasets` wraps whatever goes wrong in classes of its own.
    with as_user_error(fault, Exception, most=160):
        return load_dataset(**options)


def data_folder(
    title: str, repository: str, data: str | os.PathLike[str] | None, inside: str
) -> Path:
    """The local folder of a data set; its parquet files are fetched from the Hub if need be.

    Args:
        title: what messages call the data set.
        repository: the data set's own.
        data: local folder, or another repository; None for `repository`.
        inside: folder of the repository that holds the wanted variant.

    Raises:
        UserError: no such folder, and no such repository or no connection.
    """
    if (local := local_folder(data)) is not None:
        return local
    repository = repository if data is None else str(data)

    def snapshot(revision: str | None) -> Path:
        files = [f"{inside}/*.parquet", f"{inside}/**/*.parquet"]
        return Path(
            snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=files,
                etag_timeout=5,
            )
        )  # fmt: skip

    try:
        folder = snapshot(None)
        # Repositories of other file formats have a converted copy there.
        return folder if any(folder.rglob("*.parquet")) else snapshot("refs/convert/parquet")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{title} is not at hand: {repository} is no local folder and cannot be fetched "
            f"from the Hub; pass the folder of a copy with --data ({one_line(error, 160)})"
        ) from error

"""The folder of a data set, and the files that a split of it is stored in."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from deqzoo.errors import UserError, one_line


def parquet_shards(folder: Path, split: str) -> list[Path]:
    """Parquet files of a split, as the Hub and `datasets` name them; none if there are none.

    `train-00000-of-00002.parquet` (with a hash in old ones), or `train/0000.parquet`, in the folder
    or below it. Other names, as of backups, are not taken.

    Raises:
        UserError: several folders hold the split, or a part of it is missing.
    """
    name = re.compile(rf"{split}-\d+(-of-(?P<parts>\d+))?(-[0-9a-f]{{8,}})?\.parquet")
    found = ((path, name.fullmatch(path.name)) for path in folder.rglob(f"{split}-*.parquet"))
    shards = sorted((path, match) for path, match in found if match)
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


def data_folder(
    title: str, repository: str, data: str | os.PathLike[str] | None, inside: str
) -> Path:
    """The local folder of a data set, its parquet files fetched from the Hub where it is not local.

    Args:
        title: what messages call the data set.
        repository: the data set's own.
        data: local folder, or another repository; None for `repository`.
        inside: folder of the repository that holds the wanted variant.

    Raises:
        UserError: no such folder, and no such repository or no connection.
    """
    if data is not None and Path(data).expanduser().is_dir():
        return Path(data).expanduser()
    if data is not None and (str(data).startswith((".", "/", "~")) or Path(data).is_file()):
        raise UserError(f"data folder {data} does not exist or is no folder")
    repository = repository if data is None else str(data)

    def fetched(revision: str | None) -> Path:
        files = [f"{inside}/*.parquet", f"{inside}/**/*.parquet"]
        return Path(
            snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=files,
                etag_timeout=5,
            )
        )  # fmt: skip

    try:
        folder = fetched(None)
        # Repositories of other file formats have a converted copy there.
        return folder if any(folder.rglob("*.parquet")) else fetched("refs/convert/parquet")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{title} is not at hand: {repository} is no local folder and cannot be fetched "
            f"from the Hub; pass the folder of a copy with --data ({one_line(error, 160)})"
        ) from error

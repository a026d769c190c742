"""Names of the files that a split of a data set is stored in."""

from __future__ import annotations

import re
from pathlib import Path

from deqzoo.errors import UserError


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

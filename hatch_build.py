"""Chooses which checkpoints of `hub_configs/` the wheel carries: those of at most 8 MiB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MAX_BYTES = 8 * 2**20


class CheckpointHook(BuildHookInterface):
    """Adds the small checkpoint folders to the wheel, where the package looks for them."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Map each chosen folder of the source tree to `deqzoo/hub_configs/NAME`."""
        if version == "editable":
            return
        source = Path(self.root) / "hub_configs"
        for folder in sorted(source.iterdir()) if source.is_dir() else []:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if folder.is_dir() and not folder.name.startswith(".") and size <= MAX_BYTES:
                build_data["force_include"][str(folder)] = f"deqzoo/hub_configs/{folder.name}"

"""The demo's command."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def publish_space(
    repo_id: Annotated[str, typer.Option(help="Space on the Hub, ORG/NAME.")],
    dry_run: Annotated[
        Path | None,
        typer.Option("--dry-run", metavar="DIR", help="Only write the Space's files to DIR."),
    ] = None,
    private: Annotated[bool, typer.Option(help="Create the Space private.")] = False,
    token: Annotated[str | None, typer.Option(help="Access token; the stored one if none.")] = None,
) -> None:
    """Assemble the demo with the bundled checkpoints, and upload it as a Space."""
    from deqzoo.demo import space
    from deqzoo.hub.publish import check_repository_name

    check_repository_name(repo_id)
    if dry_run is not None:
        files = space.assemble(dry_run)
        size = sum((dry_run / path).stat().st_size for path in files) / 2**20
        typer.echo(
            f"{len(files)} files, {size:.1f} MiB for the Space {repo_id} in {dry_run}; try it: "
            f"cd {dry_run} && python app.py"
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "space"
        files = space.assemble(folder)
        commit = space.publish_space(repo_id, folder, private, token)
    typer.echo(f"Space {repo_id}: {len(files)} files, commit {commit}")

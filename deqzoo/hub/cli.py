"""Commands of the hub: store, seal, cards, verify and publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deqzoo.errors import UserError


def store(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a model.")],
    data: Annotated[Path | None, typer.Option(help="Local copy of the data set.")] = None,
    name: Annotated[str | None, typer.Option(help="Zoo name; the recipe's by default.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace, and store what is no stable equilibrium.")
    ] = False,
) -> None:
    """Measure a finished run and take it into hub_configs, sealed."""
    from deqzoo.hub.store import store_run

    typer.echo(f"stored in {store_run(run, data, name=name, force=force)}; now run `deqzoo cards`")


def seal(
    names: Annotated[list[str], typer.Argument(help="Zoo names or local folders.")],
) -> None:
    """Record the checksums and the golden prediction of finished checkpoints."""
    from deqzoo.hub.integrity import seal as record
    from deqzoo.zoo import resolve_bundled

    for name in names:
        folder = resolve_bundled(name)
        is_new = record(folder)
        typer.echo(f"{folder.name}: {'sealed' if is_new else 'sealed already'}")


def cards(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail where a file is out of date.")
    ] = False,
) -> None:
    """Render model cards, plots and README's table from the checkpoints' files."""
    from deqzoo.files import replace_text
    from deqzoo.hub.cards import rendered_files, source_root

    stale_paths = []
    for path, text in rendered_files(source_root()).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale_paths.append(path)
            if not check:
                path.parent.mkdir(exist_ok=True)
                replace_text(path, text)
    if check and stale_paths:
        names = ", ".join(path.name for path in stale_paths)
        raise UserError(f"out of date: {names}; run `deqzoo cards`")
    typer.echo("up to date" if not stale_paths else f"{len(stale_paths)} file(s) written")


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Zoo names, folders or Hub names; all by default.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision on the Hub, in place of what is bundled.")
    ] = None,
) -> None:
    """Check files, weights, golden prediction and card snippet of checkpoints."""
    from deqzoo.hub.verify import verify_model
    from deqzoo.zoo import list_models

    faulty_names = []
    all_names = names or list_models()
    for name in all_names:
        try:
            faults = verify_model(name, revision=revision)
        except UserError as error:
            if len(all_names) == 1:
                raise
            faults = [str(error)]  # and the others are looked at all the same
        typer.echo(f"{name}: {'; '.join(faults) if faults else 'ok'}")
        faulty_names += [name] if faults else []
    if faulty_names:
        raise UserError(f"{len(faulty_names)} checkpoint(s) failed: {', '.join(faulty_names)}")


def publish(
    name: Annotated[str, typer.Argument(help="Zoo name or local folder.")],
    repo_id: Annotated[str, typer.Option(help="Repository on the Hub, ORG/NAME.")],
    private: Annotated[bool, typer.Option(help="Create the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    token: Annotated[str | None, typer.Option(help="Access token; the stored one if none.")] = None,
) -> None:
    """Upload a checkpoint and its card in one commit, and tag the version."""
    from deqzoo.hub.publish import publish as upload

    report = upload(name, repo_id, private=private, dry_run=dry_run, revision=revision, token=token)
    typer.echo(report)

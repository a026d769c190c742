"""Commands of the training room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deqzoo.errors import UserError


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("train")(train)


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML).", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Local copy of the data set; with --queue, of all of them."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only build the model and estimate the cost.")
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop, resumably, after so many steps in all.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Instead of the recipe's; the run is then called NAME-sSEED.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    queue: Annotated[
        Path | None, typer.Option(help="Work through a list of recipes (YAML) instead.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--status", help="With --queue: print what is done and left.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="With --queue: threads of a run.")] = 1,
) -> None:
    """Train a checkpoint from a recipe, or a queue of recipes."""
    if (recipe is None) == (queue is None):
        raise UserError("name either a recipe or a queue, as in: deqzoo train recipes/NAME.yaml")
    if queue is not None:
        _queue(queue, data, output or Path("runs"), show, threads)
        return
    from deqzoo.training.recipe import load_recipe, with_seed
    from deqzoo.training.run import build_task, leave_process_group, run_recipe

    assert recipe is not None
    loaded = load_recipe(recipe)
    if seed is not None:
        loaded = with_seed(loaded, seed)
    if dry_run:
        from deqzoo.training.estimate import commands, estimate

        figures = estimate(loaded, build_task(loaded, data, stand_in=True))
        typer.echo(json.dumps({**figures, "commands": commands(str(recipe))}, indent=2))
        return
    folder = run_recipe(
        loaded,
        data,
        output or Path("runs") / loaded.name,
        resume=resume,
        progress=not quiet,
        max_steps=max_steps,
    )
    leave_process_group()
    typer.echo(f"weights in {folder}")


def _queue(path: Path, data: Path | None, runs: Path, show: bool, threads: int) -> None:
    from deqzoo.training import queue

    entries = queue.load_queue(path)
    typer.echo(queue.render(entries, runs))
    if not show:
        queue.work(entries, runs, data, threads)
        typer.echo(queue.render(entries, runs))

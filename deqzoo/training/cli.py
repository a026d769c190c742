"""The command that trains recipes."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deqzoo.errors import UserError
from deqzoo.evaluation.options import DataFolder


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML).", show_default=False)
    ] = None,
    data: DataFolder = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only build the model and estimate the cost.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Go on with other data, threads or settings."),
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop, resumably, after so many steps in all.")
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(help="Train for so long, as in 8m; the epochs of the stages are its shares."),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(help="With a time budget: everything is written after so long, as in 10m."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32 - 1, help="Instead of the recipe's; the run is then called NAME-sSEED."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no log lines.")] = False,
    queue: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train a checkpoint from a recipe."""
    if queue is not None:
        raise UserError(f"a queue is worked through by: python recipes/work.py {queue}")
    if recipe is None or recipe.is_dir() or not recipe.exists():
        what = "" if recipe is None else f"{recipe} is no recipe file; "
        raise UserError(f"{what}name a recipe, as in: deqzoo train recipes/NAME.yaml")
    from deqzoo.recipe import load_recipe, seconds_of, with_seed
    from deqzoo.tasks import build_task
    from deqzoo.training.arguments import check_report_to
    from deqzoo.training.run import leave_process_group, run_recipe

    loaded_recipe = load_recipe(recipe)
    check_report_to(loaded_recipe.report_to)
    if seed is not None:
        loaded_recipe = with_seed(loaded_recipe, seed)
    if time_budget is not None:
        seconds_of(time_budget, "--time-budget")
        loaded_recipe = replace(loaded_recipe, time_budget=time_budget)
    if loaded_recipe.report_to and loaded_recipe.time_budget:
        raise UserError("report_to is not read by runs with a time budget; leave one of them out")
    if deadline is not None and not loaded_recipe.time_budget:
        raise UserError("--deadline is for a run with a time budget; add --time-budget 8m")
    if dry_run:
        from deqzoo.training.estimate import commands, estimate

        task = build_task(loaded_recipe, data, stand_in=True)
        one_process = bool(loaded_recipe.time_budget) or task.one_process
        option_values = {
            "--data": data, "--output": output, "--seed": seed, "--time-budget": time_budget,
            "--deadline": deadline,
        }  # fmt: skip
        options = (
            str(part) for pair in option_values.items() if pair[1] is not None for part in pair
        )
        figures = {
            **estimate(loaded_recipe, task),
            "commands": commands(shlex.join([str(recipe), *options]), one_process),
        }
        if loaded_recipe.time_budget:
            print(
                f"the run ends by its clock ({loaded_recipe.time_budget}); epochs are shares "
                "of that, and steps, pflop and hours are those of whole epochs",
                file=sys.stderr,
            )
        typer.echo(json.dumps(figures, indent=2))
        return
    folder = run_recipe(
        loaded_recipe,
        data,
        output or Path("runs") / loaded_recipe.name,
        resume=resume,
        progress=not quiet,
        max_steps=max_steps,
        deadline=None if deadline is None else seconds_of(deadline, "--deadline"),
        accept_changes=accept_changes,
    )
    leave_process_group()
    typer.echo(f"weights in {folder}")

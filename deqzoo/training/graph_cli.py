"""The command of the graph table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deqzoo.errors import UserError

DataRoot = Annotated[Path, typer.Option("--data", help="Folder of the graph data sets.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("ignn-table", rich_help_panel="Train")(ignn_table)


def ignn_table(
    data: DataRoot,
    output: Annotated[Path, typer.Option(help="Folder of the folds' files.")] = Path(
        "runs/ignn/table"
    ),
    results: Annotated[
        Path, typer.Option(help="Folder of results.json and table.md; its folds count as done.")
    ] = Path("benchmarks/ignn"),
    recipe: Annotated[
        Path | None, typer.Option(help="Settings of the training; recipes/ignn-table.yaml.")
    ] = None,
    sets: Annotated[str, typer.Option(help="Data sets, separated by commas.")] = "COX2,PROTEINS",
    methods: Annotated[str, typer.Option(help="Gradients, separated by commas, or all.")] = "all",
    protocols: Annotated[str, typer.Option(help="Protocols.")] = "published,honest",
    processes: Annotated[int, typer.Option(min=1, help="Folds trained at the same time.")] = 2,
    render_only: Annotated[bool, typer.Option("--render", help="Train nothing.")] = False,
) -> None:
    """Train the folds of the graph table that are missing, and print the table."""
    from deqzoo.evaluation import graph_table as rendering
    from deqzoo.training import graph_table as table

    stored = results / "results.json"
    chosen = tuple(table.METHODS) if methods == "all" else tuple(methods.split(","))
    jobs = table.all_jobs(sets.split(","), chosen, protocols.split(","))
    settings = table.FoldSettings.read(recipe) if recipe else None
    if not render_only:
        for job, result in table.run_table(data, output, jobs, settings, stored, processes):
            typer.echo(f"{job.key}: {result['seconds']:.0f} s", err=True)
    folds = table.collect(output, stored)
    if not folds:
        raise UserError(f"no finished folds in {output} or {stored}")
    rendering.write_table(folds, results)
    _write_notes(folds, results)
    typer.echo((results / "table.md").read_text(encoding="utf-8"))


def _write_notes(folds: dict[str, Any], results: Path) -> None:
    """Put the tables where the bundled checkpoints' cards and the reader find them."""
    from deqzoo.evaluation import graph_table as rendering
    from deqzoo.files import replace_text
    from deqzoo.sealed import record
    from deqzoo.zoo import checkpoints_root, read_json

    for name in sorted({fold["data"] for fold in folds.values()}):
        folder = checkpoints_root() / f"ignn-{name.lower()}-upg"
        if folder.is_dir():
            text = rendering.render_notes(folds, name)
            replace_text(folder / "notes.md", text)
            record(folder / "notes.md")
    runs = sorted(checkpoints_root().glob("ignn-*/run.json"))
    if runs:
        text = rendering.render_nodes({run.parent.name: read_json(run) for run in runs})
        replace_text(results / "nodes.md", text)

"""Commands of the graph family: predict, and the table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deqzoo.errors import UserError

DataRoot = Annotated[Path, typer.Option("--data", help="Folder of the graph data sets.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("predict-graphs", rich_help_panel="Use models")(predict_graphs)
    app.command("ignn-table", rich_help_panel="Train")(ignn_table)


def predict_graphs(
    name: Annotated[str, typer.Argument(help="Zoo name, local folder, or repository.")],
    data: DataRoot,
    data_set: Annotated[
        str | None, typer.Option("--set", help="Data set; the checkpoint's own by default.")
    ] = None,
    split: Annotated[str, typer.Option(help="test, validation, train or all.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the classes of graphs."""
    import deqzoo
    from deqzoo.data.graphs import load_graph_set
    from deqzoo.evaluation import graphs

    model = deqzoo.DEQModel.from_pretrained(name)
    stored = data_set or graphs.stored_fold(model)["data"]
    index = None if split == "all" else graphs.split_indices(model, stored, split)
    loaded = load_graph_set(stored, data)
    found = list(graphs.predict_graphs(model, loaded, index or list(range(len(loaded.graphs)))))
    if as_json:
        typer.echo(json.dumps([asdict(prediction) for prediction in found], indent=2))
        return
    for p in found:
        state = "converged" if p.converged else "not converged"
        typer.echo(
            f"graph {p.number:>5}  class {p.label} ({p.probability:.1%}), stored {p.target}; "
            f"{p.n_steps} steps, residual {p.residual:.1e}, {state}"
        )
    right = sum(p.label == p.target for p in found)
    typer.echo(f"{right} of {len(found)} as stored ({right / len(found):.1%})")


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
    from deqzoo.zoo import checkpoints_root, read_json

    for name in sorted({fold["data"] for fold in folds.values()}):
        folder = checkpoints_root() / f"ignn-{name.lower()}-upg"
        if folder.is_dir():
            text = rendering.render_notes(folds, name)
            replace_text(folder / "notes.md", text)
    runs = sorted(checkpoints_root().glob("ignn-*/run.json"))
    if runs:
        text = rendering.render_nodes({run.parent.name: read_json(run) for run in runs})
        replace_text(results / "nodes.md", text)

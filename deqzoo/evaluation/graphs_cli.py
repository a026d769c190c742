"""The command that names the classes of graphs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deqzoo.errors import UserError
from deqzoo.evaluation.options import (
    AsJson,
    Inputs,
    MaxSteps,
    ModelName,
    SolverName,
    Tolerance,
    Trace,
    Waiting,
    recorded_traces,
    show_json,
    solver_settings,
)


def predict_graphs(
    name: ModelName,
    graphs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders in TUDataset's format, .pt files with lists of PyG Data, or - for such a "
            "file from standard input.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Instead: folder of published data sets.")
    ] = None,
    data_set: Annotated[
        str | None, typer.Option("--set", help="With --data: the set; the checkpoint's own.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="With --data: test, validation, train or all.")
    ] = "test",
    solver: SolverName = None,
    max_steps: MaxSteps = None,
    tol: Tolerance = None,
    trace: Trace = None,
    as_json: AsJson = False,
) -> None:
    """Predict the classes of graphs."""
    import deqzoo
    from deqzoo.data.graphs import load_graph_set, load_own_graphs
    from deqzoo.evaluation import graphs as evaluation
    from deqzoo.tasks.graphs import read_fold

    if bool(graphs) == (data is not None):
        raise UserError("name either graphs, or the folder of the checkpoint's data with --data")
    inputs = Inputs(trace, as_json)
    with Waiting(f"loading {name} ..."):
        model = deqzoo.DEQModel.from_pretrained(name)
    evaluation.require_graph_classifier(model)
    settings = solver_settings(model, solver, max_steps, tol)
    encoding = evaluation.encoding_of(model)

    def predict(source: str, graph_set: Any, index: list[int] | None) -> None:
        numbers = list(range(len(graph_set.graphs))) if index is None else index
        if not numbers:
            raise UserError(f"{source}: the {split} split is empty")
        with recorded_traces(model, trace is not None) as traces:
            predictions = list(
                evaluation.predict_graphs(model, graph_set, numbers, solver=settings)
            )
        for prediction in predictions:
            _show(source, prediction, model.config, as_json)
        if not as_json:
            _summarise(predictions)
        if traces:  # of the first layer, which solves for all graphs of a batch at once
            first = traces[:: len(model.base_model.layers)]
            rows = [row for trace in first for row in trace.tolist()]
            for row, prediction in zip(rows, predictions, strict=True):
                inputs.curves[f"{source} {prediction.number}"] = row

    if data is not None:
        set_name = data_set or read_fold(model.config._name_or_path)["data"]
        index = None if split == "all" else evaluation.split_indices(model, set_name, split)
        predict(set_name, load_graph_set(set_name, data, encoding), index)
    else:
        for source in graphs or []:
            with inputs.one():
                predict(source, load_own_graphs(source, encoding), None)
    inputs.end()


def _show(source: str, prediction: Any, config: Any, as_json: bool) -> None:
    def class_name(number: int | None) -> str | None:
        return None if number is None else config.id2label[number]

    p = prediction
    label, target = class_name(p.label), class_name(p.target)
    if as_json:
        return show_json({"file": source, **asdict(p), "label": label, "target": target})
    state = "converged" if p.converged else "not converged"
    target_text = "" if target is None else f", stored {target}"
    typer.echo(
        f"graph {p.number:>5}  class {label} ({p.probability:.1%}){target_text}; "
        f"{p.n_steps} steps, residual {p.residual:.1e}, {state}"
    )


def _summarise(predictions: list[Any]) -> None:
    cases = [p for p in predictions if p.target is not None]
    if cases:
        right = sum(p.label == p.target for p in cases)
        typer.echo(f"{right} of {len(cases)} as stored ({right / len(cases):.1%})")

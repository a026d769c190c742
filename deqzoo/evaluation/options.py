"""Shared by the commands that predict: solver options, traces, going on after a bad input."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

import deqzoo.zoo
from deqzoo.errors import UserError, as_user_error, one_line


def complete_model(incomplete: str) -> list[str]:
    """Names of the zoo that begin with the text typed so far, for the shell's completion."""
    return [name for name in deqzoo.zoo.list_models() if name.startswith(incomplete)]


ModelName = Annotated[
    str,
    typer.Argument(
        help="Zoo name, local folder, or repository on the Hub.", autocompletion=complete_model
    ),
]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="Local copy of the data set; else it is fetched.")
]
SolverName = Annotated[
    str | None, typer.Option("--solver", help="Solver instead of the model's: anderson, ...")
]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", min=1, help="At most so many solver steps.")
]
Tolerance = Annotated[
    float | None, typer.Option("--tol", min=0, help="Residual at which a solve stops.")
]
Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Draw the residual of every solver step: - in the terminal, or an .svg, .csv or "
        ".json file.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, a line for each answer.")]


def solver_settings(
    model: Any, name: str | None, max_steps: int | None, tol: float | None
) -> dict[str, Any] | None:
    """Solver settings of a command, over the model's own; None where nothing is changed.

    Raises:
        UserError: no such solver, or a value out of range.
    """
    options = {"name": name, "max_steps": max_steps, "tol": tol}
    settings = {key: value for key, value in options.items() if value is not None}
    with as_user_error("--solver, --max-steps, --tol", ValueError, TypeError):
        model.resolve_solver(settings)
    return settings or None


class Waiting:
    """Says on stderr what a command is doing, should that take more than `after` seconds."""

    after: ClassVar[float] = 1.0

    def __init__(self, what: str) -> None:
        print_options = {"file": sys.stderr, "flush": True}
        self.timer = threading.Timer(self.after, print, (what,), print_options)
        self.timer.daemon = True
        self.timer.start()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.over()

    def over(self) -> None:
        """Say nothing any more: the work is done."""
        self.timer.cancel()


class Inputs:
    """Counts inputs, goes on after bad ones, and gathers their traces.

    Args:
        trace: as `--trace` says.
        as_json: whether the answers are printed as JSON, which a drawing must not break.

    Raises:
        UserError: the trace cannot be written there.
    """

    def __init__(self, trace: str | None, as_json: bool = False) -> None:
        _require_trace_file(trace)
        if as_json and trace == "-":
            raise UserError("--trace - draws among the lines of --json; name a file for the trace")
        self.trace, self.good, self.bad = trace, 0, 0
        self.curves: dict[str, Sequence[float]] = {}

    @contextmanager
    def one(self) -> Iterator[None]:
        """One input: a mistake in it is a line on stderr."""
        try:
            yield
            self.good += 1
        except UserError as error:
            self.bad += 1
            print(f"deqzoo: {one_line(error)}", file=sys.stderr)

    def files(
        self, sources: Sequence[str], files_of: Callable[[str], Sequence[Path]]
    ) -> list[str | Path]:
        """The files that sources name, "-" for standard input; bad sources count as bad inputs."""
        paths: list[str | Path] = []
        for source in sources:
            with self.one():
                paths += [source] if source == "-" else files_of(source)
        self.good = 0
        return paths

    def end(self) -> None:
        """Write the trace; leave with exit code 1 if some inputs were bad, 2 if all were."""
        if self.trace is not None and self.curves:
            write_trace(self.trace, self.curves)
        if self.bad:
            raise typer.Exit(1 if self.good else 2)


@contextmanager
def recorded_traces(model: Any, enabled: bool = True) -> Iterator[list[Any]]:
    """A list that receives the trace (*cells, steps) of every solve of a model inside."""
    traces: list[Any] = []
    owners = [part for part in model.modules() if hasattr(type(part), "solve")] if enabled else []

    def record(solve: Any) -> Any:
        def solve_with_trace(*arguments: Any, **keywords: Any) -> Any:
            solution = solve(*arguments, **{**keywords, "trace": True})
            traces.append(solution.trace.detach().float().cpu())
            return solution

        return solve_with_trace

    for owner in owners:
        owner.solve = record(owner.solve)
    try:
        yield traces
    finally:
        for owner in owners:
            del owner.solve


def show_json(row: dict[str, Any]) -> None:
    """Print one answer as a line of JSON."""
    from deqzoo.evaluation.files import finite

    typer.echo(json.dumps(finite(row), ensure_ascii=False))


def _require_trace_file(trace: str | None) -> None:
    """Check where a trace is to be written before the work that it records."""
    if trace is None or trace == "-":
        return
    from deqzoo.files import require_writable

    if Path(trace).suffix not in (".svg", ".csv", ".json"):
        raise UserError(f"--trace {trace}: give -, or a file that ends in .svg, .csv or .json")
    require_writable(Path(trace))


def write_trace(trace: str, curves: dict[str, Sequence[float]]) -> None:
    """Draw residuals after every step, by name, as `--trace` says."""
    if trace == "-":
        for name, values in curves.items():
            typer.echo(terminal_chart(name, values))
        return
    path = Path(trace)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps({name: list(values) for name, values in curves.items()}, indent=2) + "\n"
    elif path.suffix == ".csv":
        rows = [
            f"{json.dumps(name, ensure_ascii=False)},{step},{value:.6g}"
            for name, values in curves.items()
            for step, value in enumerate(values, 1)
        ]
        text = "\n".join(["input,step,residual", *rows]) + "\n"
    else:
        from deqzoo.evaluation.chart import line_chart

        text = line_chart(
            {name: list(enumerate(values, 1)) for name, values in curves.items()},
            title="Residual after every solver step",
            x_label="solver steps",
            y_label="residual",
            log_y=True,
        )
    path.write_text(text, encoding="utf-8")
    print(f"trace written to {path}", file=sys.stderr)


def terminal_chart(name: str, values: Sequence[float], width: int = 48) -> str:
    """A bar for every step, its length the logarithm of the residual."""
    logs = [math.log10(v) if 0 < v < math.inf else math.nan for v in values]
    finite = [v for v in logs if not math.isnan(v)] or [0.0]
    low, high = min(finite), max(finite)
    lines = [f"{name}: residual by solver step"]
    for step, (value, log) in enumerate(zip(values, logs, strict=True), 1):
        share = 0.0 if math.isnan(log) else (log - low) / ((high - low) or 1.0)
        lines.append(f"  {step:>4}  {value:8.1e}  {'#' * (1 + round(share * (width - 1)))}")
    return "\n".join(lines)

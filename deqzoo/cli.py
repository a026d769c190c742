"""The command line: one thin command per job."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import deqzoo
import deqzoo.zoo
from deqzoo.errors import UserError, as_user_error, one_line
from deqzoo.evaluation.options import DataFolder, ModelName, SolverName, complete_model
from deqzoo.models.names import FAMILIES
from deqzoo.models.registration import after_import
from deqzoo.tasks import load

#: Order of the groups in the help; a command names its own by `rich_help_panel`.
GROUPS = ("Use models", "Measure", "Train", "Publish", "Maintain the zoo")


class _Grouped(TyperGroup):
    """Commands in the help by group, each with the whole first sentence of what it does."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            group = getattr(command, "rich_help_panel", None)
            group = group if isinstance(group, str) else "Other commands"
            rows.setdefault(group, []).append((name, command.get_short_help_str(limit=500)))
        # One column of names for all groups.
        widest = max((len(name) for group in rows.values() for name, _ in group), default=0)
        for group, commands in rows.items():
            if commands:
                with formatter.section(group):
                    formatter.write_dl([(name.ljust(widest), text) for name, text in commands])


app = typer.Typer(
    name="deqzoo",
    cls=_Grouped,
    help="Deep equilibrium models: use, measure, train and publish them.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# typer may carry its own copy of click, so the base of its usage errors is looked up.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


_INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Deep equilibrium models: use, measure, train and publish them."""
    if version:
        typer.echo(f"deqzoo {deqzoo.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("list", rich_help_panel="Use models")
def list_command(
    pattern: Annotated[
        str, typer.Argument(help='A part of the name, or wildcards, as "mdeq*".')
    ] = "*",
    task: Annotated[
        str | None, typer.Option(help="Only models of a task, or of a part of its name.")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="name, parameters, or result: by task and data, the best first.")
    ] = "name",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all test figures as CSV.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the bundled checkpoints."""
    from deqzoo.hub.catalogue import ORDERS, entries, results_csv, short_count
    from deqzoo.zoo import bare_name, check_withdrawn

    if sort not in ORDERS:
        raise UserError(f"--sort is one of {', '.join(ORDERS)}, not {sort!r}")
    if as_csv and as_json:
        raise UserError("--csv and --json are two formats; choose one")
    checkpoints = sorted(entries(pattern, task), key=ORDERS[sort])
    if not checkpoints:
        check_withdrawn(bare_name(pattern))
    if as_csv:
        typer.echo(results_csv(checkpoints), nl=False)
        return
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "task": entry.task,
            "parameters": entry.parameters,
            "result": entry.headline(),
        }
        for entry in checkpoints
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo("No such checkpoint is bundled.", err=True)
    else:
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            size = short_count(row["parameters"])
            typer.echo(f"{row['name']:<{width}}  {size:>6}  {row['task']:<22}  {row['result']}")


@app.command(rich_help_panel="Use models")
def info(
    name: Annotated[
        str, typer.Argument(help="Zoo name or local folder.", autocompletion=complete_model)
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is and what it scores."""
    from deqzoo.hub.catalogue import entry as find
    from deqzoo.hub.catalogue import main_figure

    entry = find(name)
    facts: dict[str, Any] = {
        "name": entry.name,
        "folder": str(entry.folder),
        "architecture": entry.architecture,
        "task": entry.task,
        "parameters": entry.parameters,
        "size": f"{entry.size / 2**20:.1f} MiB in {len(entry.weight_files)} file(s)",
        "solver": entry.config.get("solver"),
        "gradient": entry.config.get("gradient"),
        "evaluations": {stem: main_figure(file) for stem, file in entry.evaluations.items()},
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    facts["parameters"] = f"{entry.parameters:,}"
    figures = facts["evaluations"].values()
    facts["evaluations"] = ", ".join(figure for figure in figures if figure) or "none"
    for key, value in facts.items():
        if isinstance(value, dict):
            parts = (f"{k} {v}" for k, v in value.items() if v is not None)
            value = ", ".join(parts) or "none"
        typer.echo(f"{key:<13} {value}")


@app.command(rich_help_panel="Measure")
def evaluate(
    name: ModelName,
    data: DataFolder = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    column: Annotated[
        str | None,
        typer.Option(help="Column of your own texts in .jsonl and .parquet; else finetune's."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; by default in the model's folder `evaluation`."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward.")] = 128,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first samples; needs --output.")
    ] = None,
    budget: Annotated[
        bool,
        typer.Option("--budget/--no-budget", help="Also measure quality against solver steps."),
    ] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure a model on its data set, or on data of your own, and write the evaluation file."""
    from deqzoo.evaluation.dispatch import evaluate_model
    from deqzoo.evaluation.files import write_evaluation
    from deqzoo.files import require_writable
    from deqzoo.hub.catalogue import main_figure
    from deqzoo.records import read_evaluation

    if limit is not None and output is None:
        raise UserError("--limit makes no full evaluation: say with --output where to write it")
    if output is not None:
        require_writable(output)
        if output.is_file():
            what = f"{output} is there and no evaluation file; choose another --output"
            with as_user_error(what, UserError, most=100):
                read_evaluation(output)
    model = _on_device(deqzoo.DEQModel.from_pretrained(name), device)
    written_paths: list[Path] = []

    def place(data_name: str) -> Path:
        if output is not None:
            return output
        folder = Path(model.config._name_or_path)
        file = f"{data_name}-{split.replace('+', '-')}.json"
        return folder / "evaluation" / file if folder.is_dir() else Path(file)

    def check_place(data_name: str) -> None:
        path = place(data_name)
        require_writable(path)
        if path.is_file():
            read_evaluation(path)

    def write(content: dict[str, Any]) -> None:
        path = place(content["data"]["name"])
        write_evaluation(path, content)
        if not written_paths:  # the figures first, whatever follows
            typer.echo(f"{main_figure(content)}; written to {path}")
        written_paths.append(path)

    try:
        content = evaluate_model(
            model, deqzoo.zoo.own_name(name), split=split, data=data, column=column,
            batch_size=batch_size, limit=limit, budget_samples=None if budget else 0,
            on_data=check_place, on_figures=write,
        )  # fmt: skip
    except KeyboardInterrupt:
        if written_paths:
            print(
                f"deqzoo: what was measured until then is in {written_paths[-1]}", file=sys.stderr
            )
        raise
    if budget:
        write(content)


@app.command(rich_help_panel="Train")
def convert(
    family: Annotated[str, typer.Argument(help="mdeq, deq-transformer or ignn.")],
    source: Annotated[Path, typer.Argument(help="Official state dict (.safetensors or pickle).")],
    config: Annotated[str, typer.Option(help="Configuration as JSON file, or a preset's name.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    weights: Annotated[
        str | None,
        typer.Option(help="Which weights of a file that holds several, as in model_ema."),
    ] = None,
) -> None:
    """Turn an official state dict into a folder that from_pretrained loads."""
    name = family.replace("-", "_")
    module = f"deqzoo.models.{name}.convert_{name}"
    if name not in FAMILIES or importlib.util.find_spec(module) is None:
        raise UserError(f"unknown family {family!r}; the families are mdeq, deq-transformer, ignn")
    importlib.import_module(module).convert(source, config, output, weights)
    typer.echo(f"written to {output}")


@app.command(rich_help_panel="Use models")
def export(
    name: ModelName,
    output: Annotated[Path, typer.Option(help="File to write: .onnx, or .pt2 (torch.export).")],
    steps: Annotated[int, typer.Option(min=1, help="Solver steps that every call does.")],
    solver: SolverName = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per call; any number by default.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the pictures in pixels, or tokens (64).")
    ] = None,
) -> None:
    """Write a model with a fixed number of solver steps as a program that runs without deqzoo."""
    from deqzoo.models.exporting import check_target, export_model

    check_target(output)
    model = deqzoo.DEQModel.from_pretrained(name)
    facts = export_model(model, output, steps, solver=solver, batch=batch, size=size)
    shapes = ", ".join(f"{key} {tuple(shape)}" for key, shape in facts["inputs"].items())
    shapes = shapes.replace("'", "")
    typer.echo(f"{shapes} -> {', '.join(facts['outputs'])}; written to {output}")


#: Commands of other modules by their group.
_COMMANDS = {
    "Use models": (
        "deqzoo.evaluation.cli:classify",
        "deqzoo.evaluation.cli:perplexity",
        "deqzoo.evaluation.graphs_cli:predict_graphs",
    ),
    "Measure": ("deqzoo.fidelity.cli:gradients",),
    "Train": ("deqzoo.training.cli:train", "deqzoo.hub.finetune_cli:finetune"),
    "Publish": ("deqzoo.hub.cli:store", "deqzoo.hub.cli:publish", "deqzoo.demo.cli:publish_space"),
    "Maintain the zoo": (
        "deqzoo.hub.cli:verify",
        "deqzoo.hub.cli:cards",
        "deqzoo.hub.cli:seal",
    ),
}


def _on_device(model: Any, device: str) -> Any:
    import torch

    with as_user_error(f"cannot use device {device!r}", RuntimeError, AssertionError, most=120):
        if torch.device(device).type == "meta":
            raise UserError("device 'meta' holds no numbers; choose cpu, cuda, ...")
        return model.to(device)


for _group, _places in _COMMANDS.items():
    for _place in _places:
        app.command(rich_help_panel=_group)(load(_place))


@app.command(
    hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def ignn_table() -> None:
    """Say where the graph table has gone."""
    raise UserError("the graph table is made by a script: python benchmarks/ignn/table.py --help")


def run(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. A user's mistake is one line on stderr and code 2."""
    after_import({"transformers.utils.logging": _quiet})
    # PyTorch Geometric still scripts functions; that is nothing a user could mend.
    warnings.filterwarnings("ignore", r".*torch\.jit\.script.* is deprecated", FutureWarning)
    # The commands print convergence themselves.
    logging.getLogger("deqzoo.models").setLevel(logging.ERROR)
    try:
        code = app(args=arguments, prog_name="deqzoo", standalone_mode=False) or 0
        if code == _INTERRUPTED:  # typer swallows the exception
            raise KeyboardInterrupt
        return code
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "deqzoo"
        return _fail(f"{error.format_message()} (see {command} --help)")
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (UserError, OSError) as error:
        # Files and folders that cannot be read or written, where nothing more telling is said, too.
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("deqzoo: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if (mend := _broken_package(error) or _full_disk(error)) is None:
            raise
        return _fail(mend)


#: How torch and safetensors, whose errors are no OSError, say that nothing more can be written.
_FULL = re.compile(
    r"os error 2[78]|No space left|iostream error|unexpected pos \d+ vs|failed writing file"
)


def _full_disk(error: BaseException) -> str | None:
    """What to do about a file that could not be written to its end, where that is the error."""
    if not _FULL.search(reason := one_line(error, 120)):
        return None
    return (
        f"a file could not be written to its end ({reason}): the disk is full; make room, and "
        "run the command again, a training with --resume"
    )


def _broken_package(error: BaseException | None) -> str | None:
    """What to do about a torchvision that does not fit torch, where that is behind an error."""
    while error is not None:
        if "torchvision" in str(error):
            reason = one_line(error, 120)
            return (
                f"the installed torchvision does not work with this torch ({reason}): "
                "install the one that belongs to it, or pip uninstall torchvision, which nothing "
                "here needs"
            )
        error = error.__cause__ or error.__context__
    return None


def _quiet(transformers_logging: Any) -> None:
    """Silence transformers: the commands report by themselves."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _fail(message: str) -> int:
    print(f"deqzoo: {' '.join(message.split())}", file=sys.stderr)
    return 2

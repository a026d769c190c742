"""The graph table: ten folds of every data set, gradient and protocol, resumable fold by fold.

    python benchmarks/ignn/table.py --data ROOT --processes 2

Every fold is a run of one recipe, with the fold's data, gradient and seed, in a process of its own,
so that peak memory is the fold's. Each finished fold is one JSON file in the output folder; folds
that have one, there or in the results file of an earlier run, are not trained again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import deqzoo
from deqzoo.data.graphs import N_FOLDS
from deqzoo.errors import UserError
from deqzoo.evaluation.graphs import GraphEvaluator
from deqzoo.files import replace_text
from deqzoo.recipe import Data, Recipe, load_recipe
from deqzoo.records import read_evaluation
from deqzoo.sealed import record as seal
from deqzoo.tasks.metrics import words
from deqzoo.training.run import run_recipe
from deqzoo.zoo import checkpoints_root, read_json

ROOT = Path(__file__).parents[2]
ADJOINT = {"name": "fixed_point", "max_steps": 300, "tol": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "implicit": {"name": "implicit", "solver": ADJOINT},
    "upg-5-0.5": {"name": "upg", "steps": 5, "damping": 0.5},
    "upg-5-1.0": {"name": "upg", "steps": 5, "damping": 1.0},
    "npg-5-0.5": {"name": "npg", "steps": 5, "damping": 0.5},
}
"""Columns of the graph table: how the equilibria are differentiated."""
DATA_SETS = ("COX2", "PROTEINS", "MUTAG", "PTC_MR", "NCI1")
PROTOCOLS = ("published", "honest")
CHECKPOINT_METHOD = "upg-5-0.5"


@dataclass(frozen=True)
class Job:
    """One fold to train."""

    protocol: str
    data: str
    method: str
    fold: int

    @property
    def key(self) -> str:
        """Name of the job's result."""
        return f"{self.data}-{self.method}-{self.protocol}-{self.fold}"


def all_jobs(
    data: Sequence[str] = DATA_SETS,
    methods: Sequence[str] = tuple(METHODS),
    protocols: Sequence[str] = PROTOCOLS,
) -> list[Job]:
    """List the jobs in the order in which they are run.

    First the folds that become checkpoints, then protocol by protocol and data set by data set,
    fold by fold, so that an interrupted table has comparable cells.

    Raises:
        UserError: an unknown method or protocol.
    """
    for what, chosen, valid in (
        ("method", methods, tuple(METHODS)),
        ("protocol", protocols, PROTOCOLS),
    ):
        for name in chosen:
            if name not in valid:
                raise UserError(f"unknown {what} {name!r}; choose from {', '.join(valid)}")
    first = [
        Job("honest", name, CHECKPOINT_METHOD, 0)
        for name in data
        if "honest" in protocols and CHECKPOINT_METHOD in methods
    ]
    rest = [
        Job(protocol, name, method, fold)
        for protocol in protocols
        for name in data
        for fold in range(N_FOLDS)
        for method in methods
    ]
    return list(dict.fromkeys(first + rest))


def run_table(
    root: str | Path,
    output: str | Path,
    jobs: Sequence[Job],
    recipe: Recipe,
    results: str | Path | None = None,
    processes: int = 1,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Train every job that has no result yet, and yield each result as it comes.

    Args:
        root: folder of the data sets.
        output: folder for one JSON file per fold, and for their runs.
        jobs: what to train, see `all_jobs`.
        recipe: of the training; data, gradient and seed are each job's own.
        results: a file that `collect` wrote; its folds count as done.
        processes: folds trained at the same time, with one thread each.

    Raises:
        UserError: a fold that is done was trained with other settings.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    done = collect(output, results)
    for job in jobs:
        if job.key in done and done[job.key]["settings"] != settings_of(recipe):
            raise UserError(
                f"{job.key} was trained with other settings; name folders without it "
                "with --output and --results"
            )
    waiting = [(Path(root), job, recipe, output) for job in jobs if job.key not in done]
    # A fork shares the loaded libraries; this process has never run autograd threads.
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_run_job, waiting)


def _run_job(task: tuple[Path, Job, Recipe, Path]) -> tuple[Job, dict[str, Any]]:
    root, job, recipe, output = task
    torch.set_num_threads(1)
    folder, started = output / "runs" / job.key, time.process_time()
    run_recipe(recipe_of(recipe, job), root, folder, resume=True, progress=False)
    seconds = time.process_time() - started
    model = deqzoo.DEQModel.from_pretrained(folder / "model")
    test = GraphEvaluator(model, "test", root, batch_size=128, limit=None, progress=False)
    content = read_json(folder / "record.json")
    result = summarize(job, content, settings_of(recipe), seconds, test.measure()["accuracy"])
    replace_text(output / f"{job.key}.json", json.dumps(result))
    return job, result


def recipe_of(recipe: Recipe, job: Job) -> Recipe:
    """The recipe of a job."""
    gradient = METHODS[job.method]
    overrides = {**recipe.model.overrides, "gradient": gradient}
    return replace(
        recipe,
        name=job.key,
        data=Data(job.data, {"fold": job.fold, "protocol": job.protocol}),
        model=replace(recipe.model, overrides=overrides),
        stages=tuple(replace(stage, gradient=gradient) for stage in recipe.stages),
        evaluation=replace(recipe.evaluation, snapshots=0),
        seed=recipe.seed + job.fold,
    )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What decides whether two folds can stand in one table."""
    epochs = recipe.stages[0].epochs
    return {
        "epochs": epochs,
        "batch_size": recipe.batch_size,
        "lr": recipe.optimizer.lr,
        "halve_after": epochs * recipe.schedule.at,
        "tol": recipe.stages[0].solver["tol"],
        "warm_start": True,
        "seed": recipe.seed,
    }


def summarize(
    job: Job, record: Mapping[str, Any], settings: Mapping[str, Any], seconds: float, test: float
) -> dict[str, Any]:
    """A fold's figures by its protocol's rule of choosing the epoch, and its curve.

    Args:
        job: the fold.
        record: of its run. By the published protocol its validation part is the test part.
        settings: of the training.
        seconds: CPU time of the run.
        test: accuracy of the kept weights on the test part.
    """
    curve = [row["accuracy"] for row in record["validation"]]
    result = {
        **asdict(job),
        "settings": settings,
        "parameters": record["parameters"],
        "seconds": record["seconds"],
        "cpu_seconds": round(seconds, 2),
        "peak_memory_mib": record["peak_memory_mib"],
        "curves": {"accuracy": [round(value, 5) for value in curve]},
    }
    if job.protocol == "published":
        best = max(curve)
        epoch = curve.index(best) + 1
        return {**result, "best_test_accuracy": best, "best_epoch": epoch}
    best = record["best"]
    epoch = [row["step"] for row in record["validation"]].index(best["step"]) + 1
    figures = {"chosen_epoch": epoch, "validation_accuracy": best["accuracy"]}
    return {**result, **figures, "test_accuracy": test}


def collect(output: str | Path, results: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """Return all finished folds by key: those of a results file and of an output folder."""
    found: dict[str, dict[str, Any]] = {}
    if results is not None and Path(results).is_file():
        found.update(json.loads(Path(results).read_text())["folds"])
    for file in sorted(Path(output).glob("*.json")):
        found[file.stem] = json.loads(file.read_text())
    return found


PUBLISHED: dict[tuple[str, str], str] = {
    ("COX2", "implicit"): "84.1 ± 2.9",
    ("COX2", "upg-5-0.5"): "83.9 ± 3.0",
    ("COX2", "upg-5-1.0"): "83.0 ± 2.9",
    ("PROTEINS", "implicit"): "78.6 ± 4.1",
    ("PROTEINS", "upg-5-0.5"): "78.4 ± 4.2",
    ("PROTEINS", "upg-5-1.0"): "78.8 ± 4.2",
    ("MUTAG", "implicit"): "89.3",
    ("PTC_MR", "implicit"): "70.1",
    ("NCI1", "implicit"): "80.5",
    ("PPI", "implicit"): "97.6",
    ("PPI", "upg-5-0.5"): "98.2",
    ("PPI", "upg-5-1.0"): "96.2",
}
"""Geng et al., On Training Implicit Models, NeurIPS 2021: accuracy over ten folds; PPI Micro-F1.
MUTAG, PTC_MR and NCI1: means of Gu et al., Implicit Graph Neural Networks, NeurIPS 2020."""

TITLES = {
    "implicit": "Implicit",
    "upg-5-0.5": "UPG k=5 λ=0.5",
    "upg-5-1.0": "UPG k=5 λ=1.0",
    "npg-5-0.5": "NPG k=5 λ=0.5",
}
_LEGEND = """\
Accuracy in %, mean ± standard deviation of the ten folds (standard error), ddof 1; published
figures as printed. "Published protocol" repeats the published code: folds stratified by labels in
the wrong order, no validation part, and for each fold the best test accuracy of 200 epochs,
evaluated with A + A^T: a figure chosen on the test data. "Honest protocol": properly stratified
folds, 8 parts to train, 1 to choose the epoch, 1 to test. "3 of 10 folds" marks a cell whose folds
are not all done. Baselines are in `benchmarks/ignn/baselines.md`.
"""
_COLUMNS = """\
| data | gradient | published figure | published protocol | honest protocol | parameters | \
training, CPU s per fold | peak memory, MiB |
|---|---|---|---|---|---|---|---|
"""
_NODE_HEAD = """\
# IGNN on nodes

One run each; the validation part chooses the epoch. No published IGNN figures exist for these data.
Twitch is inductive (trained on DE, ES, FR and RU, chosen on PT, tested on EN); HumLoc and EukLoc
are transductive with several labels per node.

| checkpoint | data | gradient | figure | validation, % | test, % | solver steps | CPU s, training |
|---|---|---|---|---|---|---|---|
"""
_TAIL = """
Parameters are those in use; the published counts (38K, 34K, 4.7M) include matrices that the
published code never uses. Times are CPU seconds of one thread for the 200 epochs, with the
evaluation after each of them; peak memory is the resident memory of the whole process, libraries
included (about 550 MiB). PPI is not measured: its data could not be had. Models for it, a recipe
and a converter exist. Written by `python benchmarks/ignn/table.py --data ROOT`.
"""


def compact(fold: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fold's result without its curves."""
    return {key: value for key, value in fold.items() if key != "curves"}


def write_table(folds: Mapping[str, Mapping[str, Any]], folder: str | Path) -> tuple[Path, Path]:
    """Write `results.json` (every fold) and `table.md` (the cells) into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results, table = folder / "results.json", folder / "table.md"
    lines = [f" {json.dumps(k)}: {json.dumps(compact(folds[k]))}" for k in sorted(folds)]
    replace_text(results, '{"folds": {\n' + ",\n".join(lines) + "\n}}\n")
    replace_text(table, render(folds))
    return results, table


def render(folds: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table in Markdown."""
    rows = []
    names = list(dict.fromkeys(["COX2", "PROTEINS", *(f["data"] for f in folds.values())]))
    for name in names:
        for method, title in TITLES.items():
            if any((f["data"], f["method"]) == (name, method) for f in folds.values()):
                rows.append(_row(name, method, title, list(folds.values())))
    for method in ("implicit", "upg-5-0.5", "upg-5-1.0"):
        figure = PUBLISHED["PPI", method]
        rows.append(f"| PPI | {TITLES[method]} | {figure} (Micro-F1) | not measured | | | | |")
    return f"# IGNN on graphs\n\n{_LEGEND}\n{_COLUMNS}" + "\n".join(rows) + "\n" + _TAIL


def render_notes(folds: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Return the rows of one data set, for the card of its checkpoint."""
    rows = [_row(name, method, title, list(folds.values())) for method, title in TITLES.items()]
    return f"### Ten folds of {name}\n\n{_LEGEND}\n{_COLUMNS}" + "\n".join(rows) + "\n"


def render_nodes(folders: Sequence[Path]) -> str:
    """Return the table of node classifiers, from the folders of checkpoints."""
    rows = []
    for folder in folders:
        validation, test = (
            read_evaluation(next((folder / "evaluation").glob(f"*-{split}.json")))
            for split in ("validation", "test")
        )
        metric, figures = test["metric"], [validation["results"], test["results"]]
        record = next(
            read_json(folder / name)
            for name in ("training.json", "run.json")
            if (folder / name).is_file()
        )
        cells = [
            folder.name,
            test["data"]["name"],
            test["model"]["gradient"]["name"],
            words(metric),
            *(f"{100 * results[metric]:.1f}" for results in figures),
            f"{figures[1]['n_steps_mean']:.0f}",
            f"{record.get('cpu_seconds', record['seconds']):.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return _NODE_HEAD + "\n".join(rows) + "\n"


def cell(values: list[float]) -> str:
    """Return "84.1 ± 2.9 (0.9)", with the count where folds are missing; "" without any."""
    if not values:
        return ""
    text = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        deviation = 100 * statistics.stdev(values)
        text += f" ± {deviation:.1f} ({deviation / len(values) ** 0.5:.1f})"
    return text if len(values) == N_FOLDS else f"{text}, {len(values)} of {N_FOLDS} folds"


def _row(name: str, method: str, title: str, folds: list[Mapping[str, Any]]) -> str:
    mine = [f for f in folds if f["data"] == name and f["method"] == method]
    published = [f["best_test_accuracy"] for f in mine if f["protocol"] == "published"]
    honest = [f["test_accuracy"] for f in mine if f["protocol"] == "honest"]
    parameters = f"{mine[0]['parameters']:,}" if mine else ""
    timed = [f for f in mine if f["protocol"] == "published"] or mine
    seconds = f"{sum(f['cpu_seconds'] for f in timed) / len(timed):.0f}" if timed else ""
    memory = f"{max(f['peak_memory_mib'] for f in timed):.0f}" if timed else ""
    figure = PUBLISHED.get((name, method), "")
    cells = [name, title, figure, cell(published), cell(honest), parameters, seconds, memory]
    return "| " + " | ".join(cells) + " |"


def write_notes(folds: dict[str, Any], results: Path) -> None:
    """Put the tables where the bundled checkpoints' cards and the reader find them."""
    for name in sorted({fold["data"] for fold in folds.values()}):
        folder = checkpoints_root() / f"ignn-{name.lower()}-upg"
        if folder.is_dir():
            text = render_notes(folds, name)
            replace_text(folder / "notes.md", text)
            seal(folder / "notes.md")
    folders = [
        config.parent
        for config in sorted(checkpoints_root().glob("ignn-*/config.json"))
        if read_json(config)["architectures"] == ["IGNNForNodeClassification"]
    ]
    if folders:
        replace_text(results / "nodes.md", render_nodes(folders))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the graph data sets")
    add("--output", type=Path, default=Path("runs/ignn/table"), help="folder of the folds' files")
    add(
        "--results",
        type=Path,
        default=Path(__file__).parent,
        help="folder of results.json and table.md; its folds count as done",
    )
    recipe = ROOT / "recipes" / "ignn-cox2-upg.yaml"
    add("--recipe", type=Path, default=recipe, help="of the training; that of COX2")
    add("--sets", default="COX2,PROTEINS", help="data sets, separated by commas")
    add("--methods", default="all", help="gradients, separated by commas, or all")
    add("--protocols", default="published,honest", help="protocols, separated by commas")
    add("--processes", type=int, default=2, help="folds trained at the same time")
    add("--render", action="store_true", help="train nothing")
    a = parser.parse_args(arguments)
    try:
        fill(a)
    except UserError as error:
        print(f"table.py: {error}", file=sys.stderr)
        sys.exit(2)


def fill(a: argparse.Namespace) -> None:
    """Train the folds that are missing, and print the table."""
    stored = a.results / "results.json"
    methods = tuple(METHODS) if a.methods == "all" else tuple(a.methods.split(","))
    jobs = all_jobs(a.sets.split(","), methods, a.protocols.split(","))
    if not a.render:
        recipe = load_recipe(a.recipe)
        for job, result in run_table(a.data, a.output, jobs, recipe, stored, a.processes):
            print(f"{job.key}: {result['seconds']:.0f} s", file=sys.stderr)
    folds = collect(a.output, stored)
    if not folds:
        raise UserError(f"no finished folds in {a.output} or {stored}")
    write_table(folds, a.results)
    if a.results == Path(__file__).parent:  # the settings of the bundled checkpoints
        write_notes(folds, a.results)
    print((a.results / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""The graph table: ten folds of every data set, gradient and protocol, resumable fold by fold.

    python benchmarks/ignn/table.py --data ROOT --recipe recipes/ignn-table.yaml --processes 2

Each finished fold is one JSON file in the output folder; folds that have one, there or in the
results file of an earlier run, are not trained again. Every fold runs in a process of its own, so
that peak memory is the fold's.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deqzoo.data.graphs import (
    N_FOLDS,
    Fold,
    GraphSet,
    honest_folds,
    load_graph_set,
    published_folds,
)
from deqzoo.errors import UserError
from deqzoo.files import replace_text, replacing
from deqzoo.sealed import record as seal
from deqzoo.training.graphs import METHODS, FoldRecord, FoldRun, FoldSettings
from deqzoo.zoo import checkpoints_root, read_json

DATA_SETS = ("COX2", "PROTEINS")
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
    settings: FoldSettings | None = None,
    results: str | Path | None = None,
    processes: int = 1,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Train every job that has no result yet, and yield each result as it comes.

    Args:
        root: folder of the data sets.
        output: folder for one JSON file per fold, and for the checkpoints of fold 0.
        jobs: what to train, see `all_jobs`.
        settings: of the training.
        results: a file that `collect` wrote; its folds count as done.
        processes: folds trained at the same time, with one thread each.

    Raises:
        UserError: a fold that is done was trained with other settings.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    settings = settings or FoldSettings()
    done = collect(output, results)
    waiting = [job for job in jobs if job.key not in done]
    for job in jobs:
        if job.key in done and done[job.key]["settings"] != asdict(settings):
            raise UserError(
                f"{job.key} was trained with other settings; name folders without it "
                "with --output and --results"
            )
    sets = {name: load_graph_set(name, root) for name in {job.data for job in waiting}}
    tasks = [(sets[job.data], job, settings, output) for job in waiting]
    # A fork shares the loaded data and libraries; this process has never run autograd threads.
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_run_job, tasks)


def _run_job(task: tuple[GraphSet, Job, FoldSettings, Path]) -> tuple[Job, dict[str, Any]]:
    data, job, settings, output = task
    torch.set_num_threads(1)
    run = FoldRun(data, fold_of(data, job), job.method, settings, job.fold)
    result = summarize(job, run.run(), settings)
    if job.protocol == "honest" and job.fold == 0:
        save_checkpoint(run, data, job, result, output / "checkpoints" / job.key)
    replace_text(output / f"{job.key}.json", json.dumps(result))
    return job, result


def fold_of(data: GraphSet, job: Job) -> Fold:
    """Return the indices that a job trains, validates and tests on."""
    folds = published_folds if job.protocol == "published" else honest_folds
    return folds(data.labels)[job.fold]


def summarize(job: Job, record: FoldRecord, settings: FoldSettings) -> dict[str, Any]:
    """Return a fold's figures by both rules of choosing the epoch, and its curves, rounded."""
    curves = {k: [round(x, 5) for x in v] for k, v in asdict(record).items() if isinstance(v, list)}
    result = {
        **asdict(job),
        "settings": asdict(settings),
        "best_test_accuracy": max(record.test_accuracy),
        "best_epoch": record.test_accuracy.index(max(record.test_accuracy)) + 1,
        "last_test_accuracy": record.test_accuracy[-1],
        "parameters": record.parameters,
        "seconds": round(record.seconds, 2),
        "evaluation_seconds": round(record.evaluation_seconds, 2),
        "cpu_seconds": round(record.cpu_seconds, 2),
        "peak_memory_mib": round(record.peak_memory_mib, 1),
        "curves": curves,
    }
    if record.validation_accuracy:
        epoch = record.chosen_epoch
        result["chosen_epoch"] = epoch + 1
        result["validation_accuracy"] = record.validation_accuracy[epoch]
        result["test_accuracy"] = record.chosen_test_accuracy
    return result


def save_checkpoint(
    run: FoldRun, data: GraphSet, job: Job, result: dict[str, Any], folder: Path
) -> None:
    """Write the weights of the chosen epoch, and beside them the fold's indices and figures."""
    fold = fold_of(data, job)
    content = {
        "data": data.name,
        "protocol": job.protocol,
        "fold": job.fold,
        "method": job.method,
        **{key: result[key] for key in ("chosen_epoch", "validation_accuracy", "test_accuracy")},
        "settings": asdict(run.settings),
        "train": fold.train,
        "validation": fold.validation,
        "test": fold.test,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as fresh:
        run.model.eval().save_pretrained(fresh)  # holds the chosen epoch since the run's end
        (fresh / "fold.json").write_text(json.dumps(content) + "\n")


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
    ("PPI", "implicit"): "97.6",
    ("PPI", "upg-5-0.5"): "98.2",
    ("PPI", "upg-5-1.0"): "96.2",
}
"""Geng et al., On Training Implicit Models, NeurIPS 2021: accuracy over ten folds; PPI Micro-F1."""

TITLES = {
    "implicit": "Implicit",
    "upg-5-0.5": "UPG k=5 λ=0.5",
    "upg-5-1.0": "UPG k=5 λ=1.0",
    "npg-5-0.5": "NPG k=5 λ=0.5",
}
_LEGEND = """\
Accuracy in %, mean ± standard deviation (of the ten folds, ddof 0). "Published protocol" repeats
the published code: folds stratified by labels in the wrong order, no validation part, and for each
fold the best test accuracy of 200 epochs, evaluated with A + A^T: a figure chosen on the test data.
"Honest protocol": properly stratified folds, 8 parts to train, 1 to choose the epoch, 1 to test.
A count such as (3/10) marks a cell whose folds are not all done.
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
            rows.append(_row(name, method, title, list(folds.values())))
    for method in ("implicit", "upg-5-0.5", "upg-5-1.0"):
        figure = PUBLISHED["PPI", method]
        rows.append(f"| PPI | {TITLES[method]} | {figure} (Micro-F1) | not measured | | | | |")
    return f"# IGNN on graphs\n\n{_LEGEND}\n{_COLUMNS}" + "\n".join(rows) + "\n" + _TAIL


def render_notes(folds: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Return the rows of one data set, for the card of its checkpoint."""
    rows = [_row(name, method, title, list(folds.values())) for method, title in TITLES.items()]
    return f"### Ten folds of {name}\n\n{_LEGEND}\n{_COLUMNS}" + "\n".join(rows) + "\n"


def render_nodes(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of node classifiers, from the run records of checkpoints by name."""
    rows = []
    for name, record in sorted(records.items()):
        recipe = record["recipe"]
        key = next(k for k in ("auc", "micro_f1", "accuracy") if k in record["test"])
        gradient = recipe["model"].get("gradient", {}).get("name", "upg")
        figures = [f"{100 * record[split][key]:.1f}" for split in ("validation", "test")]
        # Records of earlier versions say "steps".
        steps = f"{record['test'].get('n_steps_mean', record['test'].get('steps')):.0f}"
        cpu = f"{record['cpu_seconds']:.0f}"
        title = {"auc": "AUC", "micro_f1": "Micro-F1", "accuracy": "accuracy"}[key]
        rows.append(
            f"| {name} | {recipe['data']} | {gradient} | {title} | {' | '.join(figures)} | "
            f"{steps} | {cpu} |"
        )
    return _NODE_HEAD + "\n".join(rows) + "\n"


def cell(values: list[float]) -> str:
    """Return "84.1 ± 2.9", with the count where folds are missing; "" without any."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    text = f"{100 * mean:.1f} ± {100 * deviation:.1f}"
    return text if len(values) == N_FOLDS else f"{text} ({len(values)}/{N_FOLDS})"


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
    runs = sorted(checkpoints_root().glob("ignn-*/run.json"))
    if runs:
        text = render_nodes({run.parent.name: read_json(run) for run in runs})
        replace_text(results / "nodes.md", text)


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
    add("--recipe", type=Path, help="settings of the training; recipes/ignn-table.yaml")
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
    settings = FoldSettings.read(a.recipe) if a.recipe else None
    if not a.render:
        for job, result in run_table(a.data, a.output, jobs, settings, stored, a.processes):
            print(f"{job.key}: {result['seconds']:.0f} s", file=sys.stderr)
    folds = collect(a.output, stored)
    if not folds:
        raise UserError(f"no finished folds in {a.output} or {stored}")
    write_table(folds, a.results)
    write_notes(folds, a.results)
    print((a.results / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""The graph table: ten folds of every data set, gradient and protocol, resumable fold by fold.

Each finished fold is one JSON file in the output folder; folds that have one, there or in a results
file of an earlier run, are not trained again. Every fold runs in a process of its own, so that peak
memory is the fold's.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
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
from deqzoo.training.graphs import METHODS, FoldRecord, FoldRun, FoldSettings

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

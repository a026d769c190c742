"""Ten minutes of one rented GPU: a trial of every stage, a run, its evaluation, costs of gradients.

    python benchmarks/one_gpu.py trial RECIPE... --data DATA
    python benchmarks/one_gpu.py run RECIPE... --data DATA --output OUT --deadline 9m [--shares 2 1]

Needs this checkout, torch and transformers, pyarrow and Pillow to read the data, and neither an
installation nor `hub_configs`. DATA is the folder of a data set, or several folders and archives
that hold its parts. `trial` compiles and times each stage for 15 seconds and says what fell back;
kernels that it compiled are found again by `run` where TORCHINDUCTOR_CACHE_DIR names the same
folder. `run` leaves in OUT, in files of at most 16 MiB: `run.tar` in parts (`cat run.tar.* | tar
x`: model, record, `metrics.jsonl`), `evaluation.json` of the test split, and `costs.json` as far
as the time goes: forward and backward of every gradient on the official models
(`benchmarks/studies/cost.py`). What is not done by the deadline is left out, said. Several recipes
run one after another, in folders of their names, in shares of the time; one that fails does not
keep the others from theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import platform
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

from deqzoo.recipe import Recipe, load_recipe, seconds_of  # noqa: E402
from deqzoo.training.run import device_name, run_recipe  # noqa: E402

PART = 15 * 2**20
"""Bytes of a part of `run.tar`."""
OVERHEAD = 45.0
"""Seconds of a run that do not train: loading, compiling what was compiled before, validation."""
STARTED = time.monotonic()


def say(text: str) -> None:
    """One line with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def fail(text: str) -> NoReturn:
    """End with one line."""
    print(f"one_gpu.py: {text}", file=sys.stderr)
    sys.exit(2)


def describe_machine() -> None:
    """What runs here."""
    say(f"python {platform.python_version()}, torch {torch.__version__}, ")
    say(f"transformers {transformers.__version__}, {device_name()}")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        say(f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU memory free")


def trial(recipe: Recipe, data: Path | None, folder: Path, seconds: float) -> None:
    """Every stage for a while, from fresh weights; prints its speed and what fell back."""
    stages = tuple(dataclasses.replace(stage, epochs=1.0) for stage in recipe.stages)
    short = dataclasses.replace(
        recipe,
        stages=stages,
        time_budget=f"{seconds * len(stages)}s",
        evaluation=dataclasses.replace(recipe.evaluation, samples=500, snapshots=0),
    )
    shutil.rmtree(folder, ignore_errors=True)
    run_recipe(short, data, folder, progress=False)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        print(line)


def run(recipe: Recipe, data: Path | None, folder: Path, out: Path, deadline: float) -> None:
    """Train until a time after the start, pack what is to be kept, evaluate on the test split."""
    out.mkdir(parents=True, exist_ok=True)
    left = deadline - (time.monotonic() - STARTED)
    seconds = min(seconds_of(recipe.time_budget or "1h", "time_budget"), max(1.0, left - OVERHEAD))
    recipe = dataclasses.replace(recipe, time_budget=f"{seconds:.0f}s")
    say(f"{recipe.name}: {seconds:.0f} s of training")
    model = run_recipe(recipe, data, folder, progress=True, deadline=left)
    say("trained")
    pack(folder, model, out)
    say("packed")
    left = deadline - (time.monotonic() - STARTED)
    if left > 20:
        with within(left - 5, "evaluation"):
            evaluate(model, recipe.name, data, out)


def pack(folder: Path, model: Path, out: Path) -> None:
    """Weights, record and log lines in parts of a tar archive."""
    archive = folder / "run.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(model, arcname="model")
        for name in ("record.json", "metrics.jsonl"):
            tar.add(folder / name, arcname=name)
    content = archive.read_bytes()
    for number, start in enumerate(range(0, len(content), PART)):
        (out / f"run.tar.{number}").write_bytes(content[start : start + PART])


def run_all(
    recipes: list[Recipe], shares: list[float], data: Path | None, options: argparse.Namespace
) -> int:
    """Every recipe in its share of the time; the number of those that failed."""
    deadline = seconds_of(options.deadline, "--deadline")
    failed = 0
    for number, recipe in enumerate(recipes):
        alone = len(recipes) == 1
        folder = options.work if alone else options.work / recipe.name
        out = options.output if alone else options.output / recipe.name
        begun = time.monotonic() - STARTED
        ends = begun + (deadline - begun) * shares[number] / sum(shares[number:])
        try:
            run(recipe, data, folder, out, ends)
        except Exception:  # a rented machine is not given back for one of several runs
            failed += 1
            traceback.print_exc()
            say(f"{recipe.name}: failed")
        gc.collect()
    left = deadline - (time.monotonic() - STARTED)
    if left > 30:
        costs(options.output, left - 10)
    return failed


def evaluate(model: Path, name: str, data: Path | None, out: Path) -> None:
    """The evaluation file of the test split."""
    from deqzoo.evaluation.dispatch import evaluate_model
    from deqzoo.models.auto import DEQModel

    network = DEQModel.from_pretrained(model)
    if torch.cuda.is_available():
        network = network.cuda()
        torch.backends.cudnn.benchmark = False  # batch sizes change as samples converge
    content = evaluate_model(network, name, split="test", data=data, budget_samples=0)
    (out / "evaluation.json").write_text(json.dumps(content, indent=1))
    say(json.dumps(content["results"])[:400])


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Stop what is inside when its time is over, with a line that says so."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    except TimeoutError:
        say(f"{what}: stopped, the time was over")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def gather(parts: list[Path], folder: Path) -> Path:
    """One folder of data that came in parts: parquet files are linked, archives unpacked."""
    if len(parts) == 1 and parts[0].is_dir():
        return parts[0]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in parts:
        if part.is_file():
            shutil.unpack_archive(
                part, folder, **({"filter": "data"} if tarfile.is_tarfile(part) else {})
            )
            continue
        if not part.is_dir():
            fail(f"there is no {part}")
        for file in part.rglob("*.parquet"):
            link = folder / file.relative_to(part)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    say(f"data: {len(files)} files of {size / 2**20:.0f} MiB in {folder}")
    return folder


def costs(out: Path, seconds: float) -> None:
    """Times of every gradient on the official models, cell by cell until the time is over."""
    out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(Path(__file__).resolve().parent / "studies"))
    import cost

    ends = time.monotonic() + seconds
    cells: dict[str, object] = {}
    for preset, (_, _, backward_steps, _) in cost.MODELS.items():
        for mode in cost.modes(backward_steps):
            began = time.monotonic()
            cells[f"{preset}: {mode}"] = cost.cell(preset, mode, torch.get_num_threads())
            gc.collect()
            (out / "costs.json").write_text(json.dumps({"missing": [], "cells": cells}, indent=1))
            if time.monotonic() + 2 * (time.monotonic() - began) > ends:
                say(f"costs: {len(cells)} cells, then the time was over")
                return
    say(f"costs: all {len(cells)} cells")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("trial", "run"))
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, nargs="+", help="folder of the data set, or parts")
    parser.add_argument("--output", type=Path, default=Path("one_gpu"), help="what is kept")
    parser.add_argument("--work", type=Path, default=Path("runs/one_gpu"), help="folder of the run")
    parser.add_argument("--time-budget", help="of training, over the recipe's")
    parser.add_argument("--deadline", default="1h", help="by which everything is written")
    parser.add_argument("--shares", type=float, nargs="+", help="of the time, one per recipe")
    parser.add_argument("--seconds", type=float, default=15.0, help="trial: of each stage")
    options = parser.parse_args()
    missing = [name for name in ("pyarrow", "PIL") if importlib.util.find_spec(name) is None]
    if missing:
        fail("the data need more packages: pip install pyarrow pillow")
    describe_machine()
    recipes = [load_recipe(path) for path in options.recipes]
    if options.time_budget:
        recipes = [dataclasses.replace(r, time_budget=options.time_budget) for r in recipes]
    shares = options.shares or [1.0] * len(recipes)
    if len(shares) != len(recipes) or min(shares) <= 0:
        fail(f"--shares needs {len(recipes)} positive numbers, one per recipe")
    data = gather(options.data, options.work.with_name("data")) if options.data else None
    if options.what == "trial":
        for recipe in recipes:
            trial(recipe, data, options.work, options.seconds)
        return
    sys.exit(1 if run_all(recipes, shares, data, options) else 0)


if __name__ == "__main__":
    main()

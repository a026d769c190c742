"""A list of recipes worked through in order, for days if need be, resumable at any kill.

python recipes/work.py --data DATA --status    # what is done, running and left
python recipes/work.py --data DATA             # go on
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deqzoo.errors import UserError
from deqzoo.recipe import Recipe, load_recipe, recorded_recipe, with_seed
from deqzoo.zoo import checkpoints_root


def is_locked(out: Path) -> bool:
    """Whether a process is training in this folder."""
    try:
        with (out / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@dataclass(frozen=True)
class Entry:
    """One line of a queue.

    Attributes:
        path: of the recipe.
        recipe: the recipe itself, with the seed of this entry.
        data: folder of its data set below the data root.
        target: what the run is meant to reach, for people to read.
        seed: in place of the recipe's, or None.
    """

    path: Path
    recipe: Recipe
    data: str | None
    target: str
    seed: int | None = None

    @property
    def name(self) -> str:
        """The recipe's name, and the seed where one is given; it names the run's folder."""
        return self.recipe.name


def load_queue(path: str | os.PathLike[str]) -> list[Entry]:
    """Read a queue: a list of mappings with `recipe` and, as one likes, `data`, `seed`, `target`.

    Raises:
        UserError: the file or one of its recipes is missing or wrong.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read queue {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"queue {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UserError(f"queue {path} must be a list of mappings with the key recipe")
    entries = []
    for item in content:
        unknown = set(item) - {"recipe", "data", "seed", "target"}
        seed = item.get("seed")
        texts = [item.get("recipe"), item.get("data", "")]
        if (
            unknown
            or not all(isinstance(text, str) for text in texts)
            or not (seed is None or isinstance(seed, int))
        ):
            raise UserError(
                f"queue {path}: entries have the keys recipe, data, seed (a whole number), "
                f"target; got {item}"
            )
        recipe_path = path.parent / item["recipe"]
        recipe = load_recipe(recipe_path)
        if seed is not None:
            recipe = with_seed(recipe, seed)
        entries.append(
            Entry(
                recipe_path,
                recipe,
                item.get("data"),
                str(item.get("target", "")),
                seed,
            )
        )
    return entries


def status(entry: Entry, runs: Path) -> dict[str, Any]:
    """State of an entry: done, running, begun, changed or waiting; PFLOP spent and hours left.

    A run whose folder was lost is done if its result is among the bundled checkpoints. `changed`:
    its folder holds a run of the recipe as it was before it was edited.
    """
    folder = runs / entry.name
    record = _record(folder / "record.json")
    changed = bool(record) and not _same(recorded_recipe(record), entry.recipe)
    if changed or not record:
        record = _stored(entry)
    spent, seconds = record.get("pflop", 0.0), record.get("seconds", 0.0)
    inherited = record.get("pflop_inherited", 0.0)
    total = left = None
    if record:
        own = spent - inherited
        total = inherited + own / max(record.get("steps", 0) / record["total_steps"], 1e-9)
        if own:
            left = (total - spent) * seconds / own / 3600
    if record.get("finished"):
        state = "done"
    elif is_locked(folder):
        state = "running"
    elif changed:
        state = "changed"
    else:
        state = "begun" if record else "waiting"
    return {
        "name": entry.name,
        "state": state,
        "pflop": round(spent, 4),
        "pflop_total": None if total is None else round(total, 3),
        "hours_left": None if left is None else round(left, 2),
        "budget_pflop": entry.recipe.budget_pflop,
        "target": entry.target,
    }


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _stored(entry: Entry) -> dict[str, Any]:
    """Record of the bundled checkpoint that this entry gave, or that was trained on from it."""
    own = _record(checkpoints_root() / entry.name / "training.json")
    if own.get("recipe", {}).get("name") == entry.name:
        # What was trained on from an earlier run of this recipe does not stand for this one.
        return own if own.get("finished") and _same(recorded_recipe(own), entry.recipe) else {}
    for path in sorted(checkpoints_root().glob("*/training.json")):
        record = _record(path)
        recipe = recorded_recipe(record)
        if recipe is None or not record.get("finished"):
            continue
        if _same(recipe, entry.recipe) or entry.name in _ancestors(recipe, entry.path.parent):
            return record
    return {}


def _same(recorded: Recipe | None, recipe: Recipe) -> bool:
    """Whether two recipes are one; weights to start from may be named by run or by checkpoint."""
    if recorded is None:
        return False
    model = dataclasses.replace(recorded.model, start=recipe.model.start)
    same_start = recorded.model.parent == recipe.model.parent
    return same_start and dataclasses.replace(recorded, model=model) == recipe


def _ancestors(recipe: Recipe, folder: Path) -> list[str]:
    """Names of the recipes that one was trained on from, as far as they are files of the folder."""
    names: list[str] = []
    while recipe.model.parent and recipe.model.parent not in names:
        names.append(recipe.model.parent)
        path = folder / f"{names[-1]}.yaml"
        if not path.is_file():
            break
        recipe = load_recipe(path)
    return names


def render(entries: list[Entry], runs: Path) -> str:
    """The queue as a table."""
    lines = [f"{'':<9}{'recipe':<36}{'PFLOP':>16}{'hours left':>12}  target"]
    for entry in entries:
        row = status(entry, runs)
        total = "?" if row["pflop_total"] is None else f"{row['pflop_total']:.2f}"
        hours = "?" if row["hours_left"] is None else f"{row['hours_left']:.1f}"
        lines.append(
            f"{row['state']:<9}{row['name']:<36}{row['pflop']:>8.3f} / {total:<5}{hours:>12}  "
            f"{row['target']}"
        )
    return "\n".join(lines)


def work(
    entries: list[Entry],
    runs: Path,
    data: Path | None,
    threads: int,
    accept_changes: bool = False,
) -> None:
    """Train what is left, one recipe after another, each in a process of its own.

    Raises:
        UserError: a run failed, or its folder holds a run of another recipe; the others that
            follow are not started, since order is value.
    """
    by_name = {entry.name: entry for entry in entries}
    for entry in entries:
        state = status(entry, runs)["state"]
        if state in ("done", "running"):
            continue
        parent = by_name.get(entry.recipe.model.parent)
        if parent is not None and status(parent, runs)["state"] == "running":
            print(f"{entry.name}: passed over, it starts from {parent.name}, which is running")
            continue
        if state == "changed":
            raise UserError(
                f"{runs / entry.name} holds a run of {entry.path} before it was edited; remove or "
                "rename the folder to train the recipe as it is now"
            )
        command = [
            *(sys.executable, "-m", "deqzoo", "train", str(entry.path), "--resume"),
            *("--output", str(runs / entry.name)),
        ]
        if data is not None and entry.data is not None:
            command += ["--data", str(data / entry.data)]
        if accept_changes:
            command.append("--accept-changes")
        if entry.seed is not None:
            command += ["--seed", str(entry.seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        print(f"{entry.name}: {' '.join(command[1:])}", flush=True)
        process = subprocess.Popen(command, env=environment, preexec_fn=_lowest_priority)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        if code and status(entry, runs)["state"] in ("done", "running"):
            # It shows only once a process has loaded everything that its run is under way.
            print(f"{entry.name}: passed over, another process trains or has trained it")
            continue
        if code:
            raise UserError(f"{entry.name} ended with exit code {code}; see its output above")


def _lowest_priority() -> None:
    """Run in the child: give way to everything else on the machine.

    Linux shares the CPU among sessions first (autogroups), so that niceness alone would not make
    a run in the background give way to work in another terminal.
    """
    os.setsid()
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = Path(__file__).with_name("QUEUE.yaml")
    parser.add_argument("queue", type=Path, nargs="?", default=own, help="QUEUE.yaml by default")
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--status", action="store_true", help="print what is done and left")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--accept-changes", action="store_true", help="as of deqzoo train")
    a = parser.parse_args()
    try:
        entries = load_queue(a.queue)
        print(render(entries, a.output))
        if not a.status:
            work(entries, a.output, a.data, a.threads, a.accept_changes)
            print(render(entries, a.output))
    except UserError as error:
        print(f"work.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

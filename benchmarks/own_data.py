"""Data of one's own, with default settings: trained, measured, used, published and fetched again.

    python benchmarks/own_data.py pictures --imagenette DIR
    python benchmarks/own_data.py text
    python benchmarks/own_data.py graphs
    python benchmarks/own_data.py --render

`pictures` are three folders of twenty photographs each from Imagenette's training split, `text`
is Python's help on its own language, `graphs` a saved list of PyG graphs: rings, paths and stars.
Every step is a command of the command line. The Hub is a stand-in on the loopback. What the
commands printed goes to `results/own_data-KIND.json`, and from there to `own_data.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CLASSES = ("church", "French horn", "golf ball")
EACH = 20
PROGRESS = re.compile(r"[^|]*%\|")
KINDS = ("pictures", "text", "graphs")


def module(path: Path) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def write_pictures(folder: Path, imagenette: str) -> None:
    """A folder per class, as a user would have them."""
    from deqzoo.data.image_sets import IMAGENETTE, load_imagenette

    pictures = load_imagenette("train", imagenette, size=160)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        rows = (pictures.labels == IMAGENETTE.classes.index(name)).nonzero().flatten()[:EACH]
        for number, row in enumerate(rows.tolist()):
            pictures.picture(row).save(folder / name / f"{number:02}.png")


def steps_of(kind: str, imagenette: str) -> list[tuple[str, str]]:
    """Make the data in the working directory; titles and commands."""
    own, repository = f"my-{kind}", f"org/my-{kind}"
    if kind == "pictures":
        data, base, use = "pictures/", "mdeq-tiny-cifar-upg", "classify pictures/church/00.png"
        write_pictures(Path("pictures"), imagenette)
        used = f"{use} --model {own}", f"{use} --model {repository}"
    elif kind == "text":
        data, base = "python-help.txt", "deq-transformer-ptb-upg"
        module(ROOT / "examples" / "own_text.py").write_text(Path(data), 60_000)
        used = f"perplexity {data} --model {own}", f"perplexity {data} --model {repository}"
    else:
        data, base = "graphs.pt", "ignn-proteins-upg"
        module(ROOT / "examples" / "own_graphs.py").make_graphs(Path(data), 60)
        used = f"predict-graphs {own} {data}", f"predict-graphs {repository} {data}"
    extend = " --tokenizer extend" if kind == "text" else ""
    return [
        ("Train", f"finetune {base} --data {data} --output {own}{extend} --quiet"),
        ("Measure again", f"evaluate {own} --data {data}"),
        ("Use", used[0]),
        ("Publish", f"publish {own} --repo-id {repository}"),
        ("Use what was published", used[1]),
    ]


def run(kind: str, imagenette: str) -> None:
    """All commands of a kind of data, in a folder of its own; writes the record."""
    hub_double = module(ROOT / "tests" / "hub" / "hub_double.py")
    server = hub_double.HubDouble()
    record = []
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for title, command in steps_of(kind, imagenette):
            environment = os.environ | {"HF_HOME": f"{scratch}/home", "PYTHONPATH": str(ROOT)}
            if title == "Publish" or command.count("org/"):
                environment |= {
                    "HF_ENDPOINT": server.url, "HF_TOKEN": hub_double.TOKEN,
                    "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                }  # fmt: skip
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [sys.executable, "-m", "deqzoo", *command.split()],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            text = done.stdout.replace(f"{scratch}/", "").replace(server.url, "http://hub")
            shown = [line.rstrip() for line in text.splitlines() if not PROGRESS.match(line)]
            print(f"$ deqzoo {command}", *shown, f"({seconds:.0f} CPU s)", sep="\n", flush=True)
            if done.returncode:
                sys.exit(f"own_data.py: the command ended with {done.returncode}")
            record.append(
                {
                    "title": title,
                    "command": f"deqzoo {command}",
                    "output": list(filter(None, shown)),
                    "cpu_seconds": round(seconds, 1),
                }
            )
        training = json.loads(Path(f"my-{kind}", "run.json").read_text(encoding="utf-8"))
        published = sorted(server.files(f"org/my-{kind}"))
    content = {"kind": kind, "steps": record, "run": training, "published": published}
    file = HERE / "results" / f"own_data-{kind}.json"
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render() -> str:
    """The report of all kinds."""
    parts = [
        "# Data of one's own\n",
        "What `benchmarks/own_data.py` did and what its commands printed, with default settings, "
        "on one thread of a CPU. The Hub is a stand-in on the loopback.\n",
    ]
    for kind in KINDS:
        file = HERE / "results" / f"own_data-{kind}.json"
        if not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        run, title = content["run"], kind.capitalize()
        parts.append(f"## {title}\n")
        parts.append(
            f"{run['samples']} to learn, {run['held_out']} to choose the weights, "
            f"{run['measured']} to measure; {run['steps']} optimiser steps.\n"
        )
        for step in content["steps"]:
            output = step["output"]
            if len(output) > 14:
                output = [*output[:6], "...", *output[-4:]]
            parts.append(f"{step['title']}, {step['cpu_seconds']:.0f} CPU seconds:\n")
            parts.append("\n".join(["```text", f"$ {step['command']}", *output, "```", ""]))
        parts.append(f"Published: {', '.join(content['published'])}.\n")
    return "\n".join(parts)


def main() -> None:
    """Run a kind, or render what was run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("--imagenette", default="", help="local copy of Imagenette")
    parser.add_argument("--render", action="store_true")
    settings = parser.parse_args()
    if settings.kind is not None:
        run(settings.kind, os.path.abspath(settings.imagenette))
    if settings.render:
        (HERE / "own_data.md").write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()

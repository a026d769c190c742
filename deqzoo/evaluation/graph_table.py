"""Renders the graph table: cells of the folds that are done, beside the published figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deqzoo.files import replace_text

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
N_FOLDS = 10
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
and a converter exist. Written by `deqzoo ignn-table --data ROOT`.
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

"""Model cards and README's table, rendered from the checkpoints' own files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from deqzoo.errors import UserError
from deqzoo.evaluation.chart import line_chart
from deqzoo.hub import training_curve
from deqzoo.hub.card_texts import (
    CONVERTED,
    DATA_TEXTS,
    EQUILIBRIUM,
    FAMILY_TEXTS,
    NAME_PLACE,
    PAPERS,
    PICTURE_LIMITS,
    TASK_LIMITS,
    TASK_USES,
    data_title,
)
from deqzoo.hub.catalogue import (
    Entry,
    below_baseline,
    entries,
    main_value,
    rank,
    results_csv,
    short_count,
)
from deqzoo.hub.integrity import NOTES
from deqzoo.hub.metadata import measuring_command, metadata, own_repository
from deqzoo.tasks.metrics import METRICS, words
from deqzoo.zoo import checkpoints_root

#: What a card's first picture may be, the most telling first, with its description.
PICTURES = {
    "budget": "quality against solver steps: effort is a dial",
    "training": "quality against compute",
}
IMPORTING = (
    "Importing `deqzoo` makes the Auto classes and pipelines of transformers know this model; "
    "without it they refuse the model type. No remote code is involved."
)
#: Baselines as README's table calls them.
BASELINE_NAMES = {"majority": "most frequent class", "constant_micro_f1": "best constant answer"}

#: Labels of record entries whose names say too little.
_LABELS = {
    "validation_accuracy": "validation accuracy in training, by which the epoch was chosen",
    "total_steps": "steps planned",
    "training_seconds": "seconds of training",
    "time_budget_seconds": "seconds of training planned",
    "tflops": "TFLOP/s",
    "floor_tflops": "TFLOP/s of a bare matrix product",
    "floor_share": "share of it",
    "peak_memory_mib": "peak memory, MiB",
    "gpu_peak_memory_mib": "peak memory of the GPU, MiB",
}
#: Settings of solvers and gradients; by name where a setting is missing here.
_SETTINGS = {
    "name": "`{}`",
    "max_steps": "at most {} steps",
    "steps": "{} steps",
    "tol": "tolerance {:g}",
    "stop_mode": "of the {} residual",
    "solver": "adjoint by {}",
}
_STOPS = {"rel": "relative", "abs": "absolute"}
#: Entries of a record that every part of a run counts from zero.
_OF_A_PART = ("steps", "total_steps", "epochs", "seconds", "peak_memory_mib")
_PLAIN = re.compile(r"[\w./~-]+")
_TABLE_BEGIN, _TABLE_END = "<!-- models:begin -->", "<!-- models:end -->"


def snippet(entry: Entry, repository: str | None = None) -> str:
    """The card's example; it runs as it stands where a file picture.png exists.

    Args:
        entry: the checkpoint.
        repository: or folder that the example loads; the zoo's own by default.
    """
    name = repository or own_repository(entry)
    # A quoted literal, so that no folder's name can be read as code.
    literal = f'"{name}"' if _PLAIN.fullmatch(name) else repr(name)
    return FAMILY_TEXTS[entry.config["model_type"]].snippet.replace(NAME_PLACE, literal)


def render_card(entry: Entry, repository: str | None = None) -> str:
    """The README of a checkpoint's repository, metadata first.

    Args:
        entry: the checkpoint.
        repository: on the Hub, which examples and commands name; the zoo's own by default.
    """
    family = FAMILY_TEXTS[entry.config["model_type"]]
    plot_files = plots(entry)
    picture = next((f"{entry.name}-{kind}.svg" for kind in PICTURES
                    if f"{entry.name}-{kind}.svg" in plot_files), None)  # fmt: skip
    sections = [
        f"# {entry.name}",
        _summary(entry),
        *([_image(picture, PICTURES[picture.rsplit("-", 1)[1][:-4]])] if picture else []),
        f"```python\n# pip install deqzoo\n{snippet(entry, repository)}```",
        f"**Good for** {TASK_USES[entry.task]}",
        f"**Not for, and limits.** {_limits(entry)}",
        "## Results",
        *_results(entry, repository),
        "## More",
        _details("How it works, and its settings", f"{EQUILIBRIUM} {family.about}", IMPORTING,
                _model_table(entry)),
        *_data(entry),
        _details("Training", _training(entry)),
        _details(
            "Licence and citation",
            "Weights and code: Apache-2.0. The data sets keep their own terms. If you use this "
            "model, please cite",
            "```bibtex\n" + "\n".join(PAPERS[key] for key in family.papers) + "\n```",
        ),
    ]  # fmt: skip
    return f"---\n{metadata(entry)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _image(file: str, alt: str) -> str:
    """A picture, small enough for the text below it to be on the same screen."""
    return f'<img src="{file}" width="420" alt="{alt}">'


def _details(title: str, *parts: str) -> str:
    """A part of the card that a reader unfolds."""
    return "\n\n".join([f"<details>\n<summary>{title}</summary>", *parts, "</details>"])


def _summary(entry: Entry) -> str:
    """The main figure, the size, and what the equilibrium costs, in one paragraph."""
    evaluations = entry.tests() or list(entry.evaluations.values())
    size = f"{short_count(entry.parameters)} parameters, {entry.size / 2**20:.1f} MiB"
    if not evaluations:
        return f"Not evaluated yet; {size}."
    evaluation = evaluations[0]
    data, results = evaluation.get("data", {}), evaluation.get("results", {})
    fold = f", fold {data['fold']}" if "fold" in data else ""
    sample_count = f"{data['samples']:,} {data['unit']}" if "samples" in data else "samples"
    lines = [
        f"**{main_value(evaluation)}** on {data_title(data.get('name'))} "
        f"({data.get('split', '?')} split{fold}, "
        f"{sample_count}); {size}."
    ]
    beside = _beside(entry) if entry.tests() else ""
    if beside:
        lines.append(f"Beside it: {beside}.")
    if "converged_share" in results:
        budget = evaluation["model"]["solver"]["max_steps"]
        lines.append(
            f"{100 * results['converged_share']:.1f} % of the {data.get('unit', 'samples')} reach "
            f"their equilibrium within {budget} solver steps, in {results['n_steps_mean']:.1f} on "
            "average."
        )
        default_steps = (entry.config.get("solver") or {}).get("max_steps")
        if default_steps != budget:
            lines.append(f"(The default has since become {default_steps} steps.)")
    return " ".join(lines)


def render_converted_card(name: str) -> str:
    """The card of an official model that users convert themselves."""
    text = CONVERTED[name]
    family = FAMILY_TEXTS[text.family]
    data = ModelCardData(
        license="other",
        library_name="deqzoo",
        pipeline_tag=family.pipeline_tag,
        tags=["deep-equilibrium-model", text.family],
        language=family.language,
    )
    sections = [
        f"# {text.title}",
        f"{EQUILIBRIUM} {family.about}",
        f"The zoo does not ship these weights: their authors publish them ({text.source}), under "
        "their own terms. Convert them once:",
        f"```bash\n{text.command.format(name=name)}\n```",
        f"The file is read as data only (no code in it is run), and the folder `{name}` then loads "
        f'by `DEQModel.from_pretrained("{name}")` with the same outputs.',
        f"Published by the authors, not measured here: {text.figure}.",
        "## Limits and biases",
        f"{TASK_LIMITS[text.task]} {text.limits}",
        "## Citation",
        "```bibtex\n" + "\n".join(PAPERS[key] for key in text.papers) + "\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def budget_plot(entry: Entry) -> str | None:
    """Quality against solver steps of the test evaluation as SVG; None without that curve."""
    for evaluation in entry.tests():
        steps = (evaluation.get("budget") or {}).get("steps") or []
        if len(steps) > 1:
            metric = METRICS[evaluation["metric"]]
            scale = 100 if metric.share else 1
            points = [(row["max_steps"], scale * row[evaluation["metric"]]) for row in steps]
            values = [value for _, value in points]
            # A curve that is as good as flat should look so.
            spare = max(
                0.0, 0.05 * (100 if metric.share else max(values)) - max(values) + min(values)
            )
            return line_chart(
                {"": points},
                title=f"{entry.name}: {metric.words} against solver steps",
                x_label="solver steps",
                y_label=metric.words + (", %" if metric.share else ""),
                log_x=True,
                y_range=(min(values) - spare / 2, max(values) + spare / 2),
                x_ticks=[steps for steps, _ in points],
            )
    return None


def plots(entry: Entry) -> dict[str, str]:
    """SVG files that the card shows, by name."""
    svgs = {
        f"{entry.name}-budget.svg": budget_plot(entry),
        f"{entry.name}-training.svg": training_curve.draw(entry.name, entry.record, _metric(entry)),
    }
    return {file: plot for file, plot in svgs.items() if plot is not None}


def render_table() -> str:
    """README's table: one row per model that beats its baseline, by task, then the best first.

    Of models of the same size on the same data, which differ in how they were trained, the best has
    a row; those that beat no constant answer are named below.
    """
    tested_entries = [entry for entry in entries() if entry.tests()]
    good_entries = [entry for entry in tested_entries if not below_baseline(entry.tests()[0])]
    good_entries.sort(key=rank)
    kinds: dict[Any, list[Entry]] = {}
    for entry in good_entries:
        kinds.setdefault((_data_name(entry), entry.parameters), []).append(entry)
    rows = [
        (
            entry.task,
            _link(entry),
            short_count(entry.tests()[0]["model"]["parameters"]),
            _headline(entry),
            _beside(entry),
        )
        for entry, *_ in kinds.values()
    ]
    lines = [_table(("task", "model", "parameters", "result on the test split", "beside it"), rows)]
    other_links = [
        f"{_link(entry)} ({main_value(entry.tests()[0])})"
        for _, *others in kinds.values()
        for entry in others
    ]
    if other_links:
        lines.append(
            "Of the same size and data as one above, trained in another way: "
            f"{', '.join(other_links)}."
        )
    for entry in tested_entries:
        evaluation = entry.tests()[0]
        if below_baseline(evaluation):
            baseline = METRICS[evaluation["metric"]].baseline
            share = f"{100 * evaluation['results'][baseline]:.1f} %"
            lines.append(
                f"Kept to study, not to use: {_link(entry)}, {_headline(entry)}; "
                f"{words(baseline).partition(' of ')[2]} has {share}."
            )
    return "\n\n".join(lines)


def _data_name(entry: Entry) -> str:
    return entry.tests()[0].get("data", {}).get("name", "?")


def _link(entry: Entry) -> str:
    return f"[{entry.name}](model_cards/{entry.name}.md)"


def _headline(entry: Entry) -> str:
    """The main figure, what it was measured on, and the compute it took."""
    evaluation, name = entry.tests()[0], _data_name(entry)
    fold = f", fold {evaluation['data']['fold']}" if "fold" in evaluation["data"] else ""
    pflop = entry.record.get("pflop")
    compute = f"; {pflop:.2g} PFLOP" if pflop else ""
    return f"**{main_value(evaluation)}** on {data_title(name)}{fold}{compute}"


def _beside(entry: Entry) -> str:
    """What to compare the figure with: baselines and published results."""
    parts = []
    results, metric = entry.tests()[0]["results"], entry.tests()[0].get("metric")
    baseline = METRICS[metric].baseline if metric in METRICS else None
    if baseline is not None and baseline in results:
        parts.append(f"{BASELINE_NAMES[baseline]}: {100 * results[baseline]:.1f} %")
    text = DATA_TEXTS.get(_data_name(entry))
    if text is not None and text.beside:
        parts.append(text.beside)
    return "; ".join(parts)


def with_table(readme: str) -> str:
    """README's text with the table between its two marks renewed.

    Raises:
        UserError: the marks are gone.
    """
    before, begin, rest = readme.partition(_TABLE_BEGIN)
    _, end, after = rest.partition(_TABLE_END)
    if not (begin and end):
        raise UserError(f"README.md lacks the lines {_TABLE_BEGIN} and {_TABLE_END}")
    return f"{before}{begin}\n{render_table()}\n{end}{after}"


def rendered_files(root: Path) -> dict[Path, str]:
    """Every file that the checkpoints' data determine: cards, plots and README."""
    cards = root / "model_cards"
    files = {cards / f"{name}.md": render_converted_card(name) for name in CONVERTED}
    for entry in entries():
        files[cards / f"{entry.name}.md"] = render_card(entry)
        files |= {cards / file: plot for file, plot in plots(entry).items()}
    files[cards / "results.csv"] = results_csv(sorted(entries(), key=rank))
    readme = root / "README.md"
    files[readme] = with_table(readme.read_text(encoding="utf-8"))
    return files


def source_root() -> Path:
    """The source checkout that holds the checkpoints.

    Raises:
        UserError: the package is installed without its sources.
    """
    root = checkpoints_root().parent
    if not (root / "README.md").is_file():
        raise UserError("cards are rendered inside a source checkout only; clone the repository")
    return root


def _model_table(entry: Entry) -> str:
    model_record: dict[str, Any] = next(
        (e["model"] for e in entry.evaluations.values() if "model" in e), {}
    )
    rows = [
        ("class", f"`{entry.architecture}`"),
        ("parameters", f"{model_record.get('parameters', entry.parameters):,}"),
        ("weights", f"{entry.size / 2**20:.1f} MiB in {len(entry.weight_files)} file(s)"),
        ("solver", _settings(entry.config.get("solver"))),
        ("gradient", _settings(entry.config.get("gradient"))),
        (
            "weights SHA-256",
            f"`{model_record['weights_sha256']}`" if model_record else "not recorded",
        ),
    ]
    return _table(("", ""), rows)


def _limits(entry: Entry) -> str:
    """What the model cannot do, by its task, the size of its pictures and its data."""
    parts = [TASK_LIMITS[entry.task]]
    if "image_size" in entry.config:
        parts.append(PICTURE_LIMITS.format(size=entry.config["image_size"]))
    names = dict.fromkeys(e.get("data", {}).get("name") for e in entry.evaluations.values())
    parts += [DATA_TEXTS[name].limits for name in names if name in DATA_TEXTS]
    return " ".join(filter(None, parts))


def _results(entry: Entry, repository: str | None) -> list[str]:
    """One table of all figures, a column per evaluation; details folded below it."""
    if not entry.evaluations:
        return ["Not evaluated yet."]
    # The test split first: it is what others compare with.
    evaluations = sorted(
        entry.evaluations.values(), key=lambda e: e.get("data", {}).get("split") != "test"
    )
    names = dict.fromkeys(
        name
        for evaluation in evaluations
        for name, value in evaluation.get("results", {}).items()
        if isinstance(value, (int, float))
    )
    head = ("figure", *(_column(evaluation) for evaluation in evaluations))
    rows = [
        (words(name), *(_number(e.get("results", {}).get(name, "")) for e in evaluations))
        for name in names
    ]
    parts = [_table(head, rows)]
    parts += [
        f"These {data['samples']:,} {data['unit']} also chose the weights of this model, for want "
        "of more: a figure that flatters."
        for evaluation in evaluations
        if (data := evaluation.get("data", {})).get("chose_weights")
    ]
    parts += [line for evaluation in evaluations for line in _against_baselines(evaluation)]
    commands = dict.fromkeys(measuring_command(entry, e, repository) for e in evaluations)
    parts.append("Measured by " + " and ".join(f"`{command}`" for command in commands) + ".")
    for evaluation in evaluations:
        text = DATA_TEXTS.get(evaluation.get("data", {}).get("name", ""))
        if text and text.published and evaluation["data"].get("split") == "test":
            parts.append(f"Published by others: {text.published}.")
    for evaluation in evaluations[:1]:  # the others' are in their files
        per_class = evaluation.get("results", {}).get("per_class_accuracy")
        if per_class:
            rows = [(name, _number(value)) for name, value in per_class.items()]
            title = f"Accuracy by class, {_column(evaluation)}"
            parts.append(_details(title, _table(("class", "accuracy"), rows)))
        budget = _budget(evaluation)
        if budget:
            title = f"{words(evaluation['metric']).capitalize()} against solver steps"
            parts.append(_details(f"{title}, {_column(evaluation)}", *budget))
    notes = entry.folder / NOTES
    return [*parts, notes.read_text(encoding="utf-8").strip()] if notes.is_file() else parts


def _column(evaluation: dict[str, Any]) -> str:
    data = evaluation.get("data", {})
    return f"{data_title(data.get('name', '?'))}, {data.get('split', '?')}"


def _data(entry: Entry) -> list[str]:
    """What was measured and what identifies it, folded."""
    parts = dict.fromkeys(
        text.note
        for evaluation in entry.evaluations.values()
        if (text := DATA_TEXTS.get(evaluation.get("data", {}).get("name", "")))
    )
    facts = [
        f"{_column(evaluation)}: {'; '.join(_facts(evaluation.get('data', {})))}."
        for evaluation in entry.evaluations.values()
    ]
    return [_details("Data", *parts, *facts)] if parts or facts else []


def _facts(data: dict[str, Any]) -> Iterator[str]:
    """What was measured: how many samples of what, and what identifies them."""
    if "samples" in data:
        yield f"{data['samples']:,} {data['unit']}"
    for key, value in data.items():
        if key == "looks":
            times = "once" if value == 1 else f"{value} times, with the weights of {value} releases"
            yield f"measured {times}"
        elif key not in ("name", "split", "samples", "unit", "chose_weights"):
            yield f"{key.replace('_', ' ')}: {_number(value)}"


def _against_baselines(evaluation: dict[str, Any]) -> Iterator[str]:
    """A sentence per figure that is not above that of a constant answer."""
    results, data = evaluation.get("results", {}), evaluation.get("data", {})
    for name, metric in METRICS.items():
        if name not in results or metric.baseline not in results:
            continue
        value, constant = results[name], results[metric.baseline]
        if metric.better(value, constant):
            continue
        relation = "no more than" if value == constant else "less than"
        is_other_metric = evaluation["metric"] != name
        measure = f"; the measure here is {words(evaluation['metric'])}" if is_other_metric else ""
        yield (
            f"The {metric.words} on these {data['samples']:,} {data['unit']}, "
            f"{100 * value:.1f} %, is {relation} the {100 * constant:.1f} % of "
            f"{words(metric.baseline).partition(' of ')[2]}{measure}."
        )


def _budget(evaluation: dict[str, Any]) -> list[str]:
    """Quality against effort, for evaluations that measured it."""
    budget, metric = evaluation.get("budget"), evaluation.get("metric")
    if not budget:
        return []
    rows = [
        (str(row["max_steps"]), _number(row[metric]), _number(row["residual_median"]))
        for row in budget["steps"]
    ]
    part = "all" if budget["samples"] == evaluation["data"].get("samples") else "the first"
    return [
        f"Effort is a dial: {words(metric)} after a fixed number of solver steps, on {part} "
        f"{budget['samples']:,} {evaluation['data']['unit']} of this split (default solver there: "
        f"{_number(budget['default'])}).",
        _table(("solver steps", words(metric), "median relative residual"), rows),
    ]


def _metric(entry: Entry) -> str | None:
    """The figure that the checkpoint is measured by; None before it was."""
    return next((e.get("metric") for e in entry.tests() or entry.evaluations.values()), None)


def _training(entry: Entry) -> str:
    """Figures of the training record and the recipe as it was run."""
    content = entry.record
    if not content:
        return "No training record is stored beside these weights."
    rows = [
        (label, _number(value))
        for label, value in _record_rows(content)
        if isinstance(value, (int, float, str))
    ]
    parts = [_table(("", ""), rows)] if rows else []
    curve = training_curve.describe(content, _metric(entry))
    if curve is not None:
        parts += [curve, f"![quality against compute]({entry.name}-training.svg)"]
    settings = content.get("recipe", content.get("settings"))
    if isinstance(settings, dict):
        text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
        parts += ["The recipe as it was run:", f"```yaml\n{text}```"]
    return "\n\n".join(parts)


def _record_rows(content: dict[str, Any]) -> list[tuple[str, Any]]:
    """A record's values with their labels, which say what counts the last part of a run only."""
    inherited = content.get("pflop_inherited", 0.0)
    part = " of this part" if inherited else ""
    rows = []
    for name, value in content.items():
        if name == "pflop":
            rows.append((f"PFLOP{part}", value - inherited))
            rows += [("PFLOP in all parts", value)] if inherited else []
        elif name != "pflop_inherited":
            label = _LABELS.get(name) or words(name)
            rows.append((label + (part if name in _OF_A_PART else ""), value))
    return rows


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _settings(settings: dict[str, Any] | None) -> str:
    """Solver or gradient settings in words, without those left to their defaults."""
    values = {key: value for key, value in (settings or {}).items() if value is not None}
    parts = []
    for key in sorted(
        values, key=lambda key: list(_SETTINGS).index(key) if key in _SETTINGS else 9
    ):
        value = values[key]
        value = _settings(value) if isinstance(value, dict) else _STOPS.get(value, value)
        parts.append(_SETTINGS.get(key, key.replace("_", " ") + " {}").format(value))
    return ", ".join(parts).replace(", of the", " of the")


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

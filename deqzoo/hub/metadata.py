"""What the Hub reads of a checkpoint: the metadata of its card and its test results."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from deqzoo.hub.card_texts import DATA_TEXTS, FAMILY_TEXTS
from deqzoo.hub.catalogue import Entry
from deqzoo.tasks.metrics import METRICS, words
from deqzoo.zoo import ORGANISATION


def own_repository(entry: Entry) -> str:
    """Where the zoo itself publishes a checkpoint."""
    return f"{ORGANISATION}/{entry.name}"


def measuring_command(entry: Entry, evaluation: dict[str, Any], repository: str | None) -> str:
    """The command of an evaluation, for the repository where it is not the zoo's own."""
    command = evaluation.get("command", "?")
    if repository in (None, own_repository(entry)):
        return command
    name = evaluation.get("model", {}).get("name", entry.name)
    return f"{command} ".replace(f" {name} ", f" {repository} ", 1).rstrip()


def metadata(entry: Entry) -> str:
    """The YAML at the head of a checkpoint's card."""
    family = FAMILY_TEXTS[entry.config["model_type"]]
    figures = _test_figures(entry)
    data_names = {data["name"] for data, _, _ in figures if data["name"] in DATA_TEXTS}
    results = [
        EvalResult(
            task_type=family.pipeline_tag,
            # The format asks for some name, even of data of which no repository is known.
            dataset_type=DATA_TEXTS[data["name"]].repository or data["name"],
            dataset_name=DATA_TEXTS[data["name"]].title,
            dataset_split=data["split"],
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for data, (kind, name), value in figures
        if data["name"] in DATA_TEXTS
    ]
    card = ModelCardData(
        model_name=entry.name,
        license="apache-2.0",
        library_name="deqzoo",
        pipeline_tag=family.pipeline_tag,
        tags=["deep-equilibrium-model", entry.config["model_type"]],
        language=family.language,
        datasets=sorted(filter(None, {DATA_TEXTS[name].repository for name in data_names})) or None,
        eval_results=results or None,
    )
    return card.to_yaml()


def eval_results_yaml(entry: Entry, repository: str | None = None) -> str | None:
    """Content of `.eval_results/deqzoo.yaml`; None without test figures on data of the Hub.

    The Hub keeps one figure per data set and task, so that each evaluation gives its main one.
    """
    rows = []
    for evaluation in entry.tests():
        text = DATA_TEXTS.get(evaluation["data"]["name"])
        metric = evaluation.get("metric")
        if text is None or text.repository is None or metric is None:
            continue
        command = measuring_command(entry, evaluation, repository)
        rows.append(
            {
                "dataset": {"id": text.repository, "task_id": text.subset},
                "value": evaluation["results"][metric],
                "date": evaluation["environment"]["date"],
                "notes": f"{metric} on the {evaluation['data']['split']} split; {command}",
            }
        )
    return yaml.safe_dump(rows, sort_keys=False) if rows else None


def _test_figures(entry: Entry) -> list[tuple[dict[str, Any], tuple[str, str], float]]:
    """(data, (type, name), value) of the test figures that the Hub knows, and of steps and
    convergence."""
    metric_names = {key: metric.hub for key, metric in METRICS.items() if metric.hub}
    metric_names |= {
        key: (key, words(key).capitalize()) for key in ("n_steps_mean", "converged_share")
    }
    return [
        (evaluation["data"], name, evaluation["results"][key])
        for evaluation in entry.tests()
        for key, name in metric_names.items()
        if key in evaluation["results"]
    ]

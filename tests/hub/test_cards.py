"""Cards, seals and verification of checkpoints."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from deqzoo import DEQModel, UserError
from deqzoo.cli import run
from deqzoo.evaluation.dispatch import evaluate_model
from deqzoo.evaluation.files import write_evaluation
from deqzoo.hub import cards
from deqzoo.hub.card_texts import (
    CONVERTED,
    DATA_TEXTS,
    FAMILY_TEXTS,
    PAPERS,
    TASK_LIMITS,
    TASK_USES,
)
from deqzoo.hub.catalogue import Entry, best_first, entry
from deqzoo.hub.integrity import check_checksums, check_golden
from deqzoo.hub.metadata import eval_results_yaml
from deqzoo.hub.verify import verify_model
from deqzoo.records import upgraded
from deqzoo.tasks.metrics import METRICS
from deqzoo.zoo import TASKS


@pytest.fixture(scope="session")
def measured(tiny_mdeq: Path, cifar_folder: Path, tmp_path_factory) -> Path:
    """A sealed checkpoint with an evaluation file, inside a small source checkout."""
    root = tmp_path_factory.mktemp("checkout")
    folder = root / "hub_configs" / "mdeq-test"
    shutil.copytree(tiny_mdeq, folder)
    model = DEQModel.from_pretrained(folder)
    content = evaluate_model(model, "mdeq-test", data=cifar_folder, progress=False)
    write_evaluation(folder / "evaluation" / "cifar10-test.json", content)
    (root / "README.md").write_text("# x\n<!-- models:begin -->\n<!-- models:end -->\nend\n")
    assert run(["seal", str(folder)]) == 0
    return folder


@pytest.fixture
def checkout(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that checkout which the package takes for its own."""
    root = Path(shutil.copytree(measured.parents[1], tmp_path / "checkout"))
    for module in ("deqzoo.zoo", "deqzoo.hub.cards"):
        monkeypatch.setattr(f"{module}.checkpoints_root", lambda: root / "hub_configs")
    return root


def test_card_quotes_the_evaluation_file(checkout: Path) -> None:
    found = entry("mdeq-test")
    text = cards.render_card(found)
    card = ModelCard(text)
    evaluation = found.evaluations["cifar10-test"]
    result, steps, share = card.data.eval_results
    assert result.metric_value == evaluation["results"]["accuracy"]
    assert steps.metric_value == evaluation["results"]["n_steps_mean"]
    assert share.metric_value == evaluation["results"]["converged_share"]
    assert share.metric_name == "Share that met the tolerance"
    assert "| solver | `anderson`, at most 30 steps, tolerance 0.001 of the relative resid" in text
    assert "| gradient | `upg`, 5 steps, damping 0.5 |" in text
    assert result.dataset_type == "uoft-cs/cifar10" and card.data.model_name == "mdeq-test"
    assert evaluation["model"]["weights_sha256"] in text
    assert f"{evaluation['results']['expected_calibration_error']:.4g}" in text
    assert "deqzoo evaluate mdeq-test --split test" in text
    assert "geng2021training" in text and "bai2020multiscale" in text
    assert "the 10,000 test pictures chose no weights" in text


def test_test_results_stand_beside_published_ones(checkout: Path) -> None:
    found = entry("mdeq-test")
    (evaluation,) = found.evaluations.values()
    for split, shown in (("test", True), ("validation", False)):
        evaluation["data"] |= {"name": "wikitext-2", "split": split}
        assert ("Published by others: perplexity 65.8" in cards.render_card(found)) is shown


def test_newer_result_format_parses(checkout: Path) -> None:
    import yaml
    from huggingface_hub import parse_eval_result_entries

    (row,) = parse_eval_result_entries(yaml.safe_load(eval_results_yaml(entry("mdeq-test"))))
    assert (row.dataset_id, row.task_id) == ("uoft-cs/cifar10", "plain_text")
    assert row.notes.startswith("accuracy on the test split; deqzoo evaluate mdeq-test ")
    elsewhere = yaml.safe_load(eval_results_yaml(entry("mdeq-test"), "org/x"))
    assert "deqzoo evaluate org/x --split test" in elsewhere[0]["notes"]


def test_each_data_set_gives_one_row_of_results() -> None:
    import yaml

    found = made_entry("proteins", accuracy=0.7, majority=0.6, auc=0.8)
    (row,) = yaml.safe_load(eval_results_yaml(found))
    assert row["value"] == 0.8 and row["notes"].startswith("auc")
    assert eval_results_yaml(made_entry("humloc", micro_f1=0.4)) is None  # not on the Hub


def test_data_that_the_hub_lacks_are_described() -> None:
    card = ModelCard(cards.render_card(made_entry("humloc", micro_f1=0.4)))
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("humloc", "HumLoc")
    assert result.metric_value == 0.4 and card.data.datasets is None
    assert DATA_TEXTS["humloc"].note in card.text


def test_card_names_the_repository_it_is_rendered_for(checkout: Path) -> None:
    text = cards.render_card(entry("mdeq-test"), "org/other")
    assert 'from_pretrained("org/other")' in text
    assert "`deqzoo evaluate org/other --split test`" in text
    assert "deqzoo/mdeq-test" not in text and "evaluate mdeq-test" not in text
    assert 'from_pretrained("deqzoo/mdeq-test")' in cards.render_card(entry("mdeq-test"))


def test_first_screen_of_a_card(checkout: Path) -> None:
    """Figure, code, use and limits come first, then one table; the rest is folded."""
    found = entry("mdeq-test")
    other = copy.deepcopy(found.evaluations["cifar10-test"])
    other["data"]["split"] = "validation"
    found.evaluations["cifar10-validation"] = other
    body = cards.render_card(found).split("---\n")[2]
    first, _, rest = body.partition("## Results")
    order = ["# mdeq-test", "**", "solver steps, in", "```python", "**Good for**", "**Not for"]
    places = [first.index(words) for words in order]
    assert places == sorted(places) and len(first.splitlines()) < 40
    assert rest.count("| figure |") == 1 and "CIFAR-10, test | CIFAR-10, validation" in rest
    assert rest.count("<details>") == rest.count("</details>") >= 4
    folded = re.sub(r"<details>.*?</details>", "", rest, flags=re.DOTALL)
    assert "```" not in folded and "SHA-256" not in folded
    assert TASK_USES.keys() == TASK_LIMITS.keys()


def test_limits_follow_task_data_and_picture_size(checkout: Path) -> None:
    assert TASK_LIMITS.keys() == {*(task.words for task in TASKS.values()), "features"}
    found = entry("mdeq-test")
    assert "middle 32 × 32 pixels" in cards.render_card(found)
    found.config["image_size"] = 96
    assert "middle 96 × 96 pixels" in cards.render_card(found)
    for name, others in (("humloc", ("cox2", "twitch")), ("cox2", ("humloc", "twitch"))):
        limits = cards.render_card(made_entry(name, samples=47)).partition("**Not for")[2]
        assert DATA_TEXTS[name].limits in limits
        assert not any(DATA_TEXTS[other].limits in limits for other in others)
    for name, text in CONVERTED.items():
        limits = cards.render_converted_card(name).partition("## Limits and biases")[2]
        assert TASK_LIMITS[text.task] in limits and text.limits in limits


def test_accuracy_stands_beside_the_majority_rate() -> None:
    for accuracy, said in ((0.5, "50.0 %, is less than the 60.0 %"), (0.6, "is no more than the")):
        text = cards.render_card(made_entry("cox2", accuracy=accuracy, majority=0.6, samples=47))
        assert "| accuracy of always naming the most frequent class | 0.6 |" in text
        assert f"accuracy on these 47 samples, {100 * accuracy:.1f} %" in text
        assert said in text and "AUC" not in text.partition("## Results")[2]
    better = cards.render_card(made_entry("cox2", accuracy=0.7, majority=0.6, samples=47))
    assert "accuracy on these" not in better
    ranked = made_entry("twitch", accuracy=0.5, majority=0.6, samples=47, auc=0.7)
    assert "the measure here is AUC" in cards.render_card(ranked)


def test_figures_have_the_unit_of_the_baselines_beside_them() -> None:
    shown = [metric.show(0.5) for metric in METRICS.values() if metric.baseline]
    assert shown and all(text.endswith("50.00 %") for text in shown)


def test_papers_that_cards_cite_can_be_opened() -> None:
    texts = [*FAMILY_TEXTS.values(), *CONVERTED.values()]
    cited = [PAPERS[key] for text in texts for key in text.papers]
    assert cited and all("url       = {https://arxiv.org/abs/" in paper for paper in cited)


def test_text_cards_say_their_language() -> None:
    converted = ModelCard(cards.render_converted_card("deq-transformer-wikitext103"))
    assert converted.data.language == "en"
    assert ModelCard(cards.render_converted_card("mdeq-imagenet-xl")).data.language is None


def made_entry(data: str, **results: float) -> Entry:
    """A graph model with one evaluation on a test split, without files."""
    evaluation = {
        "data": {"name": data, "split": "test"},
        "results": {"samples": 47} | results,
        "environment": {"date": "2026-01-01"},
        "command": "deqzoo evaluate ignn-made --split test",
    }
    node = data in ("twitch", "humloc", "eukloc")
    config = {
        "model_type": "ignn",
        "architectures": [f"IGNNFor{'Node' if node else 'Graph'}Classification"],
    }
    return Entry("ignn-made", Path("ignn-made"), config, {f"{data}-test": upgraded(evaluation)})


def test_converted_cards_name_a_preset_that_exists() -> None:
    from deqzoo.models.deq_transformer.presets_deq_transformer import PRESETS as TEXT
    from deqzoo.models.ignn.convert_ignn import PRESETS as GRAPHS
    from deqzoo.models.mdeq.presets_mdeq import PRESETS as IMAGES

    presets = {"mdeq": IMAGES, "deq_transformer": TEXT, "ignn": GRAPHS}
    for name, text in CONVERTED.items():
        words = text.command.split()
        assert words[words.index("--config") + 1] in presets[text.family]
        assert words[2].replace("-", "_") == text.family
        card = ModelCard(cards.render_converted_card(name))
        assert "not measured here" in card.text


def test_card_shows_quality_against_compute(checkout: Path) -> None:
    folder = checkout / "hub_configs" / "mdeq-test"
    record = {
        "pflop": 0.2,
        "recipe": {"data": {"name": "cifar10"}},
        "validation": [
            {"step": 10, "pflop": 0.1, "accuracy": 0.5}, {"step": 20, "pflop": 0.2, "accuracy": 0.7}
        ],
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(record))
    text = cards.render_card(entry("mdeq-test"))
    assert "50.0 % after 0.1, 70.0 % after 0.2. The authors' run" in text
    assert "reaches 78.6 % on the test split after 14 PFLOP" in text
    (name, plot) = next(p for p in cards.plots(entry("mdeq-test")).items() if "training" in p[0])
    assert f"]({name})" in text and "LARGE, test" in plot
    record["recipe"]["data"]["name"] = "wikitext-2"
    record["validation"] = [{"pflop": x, "perplexity": 100 / x} for x in (0.5, 1.0)]
    (folder / "training.json").write_text(json.dumps(record))
    text = cards.render_card(entry("mdeq-test"))
    assert "perplexity after so many PFLOP: 200.0 after 0.5, 100.0 after 1." in text
    assert "LARGE, test" not in cards.plots(entry("mdeq-test"))[name]


def test_the_training_curve_is_that_of_the_tasks_figure(checkout: Path) -> None:
    """A run logs accuracy and AUC; the card shows the one that the model is measured by."""
    folder = checkout / "hub_configs" / "mdeq-test"
    rows = [{"pflop": x, "accuracy": 0.1 * x, "auc": 0.2 * x, "micro_f1": 0.3 * x} for x in (1, 2)]
    (folder / "training.json").write_text(json.dumps({"pflop": 2, "validation": rows}))
    file = folder / "evaluation" / "cifar10-test.json"
    content = json.loads(file.read_text()) | {"budget": None}
    for metric, shown in (
        ("auc", "AUC after so many PFLOP: 20.0 % after 1, 40.0 % after 2"),
        ("micro_f1", "micro-F1 after so many PFLOP: 30.0 %"),
        ("accuracy", "accuracy after so many PFLOP: 10.0 %"),
    ):
        content["metric"] = metric
        content["results"][metric] = 0.5
        file.write_text(json.dumps(content))
        found = entry("mdeq-test")
        assert f"Validation {shown}" in cards.render_card(found)
        plot = cards.plots(found)["mdeq-test-training.svg"]
        assert f"{shown.partition(' ')[0]} against compute" in plot


def test_text_models_show_quality_against_steps(checkout: Path) -> None:
    file = checkout / "hub_configs" / "mdeq-test" / "evaluation" / "cifar10-test.json"
    content = json.loads(file.read_text())
    steps = [{"max_steps": n, "perplexity": 100.0 + n, "residual_median": 0.1} for n in (2, 4)]
    content |= {"metric": "perplexity", "results": {"perplexity": 104.0}}
    content["budget"] = {"steps": steps, "samples": 10, "default": 104.0}
    file.write_text(json.dumps(content))
    assert (
        "perplexity against solver steps" in cards.plots(entry("mdeq-test"))["mdeq-test-budget.svg"]
    )
    shown = '<img src="mdeq-test-budget.svg"'
    assert shown in cards.render_card(entry("mdeq-test"))
    content["data"]["split"] = "validation"  # the plot is that of the test split
    file.write_text(json.dumps(content))
    assert shown not in cards.render_card(entry("mdeq-test"))


def test_training_of_a_run_in_parts(checkout: Path) -> None:
    folder = checkout / "hub_configs" / "mdeq-test"
    record = {"steps": 5, "seconds": 60.0, "pflop": 2.0, "pflop_inherited": 1.5, "parameters": 7}
    (folder / "training.json").write_text(json.dumps(record))
    text = cards.render_card(entry("mdeq-test"))
    for row in ("steps of this part | 5", "seconds of this part | 60", "PFLOP of this part | 0.5"):
        assert f"| {row} |" in text
    assert "| PFLOP in all parts | 2 |" in text and "inherited" not in text
    (folder / "training.json").write_text(json.dumps(record | {"pflop_inherited": 0.0}))
    text = cards.render_card(entry("mdeq-test"))
    assert (
        "| PFLOP | 2 |" in text
        and "| seconds | 60 |" in text
        and "part" not in (text.partition("## Training")[2].partition("## Limits")[0])
    )


def test_epoch_choice_is_told_from_the_measured_accuracy(checkout: Path) -> None:
    fold = {"validation_accuracy": 0.81, "test_accuracy": 0.7}
    (checkout / "hub_configs" / "mdeq-test" / "fold.json").write_text(json.dumps(fold))
    text = cards.render_card(entry("mdeq-test"))
    assert "| validation accuracy in training, by which the epoch was chosen | 0.81 |" in text


def test_cards_command(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cards", "--check"]) == 2
    assert "run `deqzoo cards`" in capsys.readouterr().err
    assert run(["cards"]) == 0
    assert run(["cards", "--check"]) == 0
    assert "[mdeq-test](model_cards/mdeq-test.md)" in (checkout / "README.md").read_text()
    assert (checkout / "model_cards" / "mdeq-test-budget.svg").read_text().startswith("<svg")
    assert (checkout / "README.md").read_text().endswith("end\n")


def test_verify_is_green_and_sees_faults(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify"]) == 0
    assert "mdeq-test: ok" in capsys.readouterr().out
    assert run(["verify", "nosuch", "mdeq-test"]) == 2  # one that is missing hides no other
    printed = capsys.readouterr()
    assert "mdeq-test: ok" in printed.out and "failed: nosuch" in printed.err
    folder = checkout / "hub_configs" / "mdeq-test"
    evaluation = folder / "evaluation" / "cifar10-test.json"
    content = json.loads(evaluation.read_text())
    content["model"]["weights_sha256"] = "0" * 64
    evaluation.write_text(json.dumps(content))
    config = folder / "preprocessor_config.json"
    config.write_text(config.read_text() + " ")
    faults = verify_model("mdeq-test")
    assert any("has changed" in fault for fault in faults)
    assert any("other weights" in fault for fault in faults)
    assert run(["verify", "mdeq-test"]) == 2


def test_checksums_see_added_and_missing_files(checkout: Path) -> None:
    folder = checkout / "hub_configs" / "mdeq-test"
    (folder / "extra.json").write_text("{}")
    (folder / "preprocessor_config.json").unlink()
    assert check_checksums(folder) == [
        "preprocessor_config.json is missing",
        "extra.json is not in SHA256SUMS",
    ]
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="deqzoo seal"):
        check_checksums(folder)


def test_golden_prediction_sees_other_weights(checkout: Path) -> None:
    folder = checkout / "hub_configs" / "mdeq-test"
    model = DEQModel.from_pretrained(folder)
    assert check_golden(folder, model) == []
    model.classifier.bias.data += 1
    assert "golden logits differ" in check_golden(folder, model)[0]


def test_broken_snippet_is_a_fault(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(FAMILY_TEXTS["mdeq"], snippet="raise KeyError('gone')")
    monkeypatch.setitem(FAMILY_TEXTS, "mdeq", broken)
    assert verify_model("mdeq-test") == ["the card's example fails: KeyError: 'gone'"]


def test_best_checkpoints_come_first() -> None:
    def made(name: str, **results: float) -> Entry:
        evaluation = {"data": {"split": "test"}, "results": results}
        return Entry(name, Path(name), {}, {"x": evaluation} if results else {})

    found = [made("a", accuracy=0.7), made("b"), made("c", accuracy=0.8), made("d", perplexity=9)]
    assert [e.name for e in best_first(found, "accuracy")] == ["c", "a", "b", "d"]
    found = [made("a", perplexity=90.0), made("b", perplexity=80.0)]
    assert [e.name for e in best_first(found, "perplexity")] == ["b", "a"]


def test_table_has_a_row_per_model_worth_having(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str, data: str, **results: float) -> Entry:
        entry = made_entry(data, **results)
        file = next(iter(entry.evaluations.values()))
        file["model"] = {"parameters": 7}
        return replace(entry, name=name, folder=Path(name))

    found = [
        made("worse-twin", "proteins", accuracy=0.7, majority=0.6),
        made("better-twin", "proteins", accuracy=0.8, majority=0.6),
        made("useless", "cox2", accuracy=0.6, majority=0.7),
        made("nodes", "humloc", micro_f1=0.4),
    ]
    monkeypatch.setattr(cards, "entries", lambda: found)
    table = cards.render_table()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [name for row in rows[1:] for name in re.findall(r"\[(.*?)\]", row)] == [
        "better-twin", "nodes"
    ]  # fmt: skip
    assert "**80.00 %** on PROTEINS" in rows[1] and "most frequent class: 60.0 %" in rows[1]
    assert "trained in another way: [worse-twin]" in table
    assert "Kept to study, not to use: [useless]" in table and "has 70.0 %" in table

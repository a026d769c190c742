"""Graph training: single folds, the resumable table, node recipes, and their commands."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deqzoo.cli import run
from deqzoo.data.graphs import honest_folds, load_graph_set
from deqzoo.errors import UserError
from deqzoo.training.graph_nodes import NodeRecipe, NodeRun, train_nodes
from deqzoo.training.graphs import FoldRun, FoldSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from scripts import load_script  # noqa: E402
from test_graphs import write_graph_set, write_ppi  # noqa: E402

table = load_script("benchmarks/ignn/table.py")

FAST = FoldSettings(epochs=3, batch_size=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    write_graph_set(folder / "TINY")
    return folder


def test_a_fold_learns_and_records(root):
    data = load_graph_set("TINY", root)
    fold = honest_folds(data.labels)[0]
    job = FoldRun(data, fold, "upg-5-0.5", FoldSettings(epochs=40, batch_size=8, lr=1e-2), 0)
    record = job.run()
    assert record.train_loss[-1] < 0.5 * record.train_loss[0]
    assert len(record.test_accuracy) == len(record.validation_loss) == 40
    assert job.best_weights is not None and record.parameters > 0
    best = max(record.validation_accuracy)
    assert record.validation_accuracy[record.chosen_epoch] == best
    assert all(layer.excess(1.0) == 0 for layer in job.model.implicit_layers)
    assert record.chosen_test_accuracy is not None and job.model.config.solver["tol"] == 1e-5


def test_warm_start_changes_only_the_steps(root):
    data = load_graph_set("TINY", root)
    fold = honest_folds(data.labels)[0]
    records = [
        FoldRun(data, fold, "implicit", FoldSettings(epochs=4, tol=1e-5, warm_start=w), 0).run()
        for w in (True, False)
    ]
    assert records[0].train_loss == pytest.approx(records[1].train_loss, abs=1e-4)
    assert sum(records[0].steps[1:]) < sum(records[1].steps[1:])


def test_table_resumes(root, tmp_path):
    jobs = [table.Job("published", "TINY", "npg-5-0.5", f) for f in (0, 1)]
    jobs.append(table.Job("honest", "TINY", "upg-5-0.5", 0))
    first = dict(table.run_table(root, tmp_path, jobs[:1], FAST))
    assert list(first) == jobs[:1]
    second = dict(table.run_table(root, tmp_path, jobs, FAST, processes=2))
    assert set(second) == set(jobs[1:]), "a finished fold was trained again"
    folds = table.collect(tmp_path)
    assert set(folds) == {job.key for job in jobs}
    result = folds[jobs[0].key]
    best = max(result["curves"]["test_accuracy"])
    assert result["best_test_accuracy"] == pytest.approx(best, abs=1e-5)
    checkpoint = tmp_path / "checkpoints" / jobs[2].key
    fold = json.loads((checkpoint / "fold.json").read_text())
    assert fold["test"] == honest_folds(load_graph_set("TINY", root).labels)[0].test
    text = table.render(folds)
    assert "(2/10)" in text and "| COX2 | Implicit | 84.1 ± 2.9 |" in text


def test_jobs():
    jobs = table.all_jobs()
    assert len(jobs) == len(set(jobs)) == 160
    first = [job.key for job in jobs[:2]]
    assert first == ["COX2-upg-5-0.5-honest-0", "PROTEINS-upg-5-0.5-honest-0"]
    with pytest.raises(UserError, match="unknown method 'sgd'"):
        table.all_jobs(methods=["sgd"])


def test_cells():
    assert table.cell([]) == ""
    assert table.cell([0.8, 0.9] * 5) == "85.0 ± 5.0"
    assert table.cell([0.8]) == "80.0 ± 0.0 (1/10)"


def test_tables_of_cards_and_nodes():
    fold = {"data": "COX2", "method": "implicit", "protocol": "honest", "test_accuracy": 0.75}
    fold |= {"parameters": 27010, "cpu_seconds": 60.0, "peak_memory_mib": 900.0}
    notes = table.render_notes({"a": fold}, "COX2")
    assert "### Ten folds of COX2" in notes and "| 75.0 ± 0.0 (1/10) | 27,010 | 60 | 900 |" in notes
    assert "PROTEINS" not in notes
    record = {
        "recipe": {"data": "HumLoc", "model": {"gradient": {"name": "implicit"}}},
        "validation": {"micro_f1": 0.5},
        "test": {"micro_f1": 0.25, "steps": 12.4},
        "cpu_seconds": 9.6,
    }
    line = "| ignn-x | HumLoc | implicit | Micro-F1 | 50.0 | 25.0 | 12 | 10 |"
    assert line in table.render_nodes({"ignn-x": record})


def test_commands(root, tmp_path, capsys):
    """The table's command, and what can be done with the checkpoint that it leaves."""
    recipe = tmp_path / "fast.yaml"
    recipe.write_text("epochs: 2\nbatch_size: 8\n")
    arguments = ["--data", str(root), "--sets", "TINY", "--recipe", str(recipe)]
    arguments += ["--methods", "upg-5-0.5", "--protocols", "honest", "--processes", "2"]
    arguments += ["--output", str(tmp_path / "folds"), "--results", str(tmp_path / "results")]
    table.main(arguments)
    assert "| TINY | UPG k=5 λ=0.5 |" in capsys.readouterr().out
    # The results file alone is enough to go on from.
    again = [a if a != str(tmp_path / "folds") else str(tmp_path / "fresh") for a in arguments]
    table.main(again)
    assert not list((tmp_path / "fresh").glob("*.json"))
    capsys.readouterr()
    recipe.write_text("epochs: 3\nbatch_size: 8\n")
    with pytest.raises(SystemExit, match="2"):
        table.main(again)
    assert "trained with other settings" in capsys.readouterr().err
    checkpoint = str(tmp_path / "folds" / "checkpoints" / "TINY-upg-5-0.5-honest-0")
    assert run(["predict-graphs", checkpoint, "--data", str(root), "--json"]) == 0
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = json.loads((Path(checkpoint) / "fold.json").read_text())
    assert [p["number"] for p in predictions] == stored["test"]
    right = sum(p["label"] == p["target"] for p in predictions) / len(predictions)
    assert right == pytest.approx(stored["test_accuracy"])
    assert run(["predict-graphs", checkpoint, "--data", str(root), "--split", "all"]) == 0
    assert "of 30 as stored" in capsys.readouterr().out
    target = tmp_path / "evaluation.json"
    assert run(["evaluate", checkpoint, "--data", str(root), "--output", str(target)]) == 0
    content = json.loads(target.read_text())
    assert content["results"]["accuracy"] == pytest.approx(stored["test_accuracy"])
    few = ["evaluate", checkpoint, "--data", str(root), "--output", str(target), "--limit", "2"]
    assert run(few) == 0
    part = json.loads(target.read_text())
    assert part["data"]["samples"] == part["data"]["limit"] == 2
    assert part["data"]["complete"] is False and part["command"].endswith("--limit 2")
    capsys.readouterr()
    assert run(["evaluate", checkpoint, "--output", str(target)]) == 2
    assert "--data" in capsys.readouterr().err


def test_node_recipe_on_ppi_layout(tmp_path):
    """The PPI recipe trains on a small file in PPI's layout, and its checkpoint evaluates."""
    pytest.importorskip("networkx")
    write_ppi(tmp_path / "PPI" / "raw")
    recipe = NodeRecipe(
        name="ppi-test",
        data="PPI",
        model={
            "hidden_sizes": [8, 4],
            "skip_connections": True,
            "implicit_head": True,
            "normalization": "none",
            "kappa": 0.98,
        },
        epochs=3,
        evaluate_every=2,
    )
    record = train_nodes(recipe, tmp_path, tmp_path / "run", progress=False)
    assert [entry["epoch"] for entry in record["curve"]] == [2, 3] and "micro_f1" in record["test"]
    snapshots = tmp_path / "run" / "snapshots"
    assert len(list(snapshots.glob("step-*"))) == 4  # 0 to 3 epochs
    config = json.loads((snapshots / "config.json").read_text())
    assert config["architectures"] == ["IGNNForNodeClassification"]
    assert train_nodes(recipe, tmp_path, tmp_path / "run", resume=True) == record
    with pytest.raises(UserError, match="already holds a run"):
        train_nodes(recipe, tmp_path, tmp_path / "run")
    with pytest.raises(UserError, match="another recipe"):
        train_nodes(replace(recipe, seed=1), tmp_path, tmp_path / "run", resume=True)
    target = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(tmp_path / "run" / "model"), "--data", str(tmp_path)]
    assert run([*arguments, "--output", str(target)]) == 0
    results = json.loads(target.read_text())["results"]
    assert results["micro_f1"] == pytest.approx(record["test"]["micro_f1"])


def test_node_run_resumes_bit_for_bit(tmp_path, capsys):
    pytest.importorskip("networkx")
    write_ppi(tmp_path / "PPI" / "raw")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "{name: ppi-test, data: PPI, epochs: 6, evaluate_every: 2, "
        "model: {hidden_sizes: [8, 4], dropout: 0.3}}"
    )
    command = ["train", str(file), "--data", str(tmp_path), "--quiet"]
    assert run([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert run([*command, "--output", str(tmp_path / "whole")]) == 0
    whole = json.loads((tmp_path / "whole" / "model" / "run.json").read_text())
    cut = NodeRun(NodeRecipe.read(file), tmp_path)
    for _ in range(3):
        cut.step()
    (tmp_path / "cut").mkdir()
    cut.save(tmp_path / "cut" / "checkpoints")
    assert run([*command, "--output", str(tmp_path / "cut"), "--resume"]) == 0
    resumed = json.loads((tmp_path / "cut" / "model" / "run.json").read_text())
    for key in ("recipe", "curve", "validation", "test", "data_fingerprint"):
        assert resumed[key] == whole[key]
    assert not (tmp_path / "cut" / "checkpoints").exists()
    capsys.readouterr()
    assert run([*command, "--output", str(file)]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
    assert run(["train", str(file)]) == 2 and "--data" in capsys.readouterr().err


def test_commands_that_became_scripts_say_where_they_are(capsys):
    assert run(["ignn-table", "--data", "x", "--sets", "COX2"]) == 2
    assert "python benchmarks/ignn/table.py" in capsys.readouterr().err
    assert run(["train", "--queue", "recipes/QUEUE.yaml"]) == 2
    assert "python recipes/work.py recipes/QUEUE.yaml" in capsys.readouterr().err


def test_bad_recipes(tmp_path):
    file = tmp_path / "recipe.yaml"
    for text, message in (
        ("name: a\ndata: PPI\nepoch: 3\n", "unknown key epoch"),
        ("name: a\ndata: PPI\nlr: fast\n", "lr must be of type float"),
        ("name: a\ndata: PPI\nevaluate_every: 0\n", "evaluate_every must be at least 1"),
        ("name: a\ndata: Reddit\n", "set data to one of"),
        ("- 1\n", "must be a mapping"),
        ("data: PPI\n", "name"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            NodeRecipe.read(file)
    with pytest.raises(UserError, match="cannot read"):
        FoldSettings.read(tmp_path / "missing.yaml")


def test_shipped_recipes_are_valid():
    folder = Path(__file__).parents[2] / "recipes"
    assert FoldSettings.read(folder / "ignn-table.yaml") == FoldSettings()
    names = [NodeRecipe.read(p).name for p in folder.glob("ignn-*.yaml") if "table" not in p.name]
    assert "ignn-ppi-upg" in names

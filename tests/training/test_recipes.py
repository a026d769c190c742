"""Recipes are checked before anything runs, and every bundled one builds its model."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from deqzoo.cli import run
from deqzoo.errors import UserError
from deqzoo.training.queue import load_queue, status
from deqzoo.training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

MINIMAL = {
    "name": "x",
    "task": "image-classification",
    "data": {"name": "cifar10"},
    "model": {"family": "mdeq", "preset": "mdeq-phantom-cifar-small"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "batch_size": 4,
    "stages": [{"epochs": 1, "gradient": {"name": "upg", "steps": 2}}],
}


def write(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def changed(path, value):
    content = copy.deepcopy(MINIMAL)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def test_minimal_recipe_loads(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.stages[0].gradient == {"name": "upg", "steps": 2}
    assert recipe.optimizer.lr == 0.1


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL).replace("lr: 0.1", "lr: 1e-3"))
    assert load_recipe(path).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(["name"], None), "missing key name"),
        (changed(["model", "preset"], None), "missing key model.preset"),
        ({**MINIMAL, "epoch": 3}, "unknown key epoch"),
        (changed(["stages", 0, "epochs"], "many"), r"stages\[0\].epochs must be of type float"),
        (changed(["stages", 0, "epochs"], 0), r"stages\[0\].epochs must be positive"),
        (changed(["stages", 0, "gradient"], {"name": "ugp"}), "unknown gradient 'ugp'"),
        (changed(["stages", 0, "gradient"], {"name": "upg", "k": 2}), "no option 'k'"),
        (changed(["stages", 0, "solver"], {"tol": 1}), "needs a name"),
        (changed(["optimizer", "name"], "lion"), "optimizer.name must be one of"),
        (changed(["batch_size"], True), "batch_size must be of type int"),
        (changed(["stages"], []), "at least one"),
        ("a: [", "is not YAML"),
        ("- 1", "must be a mapping"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        load_recipe(write(tmp_path, content))
    assert "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_recipes_are_valid(path):
    content = yaml.safe_load(path.read_text())
    if isinstance(content, list):
        entries = load_queue(path)
        assert len({entry.name for entry in entries}) == len(entries)
    elif "task" in content:
        assert load_recipe(path).name == path.stem


TASKS = [path for path in sorted(RECIPES.glob("*.yaml")) if "\ntask:" in path.read_text()]


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_bundled_recipes_pass_a_dry_run(path, capsys):
    """The model is built in full; cost and memory are printed, with the commands."""
    assert run(["train", str(path), "--dry-run"]) == 0
    figures = json.loads(capsys.readouterr().out)
    recipe = load_recipe(path)
    budget = recipe.budget_pflop or float("inf")
    assert figures["parameters"] > 1e5 and 0 < figures["pflop"] <= budget
    memory = figures["memory_mib"]
    assert memory["total"] > memory["weights_and_optimizer"] > 0
    assert "torchrun" in figures["commands"]["several"]


def test_queue_knows_what_is_left(tmp_path):
    write(tmp_path, MINIMAL)
    queue = tmp_path / "queue.yaml"
    queue.write_text("- {recipe: recipe.yaml, target: 85 %}\n")
    (entry,) = load_queue(queue)
    assert status(entry, tmp_path)["state"] == "waiting"
    record = '{"finished": false, "steps": 25, "total_steps": 100, "pflop": 2, "seconds": 3600}'
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "record.json").write_text(record)
    state = status(entry, tmp_path)
    assert (state["state"], state["pflop_total"], state["hours_left"]) == ("begun", 8.0, 3.0)

"""Recipes are checked before anything runs, and every bundled one builds its model."""

import copy
import fcntl
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from scripts import load_script

from deqzoo.cli import run
from deqzoo.errors import UserError
from deqzoo.recipe import load_recipe, with_seed

queues = load_script("recipes/work.py")
load_queue, status, work = queues.load_queue, queues.status, queues.work

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
    for number in ("1e-3", "1E-3", "+1e-3", "1.0e-3", "10.e-4"):
        text = yaml.safe_dump(changed(["stages", 0, "solver"], {"name": "anderson", "tol": 5.0}))
        recipe = load_recipe(write(tmp_path, text.replace("tol: 5.0", f"tol: {number}")))
        assert recipe.stages[0].solver["tol"] == 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(["name"], None), "missing key name"),
        (changed(["model", "family"], None), "missing key model.family"),
        ({**MINIMAL, "epoch": 3}, "unknown key epoch"),
        (changed(["stages", 0, "epochs"], "many"), r"stages\[0\].epochs must be of type float"),
        (changed(["stages", 0, "epochs"], 0), r"stages\[0\].epochs must be positive"),
        (changed(["stages", 0, "gradient"], {"name": "ugp"}), "unknown gradient 'ugp'"),
        (changed(["stages", 0, "gradient"], {"name": "upg", "k": 2}), "no option 'k'"),
        (changed(["stages", 0, "solver"], {"tol": 1}), "needs a name"),
        (changed(["optimizer", "name"], "lion"), "optimizer.name must be one of"),
        (changed(["batch_size"], True), "batch_size must be of type int"),
        (changed(["stages"], []), "at least one"),
        (changed(["stages", 0, "resolution"], -8), r"stages\[0\].resolution must be at least 1"),
        (changed(["stages", 0, "jacobian"], {"every": 0}), r"jacobian.every must be at least 1"),
        (changed(["optimizer", "lr"], -0.1), "optimizer.lr must be at least 0"),
        ({**MINIMAL, "average": 1.0}, r"average must be in \[0, 1\)"),
        ({**MINIMAL, "schedule": {"warmup": 3}}, "schedule.warmup is a share"),
        (
            {**changed(["stages", 0, "gradient"], {"name": "npg"}), "gradient_checkpointing": True},
            r"no effect on gradient 'npg' of stages\[0\]",
        ),
        ("a: [", "is not YAML"),
        ("- 1", "must be a mapping"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        load_recipe(write(tmp_path, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["task"], "segmentation", "task must be one of .*, got 'segmentation'"),
        (["model", "family"], "deq_transformer", "must be mdeq, got deq_transformer"),
        (["model", "preset"], "resnet", "unknown MDEQ preset 'resnet'"),
        (["model", "overrides"], {"dropuot": 0.1}, "unknown key model.overrides.dropuot"),
        (["model", "overrides"], {"dropout": "a"}, "model settings: .*'dropout'"),
        (["model", "overrides"], {"solver": {"name": "newton"}}, "unknown solver 'newton'"),
        (["data", "options"], {"size": 64}, "unknown key data.options.size; valid keys are seed"),
        (["data", "options"], {"seed": "one"}, "data.options.seed must be a whole number"),
        (["augment"], {"mixup": 1}, "unknown augmentation 'mixup'"),
        (["stages", 0, "resolution"], 1000000, r"stages\[0\].resolution must be at most 4096"),
        (["model", "overrides"], {"image_size": 1000000}, "image_size must be at most 4096"),
        (["augment"], {"crop": "a"}, "augment.crop must be a number of pixels"),
        (["augment"], {"flip": "vertical"}, "augment.flip must be alternating or random"),
        (["augment"], {"area": [0.5, 1.5]}, "augment.area must be two positive numbers"),
    ],
)
def test_what_a_model_or_its_data_refuse(tmp_path, capsys, place, value, message):
    path = write(tmp_path, changed(place, value))
    assert run(["train", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"- {recipe: 3}", "got {'recipe': 3}"), (b"\xff\xfe", "is not YAML"), (b"a: 1", "a list")],
)
def test_wrong_queues(tmp_path, content, message):
    path = tmp_path / "queue.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_queue(path)


def test_missing_file():
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_recipes_are_valid(path):
    content = yaml.safe_load(path.read_text())
    if isinstance(content, list):
        entries = load_queue(path)
        assert len({entry.name for entry in entries}) == len(entries)
    elif "task" in content or "base" in content:
        assert load_recipe(path).name == path.stem


TASKS = [
    # One of the 98M models is enough where time is short.
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * ("wikitext103-p" in path.stem))
    for path in sorted(RECIPES.glob("*.yaml"))
    if "\ntask:" in path.read_text() or "\nbase:" in path.read_text()
    if not path.stem.startswith("ignn")  # graphs have no stand-ins; see test_graphs.py
]


@pytest.mark.parametrize("path", TASKS)
def test_bundled_recipes_pass_a_dry_run(path, capsys):
    """The model is built in full; cost and memory are printed, with the commands."""
    assert run(["train", str(path), "--dry-run"]) == 0
    printed, recipe = capsys.readouterr(), load_recipe(path)
    figures = json.loads(printed.out)
    assert ("ends by its clock" in printed.err) == bool(recipe.time_budget)
    budget = recipe.budget_pflop or float("inf")
    assert figures["parameters"] > 1e5 and 0 < figures["pflop"] <= budget
    memory = figures["memory_mib"]
    assert memory["total"] > memory["weights_and_optimizer"] > 0
    several = [] if recipe.time_budget else ["several"]  # the clock is that of one process
    assert list(figures["commands"]) == ["one", *several]
    assert all("torchrun" in figures["commands"][name] for name in several)


def test_the_commands_of_a_dry_run_keep_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(RECIPES / "mdeq-tiny-cifar-upg.yaml")
    options = ["--output", "my runs", "--seed", "3"]
    assert run(["train", path, *options, "--dry-run"]) == 0
    for command in json.loads(capsys.readouterr().out)["commands"].values():
        assert command.endswith(f"train {path} --output 'my runs' --seed 3 --resume")


def test_a_recipe_that_is_no_file_says_what_one_is(tmp_path: Path, capsys) -> None:
    for given in ("mdeq-tiny-cifar-upg", str(tmp_path)):
        assert run(["train", given]) == 2
        assert "as in: deqzoo train recipes/NAME.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ("mdeq-cifar-upg", "mdeq-cifar-npg"),
        ("mdeq-cifar-upg", "mdeq-cifar-implicit"),
        ("mdeq-tiny-cifar-upg55", "mdeq-tiny-cifar-implicit"),
        ("mdeq-tiny-cifar-upg55", "mdeq-tiny-cifar-npg"),
        ("mdeq-tiny-cifar-upg55", "mdeq-tiny-cifar-jfb"),
        ("mdeq-imagenet-small-upg", "mdeq-imagenet-small-implicit"),
    ],
)
def test_pairs_differ_in_the_gradient_only(base, other):
    pair = [load_recipe(RECIPES / f"{name}.yaml").to_dict() for name in (base, other)]
    gradients = []
    for content in pair:
        content.pop("budget_pflop")
        name = content.pop("name")
        gradients.append([stage.pop("gradient") for stage in content["stages"]])
        own = content["model"]["overrides"].pop("gradient", None)
        if own is not None and name == other:
            assert own == gradients[-1][-1]
    assert pair[0] == pair[1]
    assert all(a != b for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 2}, "key batch_size beside base"),
        ({"gradients": []}, "gradients must be a list of 1"),
        ({"gradients": [{"name": "ugp"}]}, "unknown gradient 'ugp'"),
        ({"base": "nowhere.yaml"}, "cannot read recipe"),
        ({"name": None}, "missing key name"),
    ],
)
def test_wrong_derived_recipes(tmp_path, change, message):
    write(tmp_path, MINIMAL)
    content = {"base": "recipe.yaml", "name": "y", "gradients": [{"name": "jfb"}], **change}
    path = tmp_path / "derived.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_seeds_of_a_queue_are_runs_of_their_own(tmp_path):
    write(tmp_path, MINIMAL)
    queue = tmp_path / "queue.yaml"
    queue.write_text("- {recipe: recipe.yaml, seed: 0}\n- {recipe: recipe.yaml, seed: 1}\n")
    assert [(e.name, e.seed) for e in load_queue(queue)] == [("x-s0", 0), ("x-s1", 1)]
    assert with_seed(load_recipe(tmp_path / "recipe.yaml"), 7).seed == 7
    queue.write_text("- {recipe: recipe.yaml, seed: two}\n")
    with pytest.raises(UserError, match="whole number"):
        load_queue(queue)


def test_the_queue_is_in_order():
    """A recipe comes after the one whose run it starts from; the comparison comes last."""
    entries = load_queue(RECIPES / "QUEUE.yaml")
    names = [entry.name for entry in entries]
    for place, entry in enumerate(entries):
        start = entry.recipe.model.start or ""
        if start.startswith("runs/"):
            assert start.split("/")[1] in names[:place], entry.name
    assert names[0] == "mdeq-tiny-cifar-upg"
    assert names[-2:] == ["mdeq-cifar-npg", "mdeq-cifar-implicit"]
    assert sum("-s" in name for name in names) == 12


def test_queue_knows_what_is_left(tmp_path):
    write(tmp_path, MINIMAL)
    queue = tmp_path / "queue.yaml"
    queue.write_text("- {recipe: recipe.yaml, target: 85 %}\n")
    (entry,) = load_queue(queue)
    assert status(entry, tmp_path)["state"] == "waiting"
    (tmp_path / "x").mkdir()
    record = {"finished": False, "steps": 25, "total_steps": 100, "pflop": 2, "seconds": 3600}

    def status_with(**changes):
        content = {**record, "recipe": entry.recipe.to_dict(), **changes}
        (tmp_path / "x" / "record.json").write_text(json.dumps(content))
        return status(entry, tmp_path)

    state = status_with()
    assert (state["state"], state["pflop_total"], state["hours_left"]) == ("begun", 8.0, 3.0)
    state = status_with(pflop=12, pflop_inherited=10)
    assert (state["pflop"], state["pflop_total"], state["hours_left"]) == (12, 18.0, 3.0)
    assert status_with(finished=True)["state"] == "done"
    # The recipe was edited since: its run does not stand for it, and is not trained over.
    state = status_with(finished=True, recipe={**entry.recipe.to_dict(), "seed": 5})
    assert (state["state"], state["pflop"]) == ("changed", 0.0)
    with pytest.raises(UserError, match="remove or rename the folder"):
        work([entry], tmp_path, None, threads=1)


def test_queue_passes_over_what_starts_from_a_running_recipe(tmp_path, monkeypatch, capsys):
    write(tmp_path, MINIMAL)
    for name, start in (("y", "runs/x/model"), ("z", "")):
        model = {**MINIMAL["model"], "start": start}
        content = {**MINIMAL, "name": name, "model": model}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    queue = tmp_path / "queue.yaml"
    queue.write_text("- {recipe: recipe.yaml}\n- {recipe: y.yaml}\n- {recipe: z.yaml}\n")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    started = []
    monkeypatch.setattr(
        "script_work.subprocess.Popen",
        lambda command, **_: started.append(command[4]) or SimpleNamespace(wait=lambda: 0),
    )
    with (tmp_path / "runs" / "x" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        work(load_queue(queue), tmp_path / "runs", None, threads=1)
    assert started == [str(tmp_path / "z.yaml")]
    assert "y: passed over, it starts from x, which is running" in capsys.readouterr().out


def test_queue_passes_over_what_another_process_began_first(tmp_path, monkeypatch, capsys):
    """Whose run looks like a waiting one until it has loaded everything."""
    for name in ("x", "y", "z"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**MINIMAL, "name": name}))
        (tmp_path / "runs" / name).mkdir(parents=True)
    queue = tmp_path / "queue.yaml"
    queue.write_text("- {recipe: x.yaml}\n- {recipe: y.yaml}\n- {recipe: z.yaml}\n")
    started, locks = [], []

    def start(command, **_):
        name = Path(command[4]).stem
        started.append(name)
        if name == "x":
            locks.append((tmp_path / "runs" / name / "lock").open("w"))
            fcntl.flock(locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return SimpleNamespace(wait=lambda: {"x": 2, "y": 0, "z": 2}[name])

    monkeypatch.setattr("script_work.subprocess.Popen", start)
    with pytest.raises(UserError, match="z ended with exit code 2"):
        work(load_queue(queue), tmp_path / "runs", None, threads=1)
    locks[0].close()
    assert started == ["x", "y", "z"]
    assert "x: passed over, another process trains" in capsys.readouterr().out


def test_queue_knows_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr("script_work.checkpoints_root", lambda: tmp_path / "zoo")
    recipe = load_recipe(write(tmp_path, MINIMAL))
    queue = tmp_path / "queue.yaml"
    queue.write_text("- {recipe: recipe.yaml}\n")
    (entry,) = load_queue(queue)
    folder = tmp_path / "zoo" / "x"
    folder.mkdir(parents=True)

    def state_with(content):
        record = {"finished": True, "steps": 9, "total_steps": 9, "pflop": 1.0, "recipe": content}
        (folder / "training.json").write_text(json.dumps(record))
        return status(entry, tmp_path)["state"]

    stored = recipe.to_dict()
    del stored["model"]["start"]  # a setting that came later than the record
    assert state_with(stored) == "done"
    assert state_with({**stored, "seed": 5}) == "waiting"
    for start in ("x", "deqzoo/x", "runs/x/model"):
        followed = {**stored, "name": "y", "model": {**stored["model"], "start": start}}
        assert state_with(followed) == "done"
    assert state_with({"name": "x"}) == "waiting"
    second = {**MINIMAL, "name": "x-2", "model": {**MINIMAL["model"], "start": "x"}}
    (tmp_path / "x-2.yaml").write_text(yaml.safe_dump(second))
    third = {**stored, "name": "x-3", "model": {**stored["model"], "start": "runs/x-2/model"}}
    assert state_with(third) == "done"
    (tmp_path / "zoo" / "z").mkdir()
    (tmp_path / "zoo" / "z" / "training.json").write_text((folder / "training.json").read_text())
    assert state_with({**stored, "seed": 5}) == "waiting"  # though z descends from another x


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("stages", 0, "epochs"), float("nan"), "finite"),
        (("stages", 0, "epochs"), float("inf"), "finite"),
        (("optimizer", "lr"), float("inf"), "finite"),
        (("optimizer", "betas"), [2, 3], "betas"),
        (("seed",), -3, "seed"),
        (("seed",), 2**32, "seed"),
        (("name",), "", "name"),
        (("name",), "../../evil", "name"),
        (("augment",), {"crop": 4000}, "augment.crop"),
        (("augment",), {"cutout": 33}, "augment.cutout"),
        (("augment",), {"cutmix": 1.5}, "augment.cutmix"),
        (("augment",), {"cutmix": True}, "augment.cutmix"),
        (("report_to",), ["nobody"], "report_to"),
        (("data",), {"name": "imagefolder"}, "data.path"),
        (("data",), {"name": "imagefolder", "path": "absent"}, "no file or folder"),
        (("data",), {"name": "imagefolder", "path": ".", "options": {"side": 3}}, "side"),
    ],
    ids=str,
)
def test_values_that_were_taken_in_silence(tmp_path, capsys, place, value, said):
    content = copy.deepcopy(MINIMAL)
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    assert run(["train", str(write(tmp_path, content)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_reports_of_runs_by_the_clock_are_refused(tmp_path, capsys):
    content = {**MINIMAL, "report_to": ["tensorboard"], "time_budget": "8m"}
    for change in ({}, {"time_budget": None}):
        path = write(tmp_path, {k: v for k, v in {**content, **change}.items() if v is not None})
        arguments = ["train", str(path), "--dry-run"]
        assert run([*arguments, *(["--time-budget", "8m"] if change else [])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "report_to" in error


def test_a_key_that_stands_twice_is_refused(tmp_path, capsys):
    path = write(tmp_path, yaml.safe_dump(MINIMAL) + "batch_size: 7\n")
    assert run(["train", str(path), "--dry-run"]) == 2
    assert "batch_size stands twice" in capsys.readouterr().err


def test_stages_of_a_base_that_share_an_anchor(tmp_path):
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    content["stages"] = [content["stages"][0]] * 2
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(content))
    assert "*id001" in (tmp_path / "base.yaml").read_text()
    change = "base: base.yaml\nname: x\ngradients: [{name: jfb}, {name: npg, steps: 2}]\n"
    recipe = load_recipe(write(tmp_path, change))
    assert [stage.gradient["name"] for stage in recipe.stages] == ["jfb", "npg"]


@pytest.mark.parametrize(
    "base",
    ["stages: [{epochs: 1}]\nmodel: 3\n", "stages: [3]\nmodel: {}\n", "stages: 3\n", "[" * 3000],
    ids=["model", "stage", "stages", "depth"],
)
def test_bases_of_another_kind(tmp_path, capsys, base):
    (tmp_path / "base.yaml").write_text(base)
    path = write(tmp_path, "base: base.yaml\nname: x\ngradients: [{name: jfb}]\n")
    assert run(["train", str(path), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

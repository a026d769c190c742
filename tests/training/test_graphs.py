"""Graphs and nodes in the engine of recipes, the table of folds, and a step that never waits."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from deqzoo import DEQModel
from deqzoo.cli import run
from deqzoo.data.graphs import honest_folds, load_graph_set
from deqzoo.errors import UserError
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.recipe import (
    Data,
    Evaluation,
    Model,
    Optimizer,
    Recipe,
    Schedule,
    Stage,
    load_recipe,
)
from deqzoo.tasks import build_task
from deqzoo.tasks.base import Plan, build_config
from deqzoo.training.best import BestWeights
from deqzoo.training.optimizers import build_optimizer
from deqzoo.training.run import run_recipe
from deqzoo.training.step import TrainingStep

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from scripts import load_script  # noqa: E402
from test_graphs import write_graph_set, write_ppi  # noqa: E402

table = load_script("benchmarks/ignn/table.py")
RECIPES = Path(__file__).parents[2] / "recipes"
UPG = {"name": "upg", "steps": 5, "damping": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    write_graph_set(folder / "TINY")
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    pytest.importorskip("networkx")
    folder = tmp_path_factory.mktemp("nodes")
    write_ppi(folder / "PPI" / "raw")
    return folder


def graph_recipe(**changes) -> Recipe:
    base = Recipe(
        name="tiny",
        task="graph-classification",
        data=Data("TINY"),
        model=Model("ignn", overrides={"gradient": UPG, "dropout": 0.3}),
        optimizer=Optimizer("adam", 1e-2),
        stages=(Stage(3, {"name": "fixed_point", "max_steps": 300, "tol": 1e-3}),),
        batch_size=8,
        schedule=Schedule("constant", warmup=0),
        evaluation=Evaluation(keep="best", snapshots=3),
        precision="float32",
    )
    return replace(base, **changes)


def node_recipe(**changes) -> Recipe:
    overrides = {"hidden_sizes": [8, 4], "skip_connections": True, "implicit_head": True}
    overrides |= {"normalization": "none", "kappa": 0.98, "dropout": 0.3}
    base = graph_recipe(
        name="ppi-test",
        task="node-classification",
        data=Data("PPI"),
        model=Model("ignn", overrides=overrides),
        stages=(Stage(4),),
        batch_size=1,
    )
    return replace(base, **changes)


def log_lines(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_fold_learns_and_keeps_its_best_epoch(root, tmp_path):
    recipe = graph_recipe(stages=(Stage(40),), model=Model("ignn"))
    model = DEQModel.from_pretrained(run_recipe(recipe, root, tmp_path, progress=False))
    record = json.loads((tmp_path / "record.json").read_text())
    losses = [line["loss"] for line in log_lines(tmp_path) if "loss" in line]
    assert min(losses) < 0.5 * losses[0]
    rows = record["validation"]
    assert len(rows) == 40 and record["best"]["accuracy"] == max(r["accuracy"] for r in rows)
    task = build_task(recipe, root)
    found = task.evaluate(model.eval(), recipe.stages[0], 1000)
    assert found["accuracy"] == record["best"]["accuracy"]
    assert found["negative_log_likelihood"] == pytest.approx(
        record["best"]["negative_log_likelihood"], rel=1e-4
    )
    assert all(layer.excess(1.0) == 0 for layer in model.implicit_layers)
    assert record["data"]["train"]["graphs"] == len(task.sizes) == 24
    assert 0 < record["pflop"] < 1e-4


def test_each_solve_begins_where_the_last_one_of_its_batch_ended(root):
    recipe = graph_recipe(model=Model("ignn", overrides={"dropout": 0.0}))
    task = build_task(recipe, root)
    torch.manual_seed(0)
    model = task.model().train()
    plan = Plan.of(recipe, task)
    assert plan.total == 9 and plan.position(5) == (1, 2)
    outputs = []
    for step in (0, 3):  # the same batch in two epochs
        outputs.append(model(**task.before_forward(model, task.batch(plan, step, 0, 1))))
        task.after_forward(outputs[-1])
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-3, atol=0)
    assert int(outputs[1].n_steps.max()) < int(outputs[0].n_steps.max()) / 2
    other = build_task(recipe, root)
    other.load_state_dict(task.state_dict())
    again = model(**other.before_forward(model, other.batch(plan, 6, 0, 1)))
    assert torch.equal(again.n_steps, outputs[1].n_steps) or again.n_steps.max() <= 3


@pytest.mark.parametrize("make, where", [(graph_recipe, "root"), (node_recipe, "nodes")])
def test_a_run_resumes_bit_for_bit(make, where, tmp_path, request):
    data, recipe = request.getfixturevalue(where), make()
    run_recipe(recipe, data, tmp_path / "whole", progress=False)
    steps = json.loads((tmp_path / "whole" / "record.json").read_text())["total_steps"]
    run_recipe(recipe, data, tmp_path / "cut", progress=False, max_steps=steps // 2)
    assert not json.loads((tmp_path / "cut" / "record.json").read_text())["finished"]
    run_recipe(recipe, data, tmp_path / "cut", progress=False, resume=True)
    whole, cut = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("whole", "cut"))
    for key in ("recipe", "data", "validation", "best", "pflop", "finished"):
        assert cut[key] == whole[key], key
    for name in ("whole", "cut"):
        assert len(list((tmp_path / name / "snapshots").glob("step-*"))) == 3
    first, second = (
        DEQModel.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("whole", "cut")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_node_run_evaluates_and_is_stored(nodes, tmp_path, monkeypatch, capsys):
    recipe = node_recipe(average=0.5)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(recipe.to_dict()))))
    command = ["train", str(file), "--data", str(nodes), "--quiet"]
    assert run([*command, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"] > 0 and planned["pflop"] > 0
    assert list(planned["commands"]) == ["one"]  # several processes are refused
    assert f"--data {nodes}" in planned["commands"]["one"]
    assert run([*command, "--output", str(tmp_path / "run")]) == 0
    assert "learning_rate" not in capsys.readouterr().out  # quiet
    model = tmp_path / "run" / "model"
    assert json.loads((model / "fold.json").read_text()) == {"data": "PPI"}
    snapshots = json.loads((tmp_path / "run" / "snapshots" / "config.json").read_text())
    assert snapshots["architectures"] == ["IGNNForNodeClassification"]
    target = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(model), "--data", str(nodes), "--split", "validation"]
    assert run([*arguments, "--output", str(target)]) == 0
    results = json.loads(target.read_text())["results"]
    best = json.loads((tmp_path / "run" / "record.json").read_text())["best"]
    assert results["micro_f1"] == pytest.approx(best["micro_f1"])
    threshold = json.loads((model / "config.json").read_text())["decision_threshold"]
    assert 0 < threshold < 1 and threshold != 0.5  # chosen with the weights
    monkeypatch.setattr("deqzoo.hub.store.checkpoints_root", lambda: tmp_path / "zoo")
    assert run(["store", str(tmp_path / "run"), "--data", str(nodes), "--force"]) == 0
    stored = tmp_path / "zoo" / "ppi-test"
    assert json.loads((stored / "training.json").read_text())["recipe"]["name"] == "ppi-test"


def test_the_record_of_version_0_1_names_the_data(tmp_path):
    from deqzoo.tasks.graphs import read_fold

    (tmp_path / "run.json").write_text('{"recipe": {"data": "HumLoc"}}')
    assert read_fold(tmp_path)["data"] == "HumLoc"
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="does not say what it was trained on"):
        read_fold(tmp_path)


def test_time_is_a_budget_for_graphs_too(root, tmp_path):
    stage = Stage(1, {"name": "fixed_point", "max_steps": 8, "tol": 0.0}, UPG)
    recipe = graph_recipe(time_budget="5s", stages=(stage,), average=0.9)
    model = DEQModel.from_pretrained(run_recipe(recipe, root, tmp_path, progress=False))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["finished"] and record["steps"] > 3 and record["best"]["step"] > 0
    assert all(layer.excess(1.0) == 0 for layer in model.implicit_layers)


GRADIENTS = [UPG, {"name": "npg", "steps": 3}, {"name": "jfb"}]


def make_step(device: str, recipe: Recipe, data: Path) -> TrainingStep:
    task = build_task(recipe, data)
    torch.manual_seed(0)
    model = task.model().to(device).train()
    average = copy.deepcopy(model)
    model.use_training_kernels()
    resident = task.resident(torch.device(device))
    optimizer = build_optimizer(model, recipe.optimizer, capturable=True)
    stage = recipe.stages[0]
    step = TrainingStep(task, recipe, stage, resident, model, average, optimizer, False)
    step.rows = resident.epoch(0, stage)[0].clone()
    return step


@pytest.mark.parametrize("solver", ["fixed_point", "anderson"])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("make, where", [(graph_recipe, "root"), (node_recipe, "nodes")])
def test_a_step_never_waits_for_the_device(
    never_waits, make, where, gradient, solver, request
) -> None:
    stage = Stage(1, {"name": solver, "max_steps": 4, "tol": 0.0}, gradient)
    optimizer = Optimizer("muon", 0.02, clip=1.0)
    recipe = make(stages=(stage,), optimizer=optimizer, average=0.9, accumulate=2)
    step = make_step("meta", recipe, request.getfixturevalue(where))
    with never_waits():
        step.run()


@pytest.mark.parametrize("make, where", [(graph_recipe, "root"), (node_recipe, "nodes")])
def test_padding_changes_no_gradient(make, where, request) -> None:
    """The resident batch, padded, against the plain one, whose solve starts from zero too."""
    stage = Stage(1, {"name": "fixed_point", "max_steps": 30, "tol": 0.0}, UPG)
    recipe = make(stages=(stage,), optimizer=Optimizer("sgd", 0.1))
    recipe = replace(recipe, model=replace(recipe.model, overrides={
        **recipe.model.overrides, "dropout": 0.0,
    }))  # fmt: skip
    step = make_step("cpu", recipe, request.getfixturevalue(where))
    for number in range(len(step.task.training)):
        loss = step.loss(torch.tensor([number]))
        mine = torch.autograd.grad(loss, list(step.model.parameters()), allow_unused=True)
        inputs = step.task.training[number].inputs(loss)
        starts = [torch.zeros(len(inputs["x"].features), s.shape[2]) for s in step.data.states]
        if inputs["x"].adjacency and step.task.config.known_radius is None:
            inputs["x"].adjacency._spectral_radius = step.data.radius
        out = step.model(
            **inputs, initial_states=starts, solver=stage.solver, gradient=stage.gradient
        )
        theirs = torch.autograd.grad(out.loss, list(step.model.parameters()), allow_unused=True)
        torch.testing.assert_close(loss, out.loss)
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson"])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
def test_fixed_steps_change_nothing_but_the_books(root, gradient, solver) -> None:
    """Also for Anderson, whose mixing weights are each graph's own."""
    recipe = graph_recipe(model=Model("ignn", overrides={"dropout": 0.0, "hidden_sizes": [8]}))
    task = build_task(recipe, root)
    torch.manual_seed(0)
    model = task.model().double().train()
    inputs = task.training[0].inputs(torch.zeros((), dtype=torch.float64))
    settings = {"solver": {"name": solver, "max_steps": 12, "tol": 0.0}, "gradient": gradient}
    found = []
    for enabled in (False, True):
        model.use_fixed_steps(enabled)
        out = model(**inputs, **settings)
        assert out.n_steps.shape == (8,)
        grads = torch.autograd.grad(out.loss, list(model.parameters()))
        found.append((out.loss.detach(), torch.cat([g.flatten() for g in grads])))
    (theirs, a), (mine, b) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=0)
    assert (a - b).norm() < 1e-6 * a.norm()


def test_the_best_weights_are_those_of_the_first_best_validation():
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace()
    best = BestWeights("perplexity")
    for step, value in enumerate((9.0, 5.0, 7.0)):
        torch.nn.init.constant_(model.weight, step)
        model.config.decision_threshold = 0.1 * step
        best.see(model, {"perplexity": value}, step)
    assert best.describe() == {"step": 1, "perplexity": 5.0}
    other = BestWeights("perplexity")
    other.load_state_dict(best.state_dict())
    for kept in (best, other):
        found = kept.applied(model)
        assert kept.step == 1 and float(found.weight.detach()) == 1.0
        assert found.config.decision_threshold == 0.1 and model.config.decision_threshold == 0.2


def test_figures_that_are_not_finite_are_never_the_best():
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace()
    for metric in ("perplexity", "accuracy"):
        best = BestWeights(metric)
        for step, value in enumerate((math.nan, 0.5, math.nan, math.inf)):
            best.see(model, {metric: value}, step)
        assert best.describe() == {"step": 1, metric: 0.5}


def test_ties_go_to_the_likelier_answers():
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace()
    best = BestWeights("accuracy")
    for step, nll in enumerate((0.5, 0.7, 0.4)):
        best.see(model, {"accuracy": 0.8, "negative_log_likelihood": nll}, step)
    assert best.step == 2


def test_a_step_of_the_schedule_halves_the_rate_at_once():
    from deqzoo.training.optimizers import build_schedule, rate_factor

    schedule = Schedule("step", warmup=0, at=0.25, final=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    rates = build_schedule(optimizer, schedule, 200).lr_lambdas[0]
    assert [rates(step) for step in (0, 49, 50, 199)] == [1.0, 1.0, 0.5, 0.5]
    assert [rate_factor(schedule, x) for x in (0.0, 0.24, 0.26)] == [1.0, 1.0, 0.5]


def test_table_resumes(root, tmp_path):
    fast = graph_recipe()
    jobs = [table.Job("published", "TINY", "npg-5-0.5", f) for f in (0, 1)]
    jobs.append(table.Job("honest", "TINY", "upg-5-0.5", 0))
    first = dict(table.run_table(root, tmp_path, jobs[:1], fast))
    assert list(first) == jobs[:1]
    second = dict(table.run_table(root, tmp_path, jobs, fast, processes=2))
    assert set(second) == set(jobs[1:]), "a finished fold was trained again"
    folds = table.collect(tmp_path)
    assert set(folds) == {job.key for job in jobs}
    result = folds[jobs[0].key]
    best = max(result["curves"]["accuracy"])
    assert result["best_test_accuracy"] == pytest.approx(best, abs=1e-5)
    fold = json.loads((tmp_path / "runs" / jobs[2].key / "model" / "fold.json").read_text())
    assert fold["test"] == honest_folds(load_graph_set("TINY", root).labels)[0].test
    text = table.render(folds)
    assert "2 of 10 folds" in text and "| TINY | NPG k=5 λ=0.5 |" in text


def test_jobs():
    jobs = table.all_jobs()
    assert len(jobs) == len(set(jobs)) == 400
    first = [job.key for job in jobs[:2]]
    assert first == ["COX2-upg-5-0.5-honest-0", "PROTEINS-upg-5-0.5-honest-0"]
    with pytest.raises(UserError, match="unknown method 'sgd'"):
        table.all_jobs(methods=["sgd"])


def test_cells():
    assert table.cell([]) == ""
    assert table.cell([0.8, 0.9] * 5) == "85.0 ± 5.3 (1.7)"  # ddof 1, standard error
    assert table.cell([0.8]) == "80.0, 1 of 10 folds"


def test_tables_of_cards_and_nodes(tmp_path):
    fold = {"data": "COX2", "method": "implicit", "protocol": "honest", "test_accuracy": 0.75}
    fold |= {"parameters": 27010, "cpu_seconds": 60.0, "peak_memory_mib": 900.0}
    notes = table.render_notes({"a": fold}, "COX2")
    assert (
        "### Ten folds of COX2" in notes and "| 75.0, 1 of 10 folds | 27,010 | 60 | 900 |" in notes
    )
    assert "PROTEINS" not in notes
    (tmp_path / "ignn-x" / "evaluation").mkdir(parents=True)
    for split, value in (("validation", 0.5), ("test", 0.25)):
        content = {
            "format": 2,
            "metric": "micro_f1",
            "data": {"name": "humloc"},
            "model": {"gradient": {"name": "implicit"}},
            "results": {"micro_f1": value, "n_steps_mean": 12.4},
        }
        file = tmp_path / "ignn-x" / "evaluation" / f"humloc-{split}.json"
        file.write_text(json.dumps(content))
    (tmp_path / "ignn-x" / "run.json").write_text('{"cpu_seconds": 9.6, "seconds": 20}')
    line = "| ignn-x | humloc | implicit | micro-F1 | 50.0 | 25.0 | 12 | 10 |"
    assert line in table.render_nodes([tmp_path / "ignn-x"])


def test_commands(root, tmp_path, capsys):
    """The table's script, and what can be done with the checkpoint that it leaves."""
    recipe = tmp_path / "fast.yaml"
    content = json.loads(json.dumps(graph_recipe().to_dict()))
    recipe.write_text(yaml.safe_dump(content))
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
    content["optimizer"]["lr"] = 0.5
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match="2"):
        table.main(again)
    assert "trained with other settings" in capsys.readouterr().err
    checkpoint = str(tmp_path / "folds" / "runs" / "TINY-upg-5-0.5-honest-0" / "model")
    result = json.loads((tmp_path / "folds" / "TINY-upg-5-0.5-honest-0.json").read_text())
    assert run(["predict-graphs", checkpoint, "--data", str(root), "--json"]) == 0
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = json.loads((Path(checkpoint) / "fold.json").read_text())
    assert [p["number"] for p in predictions] == stored["test"]
    right = sum(p["label"] == p["target"] for p in predictions) / len(predictions)
    assert right == pytest.approx(result["test_accuracy"])
    assert run(["predict-graphs", checkpoint, "--data", str(root), "--split", "all"]) == 0
    assert "of 30 as stored" in capsys.readouterr().out
    target = tmp_path / "evaluation.json"
    assert run(["evaluate", checkpoint, "--data", str(root), "--output", str(target)]) == 0
    content = json.loads(target.read_text())
    assert content["results"]["accuracy"] == pytest.approx(result["test_accuracy"])
    few = ["evaluate", checkpoint, "--data", str(root), "--output", str(target), "--limit", "2"]
    assert run(few) == 0
    part = json.loads(target.read_text())
    assert part["data"]["samples"] == part["data"]["limit"] == 2
    assert part["data"]["complete"] is False and part["command"].endswith("--limit 2")
    capsys.readouterr()
    assert run(["evaluate", checkpoint, "--output", str(target)]) == 2
    assert "--data" in capsys.readouterr().err


def test_commands_that_became_scripts_say_where_they_are(capsys):
    assert run(["ignn-table", "--data", "x", "--sets", "COX2"]) == 2
    assert "python benchmarks/ignn/table.py" in capsys.readouterr().err
    assert run(["train", "--queue", "recipes/QUEUE.yaml"]) == 2
    assert "python recipes/work.py recipes/QUEUE.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label_smoothing": 0.1}, "label_smoothing is no setting of graphs"),
        ({"compile": True}, "compile is no setting of graphs"),
        ({"stages": (Stage(1, shallow=True),)}, r"stages\[0\].shallow is no setting of graphs"),
        ({"data": Data("TINY", {"fold": 10})}, "data.options.fold must be below 10, got 10"),
        ({"data": Data("TINY", {"protocol": "x"})}, "must be honest or published, got 'x'"),
        ({"data": Data("TINY", {"seed": 1})}, "unknown key data.options.seed"),
        ({"data": Data("graphs", {"held_out": 1.5})}, "held_out must be a share"),
        ({"data": Data("NONE")}, "NONE"),
    ],
    ids=str,
)
def test_settings_that_are_none_of_graphs(root, change, message):
    with pytest.raises(UserError, match=message):
        build_task(graph_recipe(**change), root)


def test_settings_that_are_none_of_nodes(nodes, monkeypatch):
    for change, message in (
        ({"batch_size": 2}, "batch_size counts whole graphs here and must be 1, got 2"),
        ({"data": Data("Reddit")}, "unknown data set of nodes 'Reddit'"),
        ({"data": Data("PPI", {"fold": 1})}, "PPI has none"),
    ):
        with pytest.raises(UserError, match=message):
            build_task(node_recipe(**change), nodes)
    with pytest.raises(UserError, match="name it with --data"):
        build_task(node_recipe(), None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        build_task(node_recipe(), nodes)


@pytest.mark.parametrize(
    "text",
    [
        "{name: a, data: PPI, epochs: 3}",
        "{name: a, task: graph-classification, data: {name: graphs, path: x}, epochs: 3, lr: 1}",
    ],
)
def test_recipes_of_version_0_1_are_told_what_to_write(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="recipes/ignn-humloc-upg.yaml"):
        load_recipe(file)


def test_bundled_recipes_of_graphs():
    recipes = {path.stem: load_recipe(path) for path in RECIPES.glob("ignn-*.yaml")}
    assert len(recipes) == 12 and all(name == r.name for name, r in recipes.items())
    for recipe in recipes.values():
        config = build_config(IGNNConfig, recipe.model, num_features=3)
        assert config.gradient["name"] in recipe.name
    results = RECIPES.parent / "benchmarks" / "ignn"
    kept = json.loads((results / "results.json").read_text())["folds"]
    settings = kept["COX2-upg-5-0.5-honest-0"]["settings"]
    assert table.settings_of(recipes["ignn-cox2-upg"]) == settings
    assert table.settings_of(recipes["ignn-proteins-upg"]) == settings
    for name in ("mutag", "nci1"):
        tuned = json.loads((results / name / "results.json").read_text())["folds"].values()
        settings = table.settings_of(recipes[f"ignn-{name}-upg"])
        assert all(settings == fold["settings"] for fold in tuned)


def test_copies_of_a_graph_are_held_out_together(tmp_path):
    from torch_geometric.data import Data as Graph

    from deqzoo.tasks.graphs import own_fold

    edges = torch.tensor([[0, 1], [1, 0]])
    graphs = [
        Graph(x=torch.full((2, 1), float(i // 3)), edge_index=edges, y=i % 2) for i in range(24)
    ]
    torch.save(graphs, tmp_path / "own.pt")
    loaded, fold = own_fold(tmp_path / "own.pt", "graphs")
    parts = [{float(loaded.graphs[i].x[0]) for i in rows} for rows in (fold.train, fold.validation)]
    assert all(parts) and len(fold.train) + len(fold.validation) == 24
    keys = [
        {(float(loaded.graphs[i].x[0]), int(loaded.graphs[i].y)) for i in rows}
        for rows in (fold.train, fold.validation)
    ]
    assert keys[0].isdisjoint(keys[1])

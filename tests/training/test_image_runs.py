"""Training runs on a few random pictures: resumable, recorded, equal in two processes."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from killing import kills
from PIL import Image
from safetensors.torch import load_file

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.hub.store import store_run
from deqzoo.recipe import load_recipe
from deqzoo.tasks import augmentation, images
from deqzoo.tasks.base import Plan
from deqzoo.training import run as training_run
from deqzoo.training.checkpoints import latest_checkpoint
from deqzoo.training.estimate import _graphs, _history, estimate
from deqzoo.training.run import Keeper, build_task, run_recipe

RECIPE = {
    "name": "tiny",
    "task": "image-classification",
    "data": {"name": "cifar10"},
    "model": {
        "family": "mdeq",
        "preset": "mdeq-phantom-cifar-small",
        "overrides": {"dropout": 0.25, "solver": {"max_steps": 4}},
    },
    "precision": "float32",
    "optimizer": {"name": "muon", "lr": 0.02},
    "batch_size": 8,
    "average": 0.9,
    "augment": {"crop": 2, "flip": "alternating"},
    "evaluation": {"per_epoch": 0.5, "samples": 4, "snapshots": 3},
    "stages": [
        {
            "epochs": 1,
            "resolution": 8,
            "solver": {"name": "anderson", "max_steps": 2, "tol": 0},
            "gradient": {"name": "upg", "steps": 1},
            "jacobian": {"weight": 0.1, "every": 2},
        },
        {"epochs": 1, "resolution": 16, "gradient": {"name": "npg", "steps": 2}},
    ],
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return load_recipe(path)


NLL = "eval_negative_log_likelihood"


def losses(out: Path) -> dict[int, float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {e["step"]: e[NLL] for e in map(json.loads, lines) if NLL in e}


def test_run_starts_from_trained_weights(pictures, recipe, tmp_path):
    first = run_recipe(recipe, None, tmp_path / "first", progress=False)
    earlier = json.loads((tmp_path / "first" / "record.json").read_text())
    spent = earlier["pflop"]
    again = replace(
        recipe,
        model=replace(recipe.model, start=str(first)),
        optimizer=replace(recipe.optimizer, name="sgd", lr=0.0),
        average=0.0,
    )
    second = run_recipe(again, None, tmp_path / "second", progress=False)
    before, after = (load_file(f / "model.safetensors") for f in (first, second))
    assert all(torch.equal(before[k], after[k]) for k in before if k.endswith("weight"))
    record = json.loads((tmp_path / "second" / "record.json").read_text())
    assert record["pflop"] == pytest.approx(2 * spent, rel=0.05)
    assert record["pflop_inherited"] == spent
    n = len(earlier["validation"])
    assert record["validation"][:n] == earlier["validation"] and len(record["validation"]) > n
    wide = replace(again.model, overrides={**again.model.overrides, "final_channels": 64})
    with pytest.raises(UserError, match="do not fit the recipe's model"):
        run_recipe(replace(again, model=wide), None, tmp_path / "third", progress=False)
    lost = replace(again.model, start=str(tmp_path / "x" / "model"))
    with pytest.raises(UserError, match="train x first"):
        run_recipe(replace(again, model=lost), None, tmp_path / "fourth", progress=False)
    # A run by its name: beside the run that goes on from it, which needs it at the beginning only.
    named = replace(again, model=replace(again.model, start="runs/first/model"))
    run_recipe(named, None, tmp_path / "fifth", progress=False, max_steps=2)
    (tmp_path / "first").rename(tmp_path / "gone")
    run_recipe(named, None, tmp_path / "fifth", progress=False, resume=True)
    record = json.loads((tmp_path / "fifth" / "record.json").read_text())
    assert record["pflop_inherited"] == spent
    assert record["validation"][:n] == earlier["validation"]


def test_unfinished_run_is_no_start(pictures, recipe, tmp_path):
    run_recipe(recipe, None, tmp_path / "first", progress=False, max_steps=2)
    again = replace(recipe, model=replace(recipe.model, start="runs/first/model"))
    with pytest.raises(UserError, match="first is not finished"):
        run_recipe(again, None, tmp_path / "second", progress=False)
    # Nothing was trained in the folder: the corrected command need not clear it.
    run_recipe(recipe, None, tmp_path / "second", progress=False, max_steps=1)
    with pytest.raises(UserError, match="is not finished"):
        store_run(tmp_path / "first", None, name="x")


def test_run_leaves_weights_log_and_record(pictures, recipe, tmp_path):
    out = tmp_path / "run"
    folder = run_recipe(recipe, None, out, progress=False)
    record = json.loads((out / "record.json").read_text())
    assert record["finished"] and record["steps"] == 6 and record["pflop"] > 0
    assert record["data"]["train"]["fingerprint"] == "made"
    assert len(list((out / "snapshots").glob("*.safetensors"))) == 3
    model = DEQModel.from_pretrained(folder)
    assert model.dtype == torch.float32
    stored = load_file(folder / "model.safetensors")
    assert stored["classifier.weight"].dtype == torch.float16
    assert sorted(losses(out)) == [6]


def test_resumed_run_ends_bit_for_bit_alike(pictures, recipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_recipe(recipe, None, whole, progress=False)
    for stop in (1, 4, None):
        run_recipe(recipe, None, parts, resume=True, progress=False, max_steps=stop)
    a = load_file(whole / "model" / "model.safetensors")
    b = load_file(parts / "model" / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert losses(whole) == losses(parts)


def test_cut_off_checkpoint_is_passed_over(pictures, recipe, tmp_path):
    out = tmp_path / "run"
    run_recipe(recipe, None, out, progress=False, max_steps=3)
    for step in (5, 6):
        (out / "checkpoints" / f"checkpoint-{step}").mkdir()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run_recipe(recipe, None, out, resume=True, progress=False, max_steps=4)
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert left == ["checkpoint-3", "checkpoint-4"]
    run_recipe(recipe, None, out, resume=True, progress=False)
    assert json.loads((out / "record.json").read_text())["finished"]
    assert sorted(losses(out)) == [6]


def test_folder_in_use_keeps_its_stop_file(pictures, recipe, tmp_path):
    out = tmp_path / "run"
    run_recipe(recipe, None, out, progress=False, max_steps=1)
    (out / "stop").touch()
    with (out / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="by another process"):
            run_recipe(recipe, None, out, resume=True, progress=False)
    assert (out / "stop").exists()


def test_products_of_an_implicit_gradient_are_counted(pictures, recipe, tmp_path):
    def logged(name, gradient):
        stage = replace(recipe.stages[0], epochs=7, gradient=gradient, jacobian=None)
        run_recipe(replace(recipe, stages=(stage,)), None, tmp_path / name, progress=False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return next(line for line in map(json.loads, lines) if "loss" in line)

    jfb = logged("jfb", {"name": "jfb"})
    few, many = (
        logged(
            str(n), {"name": "implicit", "solver": {"name": "anderson", "max_steps": n, "tol": 0.0}}
        )
        for n in (2, 6)
    )
    assert jfb["evaluations"] == 5  # two solver steps, none that only measures, and 3
    assert few["evaluations"] == 9 and many["evaluations"] == 13
    assert jfb["pflop"] < few["pflop"] < many["pflop"]


def test_folder_of_another_run_is_refused(pictures, recipe, tmp_path):
    out = tmp_path / "run"
    run_recipe(recipe, None, out, progress=False, max_steps=1)
    with pytest.raises(UserError, match="already holds a run"):
        run_recipe(recipe, None, out, progress=False)
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "seed": 1}))
    with pytest.raises(UserError, match="another recipe"):
        run_recipe(load_recipe(path), None, out, resume=True, progress=False)
    (out / "recipe.json").write_text("")
    with pytest.raises(UserError, match=r"recipe.json is not valid JSON"):
        run_recipe(recipe, None, out, resume=True, progress=False)
    with pytest.raises(UserError, match="cannot make the folder .*: "):
        run_recipe(recipe, None, path, progress=False)


def test_alternating_flip_shows_each_side_in_turn():
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    rows = torch.tensor([0, 5])
    generator = torch.Generator()
    first, second, third = (
        augmentation.augment(pixels, rows, epoch, {"flip": "alternating"}, generator)
        for epoch in range(3)
    )
    assert torch.equal(first.flip(3), second)
    assert torch.equal(first, third)


def test_crops_keep_to_their_limits():
    generator = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(300):
        box = augmentation.random_box(400, 300, (0.1, 1.0), (0.8, 1.25), generator)
        left, top, width, height = box
        assert 0 <= left <= 400 - width and 0 <= top <= 300 - height
        shares.append(width * height / 120_000)
        ratios.append(width / height)
    assert min(shares) < 0.15 and max(shares) > 0.7 and min(shares) > 0.095
    assert 0.79 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.27
    assert augmentation.random_box(100, 10, (0.9, 1.0), (0.8, 1.25), generator) == (44, 0, 12, 10)


def test_random_crops_have_the_side_of_the_stage_and_stay_in_the_picture():
    # Brightness grows from left to right, so that a crop shows where it was taken.
    ramp = torch.arange(64, dtype=torch.uint8).expand(4, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    options = {"area": [0.2, 0.3], "aspect": [1.0, 1.0]}
    crops = augmentation.augment(ramp, torch.arange(4), 0, options, generator, 16)
    assert crops.shape == (4, 3, 16, 16) and crops.dtype == torch.uint8
    spans = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]).float() / 63
    assert 0.2**0.5 - 0.1 < spans.min() and spans.max() < 0.3**0.5
    assert len(crops[:, 0, 0, 0].unique()) > 1
    whole = augmentation.augment(
        ramp, torch.arange(4), 0, {"area": [1, 1], "aspect": [1, 1]}, generator
    )
    assert torch.equal(whole, ramp)


def test_unknown_augmentation_is_named():
    with pytest.raises(UserError, match="'zoom'; valid: area, aspect"):
        augmentation.check_augmentation({"zoom": 2}, ("area", "aspect"))


def test_photographs_in_memory_are_validated_as_the_processor_shows_them(monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 3, 256, 256), generator=generator, dtype=torch.uint8)
    names = images.IMAGENETTE.classes

    def load(split, data=None, **options):
        return images.Pictures(pixels, torch.arange(4), names, split, "made", False, "imagenette")

    monkeypatch.setitem(images.LOADERS, "imagenette", load)
    monkeypatch.setattr(images, "divide", lambda *_: (load("train"), load("validation")))
    model = {"family": "mdeq", "preset": "mdeq-phantom-imagenet-small"}
    path = tmp_path / "photographs.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": {"name": "imagenette"}, "model": model}))
    task = build_task(load_recipe(path), None)
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    expected = task.processor(pictures, return_tensors="pt")["pixel_values"]
    shown, labels = task._validation_batch(1, 4, 224)
    assert torch.allclose(shown, expected[1:], atol=1e-5)
    assert labels.tolist() == [1, 2, 3]
    smaller, _ = task._validation_batch(1, 4, 112)
    assert torch.allclose(smaller, augmentation.resize(expected[1:], 112), atol=1e-5)


def test_every_picture_once_per_epoch_and_ranks_share_a_batch(pictures, recipe):
    task = build_task(recipe, None)
    plan = Plan.of(recipe, task)
    assert (plan.total, plan.starts) == (6, (0, 3))
    labels = torch.cat([task.batch(plan, m, 0, 1)["labels"] for m in range(3)])
    assert torch.equal(labels.sort().values, task.training.labels.sort().values)
    whole = task.batch(plan, 4, 0, 1)
    assert whole["pixel_values"].shape == (8, 3, 16, 16)
    halves = [task.batch(plan, 4, rank, 2)["labels"] for rank in range(2)]
    assert torch.equal(whole["labels"], torch.cat(halves))


def test_estimate_grows_with_the_solver_budget(pictures, recipe, tmp_path):
    small = estimate(recipe, build_task(recipe, None))
    content = json.loads(json.dumps(RECIPE))
    content["stages"][0]["solver"]["max_steps"] = 12
    path = tmp_path / "larger.yaml"
    path.write_text(yaml.safe_dump(content))
    large = estimate(load_recipe(path), build_task(load_recipe(path), None))
    assert small["parameters"] == 158_986
    assert large["pflop"] > small["pflop"]


def test_stages_are_counted_with_the_settings_that_they_are_trained_with(
    pictures, recipe, tmp_path
):
    """A stage that names the config's own solver and gradient leaves the other settings alone."""
    own = {
        "solver": {"name": "anderson", "max_steps": 3, "tol": 0.0},
        "gradient": {"name": "upg", "steps": 2, "damping": 0.5},
    }
    model = replace(recipe.model, overrides={**recipe.model.overrides, **own})
    named = {key: {"name": settings["name"]} for key, settings in own.items()}
    stage = replace(recipe.stages[0], **named, jacobian=None)
    recipe = replace(recipe, model=model, stages=(replace(stage, epochs=7),), average=0.0)
    (found,) = estimate(recipe, build_task(recipe, None))["stages"]
    assert found["evaluations"] == 3 + 3 * 2  # none that only measures
    run_recipe(recipe, None, tmp_path / "run", progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [line["evaluations"] for line in map(json.loads, lines) if "evaluations" in line]
    assert logged == [found["evaluations"]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("gradient", [{"name": "unrolled"}, {"name": "unrolled", "steps": 5}])
def test_unrolled_steps_cost_their_graph(pictures, recipe, gradient, checkpointing):
    """Forward, product and weight gradients of each, and one evaluation that measures the end."""
    stage = replace(recipe.stages[0], gradient=gradient, jacobian=None)
    recipe = replace(recipe, stages=(stage,), gradient_checkpointing=checkpointing)
    task = build_task(recipe, None)
    n = gradient.get("steps", 2)  # the solver's max_steps
    (found,) = estimate(recipe, task)["stages"]
    assert found["evaluations"] == (4 if checkpointing else 3) * n + 1
    model = task.model()
    assert _graphs(stage, model) == n
    shallow = replace(stage, gradient={}, shallow=True)
    assert _history(stage, model) == _history(shallow, model) == 1


KILLABLE = """
import sys, torch
from deqzoo.tasks import images

def load(split, data=None):
    n = 24 if split == "train" else 8
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    names = images.CIFAR10.classes
    return images.Pictures(pixels, torch.arange(n) % 10, names, split, "made", False, "cifar10")

images.LOADERS["cifar10"] = load
images.divide = lambda *_: (load("train"), load("validation"))
from deqzoo.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_killed_process_goes_on(tmp_path):
    """SIGKILL in the middle of a run from the command line, then --resume."""
    recipe = json.loads(json.dumps(RECIPE))
    recipe["checkpoint_minutes"] = 0.0
    recipe["evaluation"] = {"per_epoch": 0.01, "samples": 4, "snapshots": 0}
    recipe["stages"][0]["epochs"] = 4
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-c", KILLABLE, "train", str(path)),
        *("--output", str(out), "--resume", "--quiet"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1500
    while not list(out.glob("checkpoints/*/complete")) and time.monotonic() < deadline:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert int(latest_checkpoint(out / "checkpoints").rsplit("-", 1)[1]) < 15
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((out / "record.json").read_text())["finished"]


def test_a_kill_while_saving_leaves_a_checkpoint_and_a_result(
    pictures, recipe, tmp_path, monkeypatch
):
    """At every step on the file system; the weights are those of before or after."""
    kept = []
    monkeypatch.setattr(training_run, "Keeper", lambda *a: kept.append(Keeper(*a)) or kept[-1])
    out = tmp_path / "run"
    run_recipe(recipe, None, out, progress=False, max_steps=2)
    keeper = kept[0]
    trainer = keeper.run
    weight = next(trainer.averaged().parameters())

    def save(step):
        with torch.no_grad():
            weight.fill_(10 * step)
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, None)
        keeper.keep()

    def prepare():
        shutil.rmtree(out / "checkpoints" / "checkpoint-3", ignore_errors=True)
        save(2)

    seen = set()
    for _ in kills(lambda: save(3), out, prepare):
        last = latest_checkpoint(out / "checkpoints")
        assert last.endswith(("-2", "-3"))
        found = load_file(out / "model" / "model.safetensors")
        values = {float(t.flatten()[0]) for t in found.values() if (t == t.flatten()[0]).all()}
        record = json.loads((out / "record.json").read_text())
        seen.add((int(last[-1]), *(values & {20.0, 30.0}), record["steps"]))
    assert seen == {(2, 20.0, 2), (3, 20.0, 2), (3, 30.0, 2), (3, 30.0, 3)}
    monkeypatch.undo()


def test_damaged_checkpoints_are_passed_over(pictures, recipe, tmp_path, caplog):
    out = tmp_path / "run"
    for stop in (2, 3):
        run_recipe(recipe, None, out, resume=True, progress=False, max_steps=stop)
    folder = out / "checkpoints"
    older, newer = folder / "checkpoint-2", folder / "checkpoint-3"
    names = {path.name for path in newer.iterdir()}
    assert {"scheduler.pt", "rng_state.pth", "optimizer.pt", "average.safetensors"} < names
    for name in sorted(names):
        path = newer / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damaged in (flipped, whole[:middle], b"{}", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            caplog.clear()
            assert latest_checkpoint(folder) == str(older), (name, damaged)
            said = [record.getMessage() for record in caplog.records]
            if damaged is not None or name != "complete":
                assert len(said) == 1 and "passed over" in said[0]
                assert name in said[0] or name == "complete"  # which may name a file falsely
            path.write_bytes(whole)
    assert latest_checkpoint(folder) == str(newer)
    (newer / "rng_state.pth").unlink()
    (older / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged; remove that folder"):
        run_recipe(recipe, None, out, resume=True, progress=False)
    assert newer.exists() and older.exists()


def test_resuming_under_other_conditions_needs_consent(
    pictures, recipe, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    run_recipe(recipe, None, out, progress=False, max_steps=2)

    def go_on(recipe=recipe, **options):
        run_recipe(recipe, None, out, resume=True, progress=False, **options)

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    with pytest.raises(UserError, match=rf"threads was {threads}, is {threads + 1}.*--accept-ch"):
        go_on()
    torch.set_num_threads(threads)

    load = images.LOADERS["cifar10"]

    def others(split, *arguments, **options):
        found = load(split, *arguments, **options)
        return replace(found, fingerprint="others")

    monkeypatch.setattr(images, "divide", lambda *_: (others("train"), load("validation")))
    with pytest.raises(UserError, match=r'data.train.fingerprint was "made", is "others"'):
        go_on()
    slower = replace(recipe, optimizer=replace(recipe.optimizer, lr=0.01))
    with pytest.raises(UserError, match=r"optimizer.lr was 0.02, is 0.01"):
        go_on(slower)
    go_on(slower, accept_changes=True, max_steps=3)
    go_on(slower)  # what was accepted is no difference any more
    changes = json.loads((out / "record.json").read_text())["changes"]
    assert [change["step"] for change in changes] == [2]
    said = " ".join(changes[0]["changed"])
    assert "recipe.optimizer.lr" in said and "fingerprint" in said and "threads" not in said


def test_means_in_the_log_cover_no_interval_that_a_resume_cut(pictures, recipe, tmp_path):
    """Every checkpoint ends an interval, so the lines of a resumed run are whole."""
    out = tmp_path / "run"
    run_recipe(recipe, None, out, progress=False, max_steps=2)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [2]

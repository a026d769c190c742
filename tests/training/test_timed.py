"""Runs that end when their time does."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.recipe import Data, Evaluation, Jacobian, Model, Optimizer, Recipe, Schedule, seconds_of
from deqzoo.recipe import Stage as StageSettings
from deqzoo.tasks.augmentation import cropped, cutmix, random_boxes
from deqzoo.tasks.images import ImageClassificationTask
from deqzoo.training import run, timed
from deqzoo.training.clock import TimeBudget
from deqzoo.training.optimizers import rate_factor
from deqzoo.training.run import run_recipe
from deqzoo.training.step import TrainingStep

SOLVER = {"name": "fixed_point", "max_steps": 2, "tol": 0.0}
SMALL = {"channels": [8, 16], "head_channels": [4, 8], "final_channels": 16, "num_groups": 4}


def make_recipe(**changes) -> Recipe:
    upg = {"name": "upg", "steps": 1, "damping": 1.0}
    base = Recipe(
        name="timed",
        task="image-classification",
        data=Data("cifar10"),
        model=Model(
            "mdeq",
            "mdeq-phantom-cifar-small",
            {**SMALL, "dropout": 0.1, "solver": {"max_steps": 3}},
        ),
        optimizer=Optimizer("muon", 0.02),
        stages=(
            StageSettings(1, SOLVER, upg, 8, Jacobian(0.1, 2, difference=0.1)),
            StageSettings(3, {"name": "anderson", "max_steps": 3, "tol": 1e-3}, upg, 16),
        ),
        batch_size=8,
        precision="float32",
        average=0.9,
        augment={"crop": 2, "flip": "alternating", "cutout": 4},
        evaluation=Evaluation(samples=4, snapshots=3),
        time_budget="2s",
    )
    return replace(base, **changes)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_best_weights_are_chosen_among_validations_of_one_size(pictures, tmp_path) -> None:
    """A last validation of more samples is another figure, not a better or worse one."""
    recipe = make_recipe(time_budget="6s", evaluation=Evaluation(samples=1000, keep="best"))
    run_recipe(recipe, None, tmp_path / "run", progress=False)
    samples = [
        entry["eval_samples"] for entry in lines(tmp_path / "run") if "eval_samples" in entry
    ]
    assert len(samples) == 2 and len({*samples}) == 1


def test_files_of_others_stay_where_they_are(pictures, tmp_path) -> None:
    for name in ("model/source.py", "metrics.jsonl", "checkpoints/checkpoint-5/weights"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(UserError, match="of no run of a recipe: it would be replaced"):
            run_recipe(make_recipe(), None, out, progress=False)
        assert (out / name).read_text() == "mine"


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch) -> None:
    from deqzoo.training import lock

    with lock.lock(tmp_path), pytest.raises(UserError, match="by another process"):
        with lock.lock(tmp_path):
            pass

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.lock(tmp_path):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.lock(tmp_path, ".other"):
        assert (tmp_path / ".other").is_file()


def test_a_rank_that_was_left_behind_is_no_launch(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run._is_first_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not run._is_first_process()


def test_a_deadline_before_the_first_step_is_said(pictures, tmp_path) -> None:
    with pytest.raises(UserError, match="give more seconds to --deadline"):
        run_recipe(make_recipe(), None, tmp_path / "run", progress=False, deadline=0.01)


def test_a_run_ends_with_its_time_evaluated_and_at_rate_zero(pictures, tmp_path, capsys) -> None:
    # Long enough for some steps of each stage on a machine that is busy with other work.
    recipe = make_recipe(time_budget="6s")
    model = run_recipe(recipe, None, tmp_path / "run")
    printed = capsys.readouterr()
    assert "eval_accuracy" in printed.out and "%|" not in printed.err  # no bar in a file
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["finished"] and record["steps"] > 2
    assert 5.0 <= record["training_seconds"] < 60.0
    assert record["samples_per_second"] > 0 and record["pflop"] > 0 and record["epochs"] > 0
    share = record["tflops"] / record["floor_tflops"]  # rounded to four places
    assert 0 < record["floor_share"] < 1 and abs(record["floor_share"] - share) < 0.01
    entries = lines(tmp_path / "run")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["stage"] for entry in steps] == sorted(entry["stage"] for entry in steps)
    assert {entry["stage"] for entry in steps} == {0, 1}
    assert steps[-1]["learning_rate"] < 0.2 * 0.02
    assert "jacobian_penalty" in steps[0] and "eval_accuracy" in entries[-1]
    assert DEQModel.from_pretrained(model).config.dropout == 0.1
    assert len(list((tmp_path / "run" / "snapshots").glob("step-*"))) >= 2


def test_a_run_goes_on_where_it_was_stopped(pictures, tmp_path) -> None:
    recipe, out = make_recipe(time_budget="1h"), tmp_path / "run"
    run_recipe(recipe, None, out, progress=False, max_steps=3)
    record = json.loads((out / "record.json").read_text())
    assert not record["finished"] and record["steps"] == 3
    with pytest.raises(UserError, match="add --resume"):
        run_recipe(recipe, None, out, progress=False)
    run_recipe(recipe, None, out, progress=False, resume=True, max_steps=5)
    run_recipe(recipe, None, tmp_path / "whole", progress=False, max_steps=5)
    one, two = (load_file(f / "model" / "model.safetensors") for f in (out, tmp_path / "whole"))
    # The rate follows the clock, which differs by seconds of an hour.
    for name, tensor in one.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, two[name], rtol=0.02, atol=2e-3)


def test_a_run_goes_on_with_another_time(pictures, tmp_path) -> None:
    out = tmp_path / "run"
    run_recipe(make_recipe(time_budget="1h"), None, out, progress=False, max_steps=2)
    shorter = make_recipe(time_budget="4s")
    with pytest.raises(UserError, match="time_budget"):
        run_recipe(shorter, None, out, progress=False, resume=True)
    run_recipe(shorter, None, out, progress=False, resume=True, accept_changes=True)
    record = json.loads((out / "record.json").read_text())
    assert record["finished"] and record["time_budget_seconds"] == 4.0
    assert lines(out)[-2]["learning_rate"] < 0.02 * 0.5


def test_a_batch_larger_than_the_data_is_one_line(pictures, tmp_path) -> None:
    with pytest.raises(UserError, match="a batch of 64 is more than the training data hold"):
        run_recipe(make_recipe(batch_size=64), None, tmp_path / "run", progress=False)


def test_a_deadline_cuts_the_training_time(pictures, tmp_path) -> None:
    out = tmp_path / "run"
    run_recipe(make_recipe(time_budget="1h"), None, out, progress=False, deadline=3.0)
    record = json.loads((out / "record.json").read_text())
    assert record["finished"] and record["training_seconds"] < 10


def spoil(monkeypatch, spoilt) -> None:
    """Let the loss be infinite in the steps that `spoilt` (of their numbers) says."""
    loss, number = TrainingStep.loss, iter(range(10**9))

    def spoilt_loss(self, rows):
        value = loss(self, rows)
        return value * torch.inf if spoilt(next(number)) else value

    monkeypatch.setattr(TrainingStep, "loss", spoilt_loss)
    monkeypatch.setattr(timed, "LOG_SECONDS", 0.0)


def test_a_run_that_diverges_goes_back_and_slows_down(pictures, tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, lambda number: number in (2, 3))
    recipe = make_recipe(time_budget="1h", schedule=Schedule("constant", warmup=0.0))
    model = run_recipe(recipe, None, tmp_path / "run", progress=False, max_steps=6)
    entries = lines(tmp_path / "run")
    factors = [e["learning_rate_factor"] for e in entries if e.get("event") == "diverged"]
    assert factors == [0.5, 0.25]
    rates = [e["learning_rate"] for e in entries if "loss" in e]
    assert rates[0] == pytest.approx(0.02) and rates[-1] == pytest.approx(0.005)
    DEQModel.from_pretrained(model)  # refuses weights that are not finite
    run_recipe(recipe, None, tmp_path / "run", progress=False, resume=True, max_steps=7)
    assert lines(tmp_path / "run")[-1]["learning_rate"] == pytest.approx(0.005)


def test_a_run_that_only_diverges_ends_in_one_line(pictures, tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, lambda number: number > 1)
    with pytest.raises(UserError, match="diverges, even with 0.0625 of its learning rate"):
        run_recipe(make_recipe(time_budget="1h"), None, tmp_path / "run", progress=False)
    DEQModel.from_pretrained(tmp_path / "run" / "model")


def test_a_run_by_epochs_that_diverges_ends_in_one_line(
    pictures, tmp_path, monkeypatch, capsys
) -> None:
    def loss(self, outputs, batch):
        return outputs.loss * torch.inf

    monkeypatch.setattr(ImageClassificationTask, "loss", loss)
    with pytest.raises(UserError, match="the training has diverged"):
        run_recipe(make_recipe(time_budget=None), None, tmp_path / "run")
    assert "%|" not in capsys.readouterr().err  # no bar in a file


def test_a_map_that_does_not_compile_is_no_end(pictures, tmp_path, monkeypatch) -> None:
    def fails(self, stage, rows, dtype):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(timed.TimedRun, "_compare", fails)
    run_recipe(make_recipe(compile=True, time_budget="6s"), None, tmp_path / "run", progress=False)
    entries = lines(tmp_path / "run")
    assert "no compiler here" in next(e["error"] for e in entries if "error" in e)
    assert [e["map_compiled"] for e in entries if "map_compiled" in e] == [False, False]


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_a_compiled_map_that_disagrees_is_left_out(pictures, tmp_path, monkeypatch, off) -> None:
    """Gradients are held against float32: noise of bfloat16 is allowed, a wrong one is not."""
    exact = F.normalize(torch.randn(1000, generator=torch.Generator().manual_seed(0)), dim=0)
    noise = F.normalize(torch.randn(1000, generator=torch.Generator().manual_seed(1)), dim=0)
    wrong = F.normalize(torch.randn(1000, generator=torch.Generator().manual_seed(2)), dim=0)

    def gradient(self, stage, rows, compiled, dtype):
        return 1.0, exact + 0.3 * noise * (dtype is not None) + off * 2 * wrong * compiled

    monkeypatch.setattr(timed.TimedRun, "_gradient", gradient)
    monkeypatch.setattr(timed.TimedRun, "_stage", lambda *_: None)
    run = timed.TimedRun.__new__(timed.TimedRun)
    run.count, run.progress, run.out = 0, False, tmp_path
    run.model = torch.nn.Linear(999, 1)
    if off:
        with pytest.raises(RuntimeError, match="disagrees"):
            run._compare(None, None, torch.bfloat16)
    else:
        run._compare(None, None, torch.bfloat16)
    (entry,) = lines(tmp_path)
    plain, compiled = entry["worst"]["cosines"]
    assert entry["worst"]["parameter"] in ("weight", "bias") and (compiled < 0.9) == bool(off)


def test_the_budget_counts_training_only() -> None:
    now = [0.0]
    budget = TimeBudget(100.0, [1, 3], clock=lambda: now[0])
    with budget.running():
        assert budget.stage == 0
        now[0] = 30.0
        assert budget.stage == 1 and budget.progress == pytest.approx(0.3)
        with budget.paused():
            now[0] = 500.0
    now[0] = 1000.0
    with budget.running():
        assert budget.progress == pytest.approx(0.3)
        now[0] += 20.0
        budget.shorten(10.0)
        assert budget.progress == pytest.approx(50 / 60)
        now[0] += 10.0
        assert budget.stage is None and budget.progress == 1.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("8m", 480), ("1.5h", 5400), (" 7 ", 7), (2.5, 2.5)]
)
def test_times_are_read(text, seconds) -> None:
    assert seconds_of(text, "time_budget") == seconds


@pytest.mark.parametrize("text", ["", "8 minutes", "-3s", "0", "nan", "m"])
def test_other_times_are_refused(text) -> None:
    with pytest.raises(UserError, match="time_budget is a time such as 90s"):
        seconds_of(text, "time_budget")


def test_the_rate_ends_at_zero_whatever_the_throughput() -> None:
    schedule = Schedule("linear", 0.1)
    assert rate_factor(schedule, 0.05) == pytest.approx(0.5)
    assert rate_factor(schedule, 1.0) == pytest.approx(0.0)
    assert rate_factor(Schedule("cosine", 0.0), 0.5) == pytest.approx(0.5)
    assert rate_factor(Schedule("constant", 0.0), 0.9) == 1.0


def test_boxes_are_parts_of_the_picture_of_the_wanted_shape() -> None:
    torch.manual_seed(0)
    boxes = random_boxes(500, 60, 40, (0.2, 0.8), (0.75, 4 / 3), None, torch.device("cpu"))
    left, top, w, h = boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (left + w <= 60).all() and (top + h <= 40).all()
    share = (w * h) / 2400
    assert share.min() > 0.17 and share.max() < 0.83 and share.std() > 0.1
    assert (w / h).min() > 0.68 and (w / h).max() < 1.46
    impossible = random_boxes(3, 100, 10, (0.9, 1.0), (0.8, 1.25), None, torch.device("cpu"))
    assert impossible.tolist() == [[44, 0, 12, 10]] * 3


def test_labels_are_shared_as_the_pictures_are() -> None:
    n, labels = 400, torch.arange(400) % 7
    pixels = labels.reshape(n, 1, 1, 1).expand(n, 3, 20, 30).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    mixed, shares = cutmix(pixels, labels, 7, 0.75, generator)
    seen = F.one_hot(mixed[:, 0].long(), 7).float().mean((1, 2))
    torch.testing.assert_close(shares, seen)
    torch.testing.assert_close(shares.sum(1), torch.ones(n))
    own = shares.gather(1, labels[:, None]).squeeze(1)
    assert 0.65 < (own < 1).float().mean() < 0.8 and own.min() < 0.2
    # A box that reaches over the edge is cut there, so that less than half is lost in the mean.
    assert 0.5 < own[own < 1].mean() < 0.7
    same, whole = cutmix(pixels, labels, 7, 0.0, generator)
    assert (same == pixels).all() and (whole == F.one_hot(labels, 7)).all()


@pytest.mark.parametrize(
    "box", [(0, 0, 12, 9), (3, 2, 5, 5), (1, 0, 10, 4), (11, 8, 1, 1)], ids=str
)
def test_a_scaled_box_is_that_of_torch(box) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(256, (2, 3, 9, 12), dtype=torch.uint8)
    left, top, w, h = box
    part = pixels[..., top : top + h, left : left + w].float()
    expected = F.interpolate(part, size=(6, 6), mode="bilinear", antialias=True)
    found = cropped(pixels, torch.tensor([box, box]).float(), 6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.02)

"""The command for one rented GPU, end to end on a CPU with small models."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from scripts import load_script

from deqzoo import DEQModel

one_gpu = load_script("benchmarks/one_gpu.py")

SOLVER = {"name": "fixed_point", "max_steps": 2, "tol": 0.0}
RECIPE = {
    "name": "small",
    "task": "image-classification",
    "data": {"name": "cifar10"},
    "model": {
        "family": "mdeq",
        "preset": "mdeq-phantom-cifar-small",
        "overrides": {
            "channels": [8, 16], "head_channels": [4, 8], "final_channels": 16, "num_groups": 4,
            "dropout": 0.0, "solver": {"max_steps": 3},
        },
    },
    "optimizer": {"name": "muon", "lr": 0.02},
    "stages": [{"epochs": 1, "resolution": 16, "solver": SOLVER, "gradient": {"name": "jfb"}}],
    "batch_size": 8,
    "precision": "float32",
    "evaluation": {"samples": 4, "snapshots": 0},
    "time_budget": "1s",
}  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["one_gpu.py", *map(str, arguments)])
    one_gpu.main()


def test_a_run_leaves_what_is_needed(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    out, work = tmp_path / "out", tmp_path / "work" / "run"
    cost = load_script_of_costs(monkeypatch)
    monkeypatch.setattr(cost, "MODELS", {"mdeq-phantom-cifar-small": ("MDEQ", 2, 2, 1)})
    monkeypatch.setattr(one_gpu, "STARTED", one_gpu.time.monotonic())
    with pytest.raises(SystemExit) as end:
        call(
            monkeypatch, "run", recipe, "--data", cifar_folder, "--output", out, "--work", work,
            "--deadline", "1h",
        )  # fmt: skip
    assert end.value.code == 0
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["data"]["split"] == "test" and evaluation["data"]["samples"] == 40
    cells = json.loads((out / "costs.json").read_text())["cells"]
    assert len(cells) == len(cost.modes(2))
    assert all(cell["step_seconds"] >= cell["backward_seconds"] / 2 > 0 for cell in cells.values())
    files = sorted(out.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size <= 16 * 2**20 for file in files)
    unpacked = unpack(out, tmp_path / "unpacked")
    assert json.loads((unpacked / "record.json").read_text())["finished"]
    assert (unpacked / "metrics.jsonl").read_text()
    assert DEQModel.from_pretrained(unpacked / "model").config.image_size == 32


def unpack(out: Path, folder: Path) -> Path:
    """What the parts of `run.tar` hold."""
    whole = out.parent / f"{out.name}.tar"
    whole.write_bytes(b"".join(f.read_bytes() for f in sorted(out.glob("run.tar.*"))))
    with tarfile.open(whole) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_several_recipes_share_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One that fails costs the others nothing."""
    files, ends = [], {}
    for name in ("first", "broken", "last"):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({**RECIPE, "name": name}))

    def run(recipe, data, folder, out, until):
        ends[recipe.name] = until
        assert folder.name == out.name == recipe.name
        if recipe.name == "broken":
            raise RuntimeError("no luck")

    monkeypatch.setattr(one_gpu, "run", run)
    monkeypatch.setattr(one_gpu, "costs", lambda out, seconds: None)
    monkeypatch.setattr(one_gpu, "STARTED", one_gpu.time.monotonic())
    with pytest.raises(SystemExit) as end:
        call(
            monkeypatch, "run", *files, "--deadline", "100h", "--shares", 1, 1, 2,
            "--output", tmp_path / "out", "--work", tmp_path / "work",
        )  # fmt: skip
    assert end.value.code == 1 and "broken: failed" in capsys.readouterr().out
    # Each takes its share of what is left; the others took no time here.
    hours = [ends[name] / 3600 for name in ("first", "broken", "last")]
    assert hours == pytest.approx([25, 100 / 3, 100], abs=0.2)


def test_shares_are_one_per_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    for shares in ((1, 2), (0,)):
        with pytest.raises(SystemExit) as end:
            call(monkeypatch, "run", recipe, "--shares", *shares)
        assert end.value.code == 2 and "--shares needs 1" in capsys.readouterr().err


def load_script_of_costs(monkeypatch: pytest.MonkeyPatch):
    """The study that `costs` imports, as it finds it."""
    monkeypatch.syspath_prepend(str(Path(one_gpu.__file__).parent / "studies"))
    import cost

    return cost


def test_a_trial_tells_each_stage(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    call(
        monkeypatch, "trial", recipe, "--data", cifar_folder, "--work", tmp_path / "work" / "trial",
        "--seconds", "1",
    )  # fmt: skip
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [line["step_is"] for line in lines if line.get("event") == "stage"] == ["eager"]


def test_data_in_parts_become_one_folder(cifar_folder: Path, tmp_path: Path, capsys) -> None:
    parts = [tmp_path / "a" / "plain_text", tmp_path / "b" / "plain_text"]
    for part, split in zip(parts, ("train", "test"), strict=True):
        part.mkdir(parents=True)
        name = f"{split}-00000-of-00001.parquet"
        (part / name).write_bytes((cifar_folder / "plain_text" / name).read_bytes())
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "b" / "plain_text", "plain_text")
    for second in (tmp_path / "b", tmp_path / "b.tar"):
        folder = one_gpu.gather([tmp_path / "a", second], tmp_path / "data")
        found = sorted(file.name for file in folder.rglob("*.parquet"))
        assert found == ["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]
    assert one_gpu.gather([cifar_folder], tmp_path / "data") == cifar_folder
    with pytest.raises(SystemExit) as end:
        one_gpu.gather([tmp_path / "a", tmp_path / "c"], tmp_path / "data")
    assert end.value.code == 2 and "there is no" in capsys.readouterr().err


def test_what_takes_too_long_is_left_out(capsys) -> None:
    before = one_gpu.signal.getsignal(one_gpu.signal.SIGALRM)
    began = one_gpu.time.monotonic()
    with one_gpu.within(0.2, "evaluation"):
        one_gpu.time.sleep(600)
    assert one_gpu.time.monotonic() - began < 60
    assert "evaluation: stopped, the time was over" in capsys.readouterr().out
    assert one_gpu.signal.getsignal(one_gpu.signal.SIGALRM) == before


def test_missing_packages_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(one_gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "trial", tmp_path / "small.yaml")
    assert end.value.code == 2 and "pip install pyarrow pillow" in capsys.readouterr().err

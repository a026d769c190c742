"""Gradients of two processes, and of accumulated batches, equal those of one whole batch."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deqzoo.errors import UserError
from deqzoo.recipe import load_recipe
from deqzoo.training.run import run_recipe

sys.path.insert(0, str(Path(__file__).parent))
from test_image_runs import KILLABLE, RECIPE  # noqa: E402

SCRIPT = Path(__file__).with_name("two_processes.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(arguments: list[object], processes: int) -> None:
    command = [sys.executable, *(LAUNCH if processes == 2 else []), str(SCRIPT)]
    command += map(str, arguments)
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[-2000:]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gradients of all families: whole, accumulated, and of two processes."""
    folder = tmp_path_factory.mktemp("gradients")
    whole, accumulated, processes = (folder / n for n in ("whole", "accumulated", "processes"))
    for part in (whole, accumulated, processes):
        part.mkdir()
    launch([whole, accumulated], processes=1)
    launch([processes], processes=2)
    return folder


@pytest.mark.parametrize("family", ["text", "images", "graphs"])
def test_parts_of_a_batch_add_up(family: str, gradients: Path) -> None:
    whole = load_file(gradients / "whole" / f"{family}.safetensors")
    assert sum(float(g.abs().sum()) for g in whole.values()) > 0
    for name in ("accumulated", "processes"):
        parts = load_file(gradients / name / f"{family}.safetensors")
        assert parts.keys() == whole.keys()
        for key, gradient in whole.items():
            atol = 1e-4 * float(gradient.abs().max()) + 1e-7
            torch.testing.assert_close(
                parts[key], gradient, rtol=1e-3, atol=atol, msg=f"{name} {key}"
            )


def test_a_recipe_runs_in_two_processes_and_resumes(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(KILLABLE)
    recipe = copy.deepcopy(RECIPE)
    recipe["checkpoint_minutes"] = 0.0  # each process has a clock of its own; they must agree
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    command = [*(sys.executable, *LAUNCH, str(script), "train", str(path)), "--resume", "--quiet"]
    command += ["--output", str(out)]
    for extra, steps in ((["--max-steps", "2"], 2), ([], 6)):
        subprocess.run([*command, *extra], check=True, capture_output=True, env=ENVIRONMENT)
        record = json.loads((out / "record.json").read_text())
        assert (record["steps"], record["processes"]) == (steps, 2)
    assert record["finished"] and record["peak_memory_mib"] > 0
    states = sorted(p.name for p in (out / "checkpoints" / "checkpoint-6").glob("deqzoo_state*"))
    assert states == ["deqzoo_state_0.pt", "deqzoo_state_1.pt"]


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size 8 is no multiple of 3 processes"):
        run_recipe(load_recipe(path), None, tmp_path / "run")

"""The example of an own solver and an own gradient; and that models take both as they are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from deqzoo import DEQModel
from deqzoo.cli import run
from deqzoo.equilibrium import GRADIENTS, SOLVERS, UPG, Anderson, fixed_point, gradient_fidelity

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_parts.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_parts", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_parts"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tiny_mdeq: Path):
    return DEQModel.from_pretrained(tiny_mdeq).eval()


def linear(size: int = 8):
    torch.manual_seed(0)
    weight = torch.randn(size, size, dtype=torch.float64)
    weight = 0.45 * (weight + weight.T) / torch.linalg.matrix_norm(weight + weight.T, 2)
    return weight, torch.randn(6, size, dtype=torch.float64)


def test_heavy_ball_finds_the_solution_alone_and_in_a_compacted_batch(example) -> None:
    weight, x = linear()
    exact = torch.linalg.solve(torch.eye(8, dtype=x.dtype) - weight, x.T).T
    x[0] = exact[0] = 0  # solved at once: leaves a compacted batch first
    solver = example.HeavyBall(max_steps=200, tol=1e-10, stop_mode="abs")
    for compact in (False, True):
        with torch.no_grad():
            found = fixed_point(
                lambda h, x: h @ weight.T + x, torch.zeros_like(x), x,
                solver=solver, compact=compact,
            )  # fmt: skip
        assert found.converged.all()
        torch.testing.assert_close(found.state, exact, rtol=0, atol=1e-9)


def test_cesaro_sums_the_series_with_falling_weights(example) -> None:
    weight, x = linear()
    x.requires_grad_()
    solver = {"name": "anderson", "tol": 1e-12, "max_steps": 100}
    found = fixed_point(
        lambda h: h @ weight.T + x, torch.zeros_like(x),
        solver=solver, gradient=example.Cesaro(4),
    )  # fmt: skip
    cotangent = torch.randn_like(x)
    found.state.backward(cotangent)
    expected, term = torch.zeros_like(x), cotangent
    for t in range(4):
        expected += (1 - t / 4) * term
        term = term @ weight
    torch.testing.assert_close(x.grad, expected)


def test_models_use_own_parts_and_subclasses_as_they_are(example, model, monkeypatch) -> None:
    started, attached = [], []

    @dataclass(frozen=True)
    class Watched(Anderson):
        def start(self, matrix, layout):
            started.append(self.max_steps)
            return super().start(matrix, layout)

    @dataclass(frozen=True)
    class Own(UPG):
        def attach(self, problem, state):
            attached.append(self.steps)
            return super().attach(problem, state)

    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    model(**batch, solver=Watched(max_steps=7), gradient=Own(steps=3)).loss.backward()
    assert started == [7] and attached == [3]
    gradient_fidelity(model, batch, [Own(steps=2)], solver=Watched(max_steps=9), exact="jfb")
    assert started[-1] == 9 and attached[-1] == 2
    output = model(pixels, solver=example.HeavyBall(max_steps=300, tol=1e-4))
    torch.testing.assert_close(
        output.logits, model(pixels, solver={"tol": 1e-4, "max_steps": 300}).logits,
        rtol=0, atol=1e-2,
    )  # fmt: skip

    # A config knows parts by name only: what it could not find again is refused.
    for wrong in (Watched(), example.HeavyBall()):
        with pytest.raises(ValueError, match="SOLVERS"):
            model.set_solver(wrong)
    with pytest.raises(ValueError, match="GRADIENTS"):
        model.set_gradient(example.Cesaro())
    monkeypatch.setitem(SOLVERS, "heavy_ball", example.HeavyBall)
    monkeypatch.setitem(GRADIENTS, "cesaro", example.Cesaro)
    model.set_solver(example.HeavyBall(), max_steps=11)
    model.set_gradient("cesaro", terms=2)
    assert model.config.solver["max_steps"] == 11 and model.config.solver["momentum"] == 0.2
    assert model(pixels).n_steps.max() <= 11


def test_settings_may_be_dicts_and_objects(model) -> None:
    model.set_solver({"name": "broyden", "max_steps": 5}, tol=0.1)
    assert model.config.solver["name"] == "broyden" and model.config.solver["max_steps"] == 5
    model.set_solver(Anderson(max_steps=6))
    assert model.config.solver == Anderson(max_steps=6).to_dict()
    model.set_gradient(UPG(steps=3))
    model.set_gradient({"damping": 0.25})
    assert model.config.gradient == {"name": "upg", "steps": 3, "damping": 0.25}
    with pytest.raises(ValueError, match="momentum"):
        model.set_solver({"momentum": 1})


def test_example_runs_and_answers_mistakes_in_a_line(example, tiny_mdeq, capsys) -> None:
    example.main(["--model", str(tiny_mdeq)])
    said = capsys.readouterr().out
    assert "heavy_ball" in said and "cesaro: terms 6" in said
    done = subprocess.run(
        [sys.executable, EXAMPLE, "absent.png"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_recipe_trains_with_a_solver_of_ones_own(example, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(SOLVERS, "heavy_ball", example.HeavyBall)
    path, file = EXAMPLE.parents[1] / "recipes" / "mdeq-tiny-cifar-upg.yaml", tmp_path / "mine.yaml"
    recipe = yaml.safe_load(path.read_text())
    (stage, *_) = recipe["stages"]
    stage["solver"] = {"name": "heavy_ball", "max_steps": 7, "tol": 0.0}
    recipe["stages"] = [stage]
    file.write_text(yaml.safe_dump(recipe))
    assert run(["train", str(file), "--dry-run"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["stages"]
    assert planned["steps"] > 0 and planned["evaluations"] > 7
    stage["solver"]["name"] = "heavy_bell"
    file.write_text(yaml.safe_dump(recipe))
    assert run(["train", str(file), "--dry-run"]) == 2
    assert "heavy_ball" in capsys.readouterr().err  # one of those to choose from

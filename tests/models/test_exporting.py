"""Exported programs answer as the model with that many solver steps does."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch

import deqzoo
from deqzoo.cli import run
from deqzoo.equilibrium import Causal, Segments, make_solver
from deqzoo.equilibrium.fixed import fixed_steps
from deqzoo.equilibrium.solvers.traced import traced_solution
from deqzoo.errors import UserError
from deqzoo.models.exporting import export_model


def outputs(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    if path.suffix == ".pt2":
        with torch.no_grad():
            return list(torch.export.load(path).module()(*inputs))
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feed)]


def needs_onnx(suffix: str) -> None:
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    """Any number of pictures; where residuals fall, the solver returns the last iterate too."""
    needs_onnx(suffix)
    model = deqzoo.DEQModel.from_pretrained("mdeq-tiny-cifar-upg").eval()
    path = tmp_path / f"tiny{suffix}"
    export_model(model, path, 4)
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, residual = outputs(path, x)
    with torch.no_grad():
        expected = model(x, solver={"max_steps": 4, "tol": 0.0})
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual, expected.residual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_texts(tmp_path: Path, suffix: str) -> None:
    """Every token mixes by what precedes it, so that padding behind a text changes nothing."""
    needs_onnx(suffix)
    model = deqzoo.DEQModel.from_pretrained("deq-transformer-ptb-upg").eval()
    path = tmp_path / f"ptb{suffix}"
    export_model(model, path, 4, size=6)
    words = torch.randint(0, 10000, (3, 6), generator=torch.Generator().manual_seed(0))
    logits, _ = outputs(path, words)
    with torch.no_grad():
        f, start = model.equilibrium_map(words)
        state = fixed_steps(f, start, 4, window=6, layout=Causal())
        expected = model.lm_head(state)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    padded = words.clone()
    padded[:, 4:] = 0
    torch.testing.assert_close(outputs(path, padded)[0][:, :4], logits[:, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", ["ignn-cox2-upg", "ignn-humloc-upg"])
def test_graphs(tmp_path: Path, suffix: str, name: str) -> None:
    """One graph with any number of nodes and weighted edges, parallel and missing ones too."""
    needs_onnx(suffix)
    model = deqzoo.DEQModel.from_pretrained(name).eval()
    path = tmp_path / f"graph{suffix}"
    export_model(model, path, 6)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(9, model.config.num_features, generator=draw)  # the last node has no edge
    there = torch.tensor([[0, 1, 2, 3, 4, 6, 1], [1, 2, 3, 4, 0, 7, 2]])
    edges = torch.cat((there, there.flip(0)), 1)
    weight = torch.rand(7, generator=draw).repeat(2)
    logits, residual = outputs(path, x, edges, weight)
    with torch.no_grad():
        expected = model(x, edges, weight, solver={"max_steps": 6, "tol": 0.0})
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual, expected.residual, rtol=1e-3, atol=1e-6)


def test_graphs_mix_as_wholes() -> None:
    """With Anderson's mixing a program of several graphs does what the solver does."""
    layout = Segments(torch.tensor([0, 0, 1, 1, 1]), 2)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 4
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ weight + z.roll(1, 1) / 4 + x)

    solver = make_solver({"name": "anderson", "max_steps": 5, "tol": 0.0, "damping": 0.9})
    found, expected = (
        traced_solution(f, torch.zeros(5, 4), solver, layout),
        solver.solve(f, torch.zeros(5, 4), layout),
    )
    torch.testing.assert_close(found.state, expected.state)
    torch.testing.assert_close(found.residual, expected.residual)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sample per call where asked for; the file says what it is."""
    path = tmp_path / "one.pt2"
    arguments = ["--steps", "2", "--batch", "1", "--solver", "fixed_point", "--size", "16"]
    assert run(["export", "mdeq-tiny-cifar-upg", *arguments, "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    extra = {"deqzoo.json": ""}
    program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    facts = json.loads(extra["deqzoo.json"])
    assert facts["solver"] == "fixed_point" and facts["steps"] == 2
    assert facts["inputs"] == {"pixel_values": [1, 3, 16, 16]}
    logits, _ = program.module()(torch.zeros(1, 3, 16, 16))
    assert logits.shape == (1, 10)
    assert zipfile.is_zipfile(path)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("mdeq-tiny-cifar-upg", ["--output", "model.pt"], ".pt2"),
        ("mdeq-tiny-cifar-upg", ["--output", "nowhere/model.pt2"], "does not exist"),
        ("mdeq-tiny-cifar-upg", ["--output", "model.pt2", "--solver", "broyden"], "anderson"),
        ("mdeq-tiny-cifar-upg", ["--output", "model.pt2", "--size", "15"], "multiples of"),
        ("ignn-cox2-upg", ["--output", "model.pt2", "--batch", "2"], "leave batch and size out"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    model: str, arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(["export", model, "--steps", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_folder_in_the_place_of_the_file_stays(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / f"model{suffix}"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(UserError, match="is a folder; name a file"):
        export_model(deqzoo.DEQModel, folder, 2)
    assert (folder / "precious").is_file()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript; .*'deqzoo\[export\]'"):
        export_model(deqzoo.DEQModel, tmp_path / "model.onnx", 2)


def test_graphs_that_are_measured_first_are_refused(tmp_path: Path) -> None:
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[4], directed=True, num_labels=2)
    with pytest.raises(UserError, match="spectral radius"):
        export_model(deqzoo.IGNNForNodeClassification(config), tmp_path / "model.pt2", 2)

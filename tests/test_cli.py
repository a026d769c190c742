"""The command line: results on stdout, mistakes as one line on stderr and exit code 2."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

import deqzoo
from deqzoo import cli
from deqzoo.cli import run
from deqzoo.zoo import own_name

PICTURE = Path(__file__).resolve().parents[1] / "examples" / "pictures" / "chelsea.png"

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
CAT = PICTURES / "chelsea.png"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; its one line on stderr."""
    assert run([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("deqzoo: ")
    assert printed.out == ""
    return printed.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"deqzoo {deqzoo.__version__}\n"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "classify" in capsys.readouterr().out


def test_help_groups_the_commands_and_cuts_no_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert "..." not in text.split("Options:")[1]
    places = [text.index(f"{group}:") for group in cli.GROUPS]
    assert places == sorted(places) and "Other commands" not in text
    assert places[0] < text.index("classify") < places[1] < text.index("evaluate")


def test_shells_complete_model_names() -> None:
    environment = dict(os.environ, _DEQZOO_COMPLETE="complete_bash", COMP_CWORD="2",
                       COMP_WORDS="deqzoo info mdeq-t")  # fmt: skip
    code = "import sys; sys.argv = ['deqzoo']; from deqzoo.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["mdeq-tiny-cifar-upg"]


def test_python_m_prints_one_line_on_mistakes() -> None:
    command = [sys.executable, "-m", "deqzoo", "classify", "--nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    # Other installed libraries may say something of their own as they are imported.
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("deqzoo: ")]
    assert "--nonsense" in line and "Traceback" not in done.stderr


def test_names_in_another_encoding_and_signs_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9-\xcf\x81")
    deqzoo.IGNNConfig(num_features=3, hidden_sizes=[8]).save_pretrained(folder)
    for encoding in ("utf-8", "cp1252"):
        done = subprocess.run(
            [sys.executable, "-m", "deqzoo", "info", folder],
            env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shown = "ρ".encode() if encoding == "utf-8" else b"\\u03c1"
        assert b"caf\\udce9-" + shown in done.stdout


@pytest.mark.parametrize("module", ["deqzoo.cli", "typer", "torch", "transformers", "PIL.Image"])
def test_ctrl_c_while_importing_ends_in_one_line(module: str) -> None:
    """The signal comes as the module is looked for, whatever imports it."""
    code = f"""
import signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
sys.meta_path.insert(0, Interrupt())
sys.argv = ["deqzoo", "classify", {str(PICTURE)!r}]
from deqzoo.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    # A machine that is busy with other work is told what takes so long.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("loading PyTorch")]
    assert lines == ["deqzoo: interrupted"]


def test_list_and_info(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    assert "mdeq-test" in capsys.readouterr().out
    assert run(["list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "mdeq-test" and row["task"] == "image classification"
    model = deqzoo.DEQModel.from_pretrained("mdeq-test")
    assert row["parameters"] >= model.num_parameters()
    assert run(["info", "deqzoo/mdeq-test"]) == 0
    assert "MDEQForImageClassification" in capsys.readouterr().out


def picture_of_mode(mode: str) -> Image.Image:
    colour = Image.open(CAT).resize((75, 50))
    if mode == "I;16":
        grey = np.asarray(colour.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(grey)
    return colour.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("P", "gif"), ("L", "png"), ("RGBA", "png"), ("I;16", "png"), ("1", "png"), ("CMYK", "jpg")],
)
def test_classify_takes_every_mode(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, suffix: str
) -> None:
    path = tmp_path / f"picture.{suffix}"
    picture_of_mode(mode).save(path)
    assert run(["classify", str(path), "--model", "mdeq-test", "--json", "--top-k", "10"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(row["probability"] for row in result["labels"]) == pytest.approx(1, abs=1e-5)


def test_classify_several_agrees_with_one_and_shows_the_solver(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [str(CAT), str(PICTURES / "ship.jpg")]
    assert run(["classify", *pictures, "--model", "mdeq-test", "--json", "--top-k", "3"]) == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in both] == pictures and len(both[0]["labels"]) == 3
    assert run(["classify", pictures[1], "--model", "mdeq-test", "--json", "--top-k", "3"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["n_steps"] == both[1]["n_steps"] > 0
    assert alone["labels"][0]["probability"] == pytest.approx(
        both[1]["labels"][0]["probability"], abs=1e-3
    )
    assert run(["classify", str(CAT), "--model", "mdeq-test"]) == 0
    text = capsys.readouterr().out
    assert "steps, relative residual" in text and "converged" in text


def test_no_answer_is_made_up_where_no_state_is_finite(
    overflowing_mdeq: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["classify", str(CAT), "--model", str(overflowing_mdeq)]) == 0
    text = capsys.readouterr().out
    assert "no answer" in text and "not converged" in text and "%" not in text
    assert run(["classify", str(CAT), "--model", str(overflowing_mdeq), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["labels"] == [] and result["converged"] is False and result["residual"] is None
    classifier = pipeline("image-classification", model=str(overflowing_mdeq))
    assert all(math.isnan(row["score"]) for row in classifier(str(CAT)))


def test_every_picture_that_is_named_is_answered_and_no_drawing_breaks_json(zoo, capsys) -> None:
    command = ["classify", str(CAT), str(CAT), "--model", "mdeq-test", "--json"]
    assert run(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == [str(CAT)] * 2
    assert run([*command, "--trace", "-"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "name a file for the trace" in printed.err


def test_classify_goes_on_after_a_bad_picture(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "deep/a.jpg", ".hidden.png"):
        Image.open(CAT).convert("RGB").resize((40, 40)).save(folder / name)
    (folder / "broken.png").write_text("no picture")
    (folder / "notes.txt").write_text("no picture either")
    assert run(["classify", str(folder), str(CAT), "--model", "mdeq-test", "--json"]) == 1
    out, err = capsys.readouterr()
    files = [json.loads(line)["file"] for line in out.splitlines()]
    assert files == [str(folder / "b.png"), str(folder / "deep/a.jpg"), str(CAT)]
    assert err.count("\n") == 1 and "broken.png is no picture" in err
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(CAT.read_bytes())))
    assert run(["classify", "-", "--model", "mdeq-test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "-"


def test_classify_with_another_solver(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["classify", str(CAT), "--model", "mdeq-test"]
    options = ["--solver", "fixed_point", "--max-steps", "3", "--tol", "0"]
    assert run([*common, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_steps"] == 3
    assert run([*common, *options, "--trace", "-"]) == 0
    bars = [line for line in capsys.readouterr().out.splitlines() if "#" in line]
    assert [line.split()[0] for line in bars] == ["1", "2", "3"]
    for suffix in ("svg", "csv", "json"):
        assert run([*common, *options, "--trace", str(tmp_path / f"t.{suffix}")]) == 0
    assert len(json.loads((tmp_path / "t.json").read_text())[str(CAT)]) == 3
    assert (tmp_path / "t.csv").read_text().count("\n") == 4
    assert "<svg" in (tmp_path / "t.svg").read_text()
    capsys.readouterr()
    assert "unknown solver" in fails(capsys, *common, "--solver", "newton")
    assert ".svg" in fails(capsys, *common, "--trace", tmp_path / "t.png")


def test_exif_rotation_is_undone(zoo: Path, tmp_path: Path, capsys) -> None:
    upright = Image.open(CAT).convert("RGB").resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    files = [str(tmp_path / "turned.png"), str(tmp_path / "upright.png")]
    assert run(["classify", *files, "--model", "mdeq-test", "--json"]) == 0
    turned, plain = map(json.loads, capsys.readouterr().out.splitlines())
    assert turned["labels"][0]["probability"] == pytest.approx(
        plain["labels"][0]["probability"], abs=1e-4
    )


def test_bad_pictures(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(CAT.read_bytes()[:5000])
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert "empty" in fails(capsys, "classify", tmp_path / "empty.png")
    assert "no picture" in fails(capsys, "classify", tmp_path / "text.png")
    assert "cut.png" in fails(capsys, "classify", tmp_path / "cut.png")
    (tmp_path / "folder").mkdir()
    assert "holds no pictures" in fails(capsys, "classify", tmp_path / "folder")
    assert "pillow-heif" in fails(capsys, "classify", tmp_path / "phone.HEIC")
    assert "address" in fails(capsys, "classify", "https://example.org/cat.png")
    assert "does not exist" in fails(capsys, "classify", tmp_path / "absent.png")


def test_bad_models(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean mdeq-test?" in fails(capsys, "classify", CAT, "--model", "mdeq-tets")
    assert "config.json" in fails(capsys, "classify", CAT, "--model", tmp_path)
    base = tmp_path / "features"
    deqzoo.MDEQModel(deqzoo.MDEQConfig()).save_pretrained(base)
    assert "classify pictures" in fails(capsys, "classify", CAT, "--model", base)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "nonsense"),
        (["classify"], "images"),
        (["classify", "x.png", "--top-k", "0"], "top-k"),
        (["classify", "x.png", "--top-k", "many"], "top-k"),
        (["info"], "name"),
        (["info", "a", "b"], "b"),
        (["evaluate", "x", "--nonsense"], "--nonsense"),
        (["convert", "mdeq"], "source"),
        (["convert", "resnet", "x", "--config", "c", "--output", "o"], "resnet"),
        (["evaluate", "x", "--limit", "3"], "--output"),
        (["train", "x", "--seed", "-1"], "--seed"),
        (["train", "x", "--seed", str(2**32)], "--seed"),
        (["finetune", "x", "--data", "x", "--output", "x", "--seed", str(2**32)], "--seed"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], expected) -> None:
    assert expected in fails(capsys, *arguments).lower()


def test_convert_writes_a_folder_that_classifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Path(__file__).parent / "golden" / "mdeq"
    tensors = load_file(golden / "cifar_tiny.safetensors")
    official = {
        key.removeprefix("sd."): value for key, value in tensors.items() if key[:3] == "sd."
    }
    save_file(official, tmp_path / "official.safetensors")
    arguments = ["convert", "mdeq", tmp_path / "official.safetensors", "--output", tmp_path / "out"]
    assert run([*map(str, arguments), "--config", str(golden / "cifar_tiny.json")]) == 0
    assert run(["classify", str(CAT), "--model", str(tmp_path / "out")]) == 0
    assert "relative residual" in capsys.readouterr().out
    assert "resnet" in fails(capsys, *arguments, "--config", "resnet")


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_full_disk_is_one_line(tmp_path: Path, capsys, monkeypatch, save) -> None:
    """The size of files is limited, which libraries meet in the same way."""
    resource = pytest.importorskip("resource")

    def writes(**_: object) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            save({"weight": torch.zeros(100_000)}, tmp_path / "weights")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr("deqzoo.cli.app", writes)
    assert run(["train"]) == 2
    error = capsys.readouterr().err
    assert "make room" in error and error.count("\n") == 1


def test_evaluate_replaces_evaluations_only(tmp_path: Path, capsys) -> None:
    precious = tmp_path / "model.safetensors"
    precious.write_bytes(b"weights")
    assert run(["evaluate", "mdeq-tiny-cifar-upg", "--output", str(precious)]) == 2
    assert "no evaluation file" in capsys.readouterr().err and precious.read_bytes() == b"weights"


def test_evaluate_looks_at_its_own_place_first(
    zoo: Path, cifar_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """What cannot be written is no reason to lose the figures of an hour."""
    model = tmp_path / "mine"
    shutil.copytree(zoo / "mdeq-test", model)
    monkeypatch.setattr(deqzoo.MDEQForImageClassification, "forward", None)  # nothing is measured
    arguments = ["evaluate", str(model), "--data", str(cifar_folder)]
    shutil.rmtree(model / "evaluation", ignore_errors=True)
    (model / "evaluation").write_text("a file")
    assert run(arguments) == 2 and "no folder that can be written to" in capsys.readouterr().err
    (model / "evaluation").unlink()
    (model / "evaluation").mkdir()
    (model / "evaluation" / "cifar10-test.json").write_text('{"format"')
    assert run(arguments) == 2 and "cifar10-test.json" in capsys.readouterr().err
    monkeypatch.undo()
    (model / "evaluation" / "cifar10-test.json").rename(model / "evaluation" / "other-test.json")
    assert run(arguments) == 0  # figures of other data are in nobody's way


def test_a_model_in_the_working_folder_has_its_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    names = [own_name(name) for name in (".", "../mine/", "deqzoo/mdeq-x", Path("."))]
    assert names == ["mine", "mine", "mdeq-x", "mine"]


def test_evaluate_writes_the_file(
    zoo: Path, cifar_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "evaluation.json"
    arguments = ["evaluate", "mdeq-test", "--data", str(cifar_folder), "--output", str(output)]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert "% on cifar10 test" in printed.out and "%|" not in printed.err  # no bar in a file
    content = json.loads(output.read_text())
    assert content["data"]["samples"] == 40 and content["data"]["complete"] is False
    assert content["budget"] is None  # only where it is asked for
    assert content["command"] == "deqzoo evaluate mdeq-test --split test"
    assert run([*arguments, "--limit", "4", "--budget"]) == 0
    content = json.loads(output.read_text())
    assert content["budget"]["samples"] == 4
    assert [row["max_steps"] for row in content["budget"]["steps"]] == [2, 4, 8, 16, 30]


def test_an_interrupted_evaluation_keeps_what_it_has(
    zoo: Path, cifar_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    output = tmp_path / "evaluation.json"
    arguments = ["evaluate", "mdeq-test", "--data", str(cifar_folder), "--output", str(output)]
    forward, calls = deqzoo.MDEQForImageClassification.forward, []

    def interrupted(self, *values, **keywords):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return forward(self, *values, **keywords)

    monkeypatch.setattr(deqzoo.MDEQForImageClassification, "forward", interrupted)
    limit = 3  # of four batches
    assert run([*arguments, "--batch-size", "10"]) == 130
    content = json.loads(output.read_text())
    assert content["data"]["samples"] == 20 and content["data"]["complete"] is False
    assert 0 <= content["results"]["accuracy"] <= 1
    assert str(output) in capsys.readouterr().err
    calls.clear()
    limit = 5  # the figures, the budget's own, two of its rows
    assert run([*arguments, "--batch-size", "40", "--budget"]) == 130
    content = json.loads(output.read_text())
    assert content["data"]["samples"] == 40
    assert [row["max_steps"] for row in content["budget"]["steps"]] == [2, 4]


def test_evaluate_without_the_data(zoo: Path, tmp_path: Path, capsys) -> None:
    message = fails(capsys, "evaluate", "mdeq-test", "--data", tmp_path)
    assert "does not hold CIFAR-10" in message
    assert "no split" in fails(capsys, "evaluate", "mdeq-test", "--split", "dev")
    message = fails(capsys, "evaluate", "mdeq-test", "--device", "abacus")
    assert "cannot use device 'abacus'" in message
    assert "holds no numbers" in fails(capsys, "evaluate", "mdeq-test", "--device", "meta")
    assert "is a folder" in fails(capsys, "evaluate", "mdeq-test", "--output", tmp_path)
    message = fails(capsys, "evaluate", "mdeq-test", "--output", CAT / "x.json")
    assert "no folder that can be written to" in message
    assert "not at hand" in fails(capsys, "evaluate", "mdeq-test")

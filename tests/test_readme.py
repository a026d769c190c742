"""README: its Python examples run, and what its commands name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from deqzoo import DEQModel
from deqzoo.cli import run
from deqzoo.data.pictures import read_picture
from deqzoo.evaluation.classify import classify
from deqzoo.evaluation.watch import training_memory, watch
from deqzoo.hub.cards import rendered_files
from deqzoo.hub.catalogue import entry

ROOT = Path(__file__).parents[1]
PICTURES = sorted((ROOT / "examples" / "pictures").iterdir())
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def words(text: str) -> list[str]:
    """A printed text without numbers and classes, which other weights and machines change."""
    for name in ("mdeq-tiny-cifar-upg", "ignn-proteins-upg"):
        for label in entry(name).config["label2id"]:
            text = re.sub(rf"\b{label}\b", "LABEL", text)
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "0", text).split()


def test_examples_print_what_readme_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after another, as a reader would run them."""
    monkeypatch.chdir(ROOT)
    scope: dict[str, object] = {}
    assert len(EXAMPLES) >= 4
    for number, example in enumerate(EXAMPLES, start=1):
        said = re.findall(r"^# (.*)$", example, flags=re.MULTILINE)
        assert said, f"README example {number} shows no output"
        exec(compile(example, f"README example {number}", "exec"), scope)
        assert words(capsys.readouterr().out) == words("\n".join(said))


def test_first_command_prints_what_readme_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (picture,) = re.findall(r"deqzoo classify (\S+)", README)
    (shown,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert run(["classify", picture]) == 0
    printed = capsys.readouterr().out
    assert "not converged" not in printed
    assert words(printed) == words(shown)
    assert printed.split()[1] == shown.split()[1]  # the answer itself


def test_readme_counts_the_pictures_that_are_named_right() -> None:
    ((right, of),) = re.findall(r"names (\d+) of these (\d+)\s+pictures right", README)
    model = DEQModel.from_pretrained("mdeq-tiny-cifar-upg")
    labels = {path: {"chelsea": "cat"}.get(path.stem, path.stem) for path in PICTURES}
    known = [path for path in PICTURES if labels[path] in model.config.label2id]
    found = classify(model, [read_picture(path) for path in known], top_k=1)
    named = [c.labels[0][0] == labels[path] for path, c in zip(known, found, strict=True)]
    assert (sum(named), len(known)) == (int(right), int(of))


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_cards_and_table_are_up_to_date() -> None:
    def stored(path: Path) -> str:
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    stale = [path.name for path, text in rendered_files(ROOT).items() if stored(path) != text]
    assert not stale, "run `deqzoo cards`"


def test_first_command_names_a_bundled_picture() -> None:
    (command,) = re.findall(r"deqzoo classify (\S+)", README)
    assert (ROOT / command).is_file()


def test_showcase_moves(tiny_mdeq: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("showcase", ROOT / "examples" / "showcase.py")
    showcase = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(showcase)
    pictures = [str(path) for path in PICTURES[:3]]
    output = tmp_path / "docs" / "showcase.gif"
    showcase.main([*pictures, "--model", str(tiny_mdeq), "--output", str(output)])
    with Image.open(output) as image:
        assert image.size == (showcase.WIDTH, showcase.HEIGHT)
        assert image.n_frames >= len(showcase.DEPTHS)  # equal frames become one
        assert len(image.convert("RGB").getcolors(maxcolors=100_000)) > 100  # pictures are there


def test_memory_stays_flat_as_an_equilibrium(tiny_mdeq: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq).eval()
    size = model.config.image_size
    found = training_memory(model, torch.randn(1, 3, size, size), torch.tensor([1]), (2, 4, 8))
    flat, growing = found["equilibrium"], found["unrolled"]
    assert len(set(flat)) == 1
    assert growing[2] - growing[1] == pytest.approx(2 * (growing[1] - growing[0]), rel=0.01)


def test_watched_answers_are_those_of_the_model(tiny_mdeq: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq).eval()
    size = model.config.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    settings = {"name": "anderson", "max_steps": 40, "tol": 1e-4}
    found = watch(model, pixels, settings)
    with torch.no_grad():
        output = model(pixel_values=pixels, solver=settings)
    torch.testing.assert_close(found.final, output.logits.softmax(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.probabilities[-1], found.final)
    assert found.n_steps.tolist() == output.n_steps.tolist()
    plain = watch(model, pixels, {"name": "fixed_point", "max_steps": 6, "tol": 0.0})
    for index in range(3):
        best = plain.residuals[plain.best_step(index) - 1, index]
        assert best == plain.residuals[:, index].min() == plain.residual[index]

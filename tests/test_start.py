"""What an import or a short command loads, by modules: seconds depend on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deqzoo.evaluation.options import Waiting

PICTURE = Path(__file__).parents[1] / "examples" / "pictures" / "chelsea.png"

HEAVY = {"torch", "transformers", "numpy", "scipy", "accelerate", "datasets", "sklearn", "PIL"}
SHOW = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"


def loaded(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{SHOW}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_imports_nothing_heavy() -> None:
    assert not loaded("import deqzoo") & HEAVY


def test_the_core_imports_torch_only() -> None:
    third_party = loaded("import deqzoo.equilibrium") - loaded("import torch")
    assert third_party - set(sys.stdlib_module_names) == {"deqzoo"}


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["list"], ["info", "mdeq-tiny-cifar-upg"], ["classify", "--help"]],
)
def test_short_commands_load_no_framework(arguments: list[str]) -> None:
    assert not loaded(f"from deqzoo.cli import run; assert run({arguments}) == 0") & HEAVY


@pytest.mark.parametrize(
    "statement",
    [
        "import deqzoo; from transformers import AutoConfig, AutoModel",
        "from transformers import AutoConfig, AutoModel; import deqzoo",
        "import transformers, deqzoo; from transformers import AutoConfig, AutoModel",
    ],
)
def test_families_are_known_in_any_order_of_imports(statement: str) -> None:
    """And the zoo's names, with the classes of transformers."""
    checks = """
from transformers import AutoModelForImageClassification as Images
assert type(AutoConfig.for_model("ignn")).__name__ == "IGNNConfig"
assert AutoConfig.from_pretrained("mdeq-tiny-cifar-upg").model_type == "mdeq"
assert type(AutoModel.from_config(AutoConfig.for_model("mdeq"))).__name__ == "MDEQModel"
assert type(Images.from_pretrained("deqzoo/mdeq-tiny-cifar-upg")).__name__.startswith("MDEQFor")
"""
    assert "transformers" in loaded(statement + checks)


def test_graph_commands_are_silent_about_what_other_packages_deprecate() -> None:
    pytest.importorskip("torch_geometric")
    done = subprocess.run(
        [sys.executable, "-m", "deqzoo", "predict-graphs", "ignn-proteins-upg", str(PICTURE)],
        capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert done.returncode == 2 and len(said) == 1 and "chelsea.png" in said[0]


def test_a_torchvision_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    reason = "operator torchvision::nms does not exist"
    (broken / "__init__.py").write_text(f"raise RuntimeError({reason!r})")
    info = tmp_path / "torchvision-0.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    places = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "deqzoo", "classify", str(PICTURE)],
        env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        pytest.skip("this transformers does not import torchvision")
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert done.returncode == 2 and reason in line and "pip uninstall torchvision" in line


def test_a_long_wait_says_what_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Waiting("loading nothing ..."):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Waiting, "after", 0.1)
    with Waiting("loading a model ...") as waiting:
        waiting.timer.join(10)
    assert capsys.readouterr().err == "loading a model ...\n"

"""What an import or a short command loads, by modules: seconds depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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

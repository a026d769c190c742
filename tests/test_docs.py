"""The documentation site: its Python blocks run, and it builds without a warning."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "site").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_what_one_migrates_from_is_torchdeq_s_own() -> None:
    """Both sides of the page compute the same: the blocks, and the rows of the table."""
    torchdeq = pytest.importorskip("torchdeq")
    from torchdeq.loss import jac_reg

    from deqzoo import equilibrium

    page = (ROOT / "docs" / "site" / "migrating.md").read_text(encoding="utf-8")
    (theirs,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    ours, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {"get_deq": torchdeq.get_deq}
    exec(ours, names)
    f, x, z = names["f"], names["x"], names["solution"].state.detach()
    gradient, x.grad = x.grad, None
    exec(theirs, names)
    names["loss"].backward()
    torch.testing.assert_close(names["z_out"][-1].detach(), z, rtol=0, atol=5e-3)
    torch.testing.assert_close(x.grad, gradient, rtol=0, atol=5e-3)
    for figure in ("nstep", "rel_lowest", "abs_lowest"):
        assert len(names["info"][figure]) == len(z)

    def gradient_of(state: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(state.sum(), x)[0]

    tight = {"f_solver": "anderson", "f_max_iter": 50, "f_tol": 1e-6, "f_stop_mode": "abs"}
    states, info = torchdeq.get_deq(**tight, grad=5, tau=0.5, n_states=4)(f, torch.zeros(2, 3))
    assert len(states) == 4
    solver = {"name": "anderson", "max_steps": 50, "tol": 1e-6, "stop_mode": "abs"}
    upg = {"name": "upg", "steps": 5, "damping": 0.5}
    solution = equilibrium.fixed_point(
        f, torch.zeros(2, 3), solver=solver, gradient=upg, sample_steps=(2, 4, 6)
    )
    assert len(solution.samples) == 3
    torch.testing.assert_close(gradient_of(states[-1]), gradient_of(solution.state))
    _, info = torchdeq.get_deq(**tight).eval()(f, torch.zeros(2, 3), sradius_mode=True)
    radius = equilibrium.spectral_radius(f, solution.state.detach())
    torch.testing.assert_close(info["sradius"].flatten(), radius.flatten(), rtol=0.02, atol=0)
    point = solution.state.detach().requires_grad_()
    both = jac_reg(f(point), point, vecs=200), equilibrium.jacobian_penalty(f, point, n_probes=200)
    assert float(both[0]) == pytest.approx(float(both[1]), rel=0.2)


def test_there_are_blocks() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(PAGES) >= 6 and text.count("```python\n") >= 6


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fixed_point" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "models" / "mdeq-tiny-cifar-upg" / "index.html").is_file()


DOCTESTS = sorted(p for p in (ROOT / "deqzoo").rglob("*.py") if ">>> " in p.read_text("utf-8"))


@pytest.mark.parametrize("path", DOCTESTS, ids=lambda path: path.parent.name)
def test_examples_in_docstrings_run(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0

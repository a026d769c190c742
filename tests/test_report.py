"""The report on the evidence: its figures are those of the files that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
report = load_script("benchmarks/report.py")


def test_the_report_is_up_to_date() -> None:
    stored = (ROOT / "benchmarks" / "REPORT.md").read_text(encoding="utf-8")
    assert report.fill() == stored, "run `python benchmarks/report.py` and commit the result"


def test_files_that_the_report_names_exist() -> None:
    text = (ROOT / "benchmarks" / "REPORT.template.md").read_text(encoding="utf-8")
    named = [part for part in text.split("`") if part.startswith(("benchmarks/", "hub_configs/"))]
    assert named
    for name in named:
        if "NAME" not in name:
            assert (ROOT / name.split()[0]).exists(), name


def test_wilson_interval() -> None:
    """Against the closed form for no success, z² / (n + z²), and symmetry."""
    low, high = report.wilson(0.0, 20, z=2.0)
    assert low == pytest.approx(0.0) and high == pytest.approx(4 / 24)
    mirrored = report.wilson(0.3, 50)
    assert report.wilson(0.7, 50) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))

"""The studies keep their cells, and measure anew what was measured on other weights."""

from __future__ import annotations

from pathlib import Path

from scripts import load_script

cells = load_script("benchmarks/studies/cells.py")


def test_cells_go_on_and_follow_the_weights(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(key: str) -> dict[str, int]:
        measured.append(key)
        if key == "broken" and len(measured) < 4:
            raise RuntimeError("not yet")
        return {"value": len(measured)}

    weights = {"a": "first", "b": "first", "broken": None}
    wanted = list(weights)
    study = cells.Cells("study", tmp_path)
    assert study.fill(wanted, measure, weights_of=weights.get) == ["broken"]
    again = cells.Cells("study", tmp_path)
    weights["b"] = "second"
    assert again.fill(wanted, measure, weights_of=weights.get) == []
    assert measured == ["a", "b", "broken", "b", "broken"]
    assert again.done["b"] == {"value": 4, "weights_sha256": "second"}
    # Without weights to follow, what is there stays.
    assert again.fill(wanted, measure) == [] and len(measured) == 5

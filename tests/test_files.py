"""What a kill at any step leaves of files and folders that are replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killing import kills

from deqzoo import UserError, files
from deqzoo.files import damage, mark_complete, replace_text, replacing, require_writable, restore


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (folder / name).write_text(text)


def content(folder: Path) -> set[str]:
    found = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert len(found) == 3
    return set(found)


def replace_folder(folder: Path) -> None:
    with replacing(folder) as fresh:
        fill(fresh, "new")


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_old_or_new_after_a_kill(tmp_path: Path, monkeypatch, swaps: bool) -> None:
    """With the system's swap, and without it."""
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target = tmp_path / "model"

    def prepare() -> None:  # among the rests that the kill before has left
        with replacing(target) as fresh:
            fill(fresh, "old")

    seen = []
    for _ in kills(lambda: replace_folder(target), tmp_path, prepare):
        if not swaps:
            restore(target)
        found = content(target)
        assert found in ({"old"}, {"new"})
        seen += found
    assert "old" in seen and "new" in seen and sorted(seen, reverse=True) == seen
    assert content(target) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_old_or_new_after_a_kill(tmp_path: Path) -> None:
    target = tmp_path / "record.json"
    seen = []
    for _ in kills(
        lambda: replace_text(target, "new"), tmp_path, lambda: replace_text(target, "old")
    ):
        seen.append(target.read_text())
    assert seen and set(seen) <= {"old", "new"} and target.read_text() == "new"


def test_an_error_inside_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(target, "old")
    with pytest.raises(RuntimeError), replacing(target) as fresh:
        fill(fresh, "new")
        raise RuntimeError
    assert content(target) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_file_replaces_a_folder(tmp_path: Path) -> None:
    """Nor a folder a file: what stands there is more than an earlier result."""
    fill(tmp_path / "model.onnx", "precious")
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "model.onnx", "new")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError):
        replace_folder(tmp_path / "file")
    assert content(tmp_path / "model.onnx") == {"precious"}
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.onnx"]


def test_no_file_replaces_a_device(tmp_path: Path) -> None:
    """As root, /dev/null would be a file afterwards for everybody."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "null"):
        with pytest.raises(UserError, match="device or pipe"):
            replace_text(tmp_path / name, "new")
        with pytest.raises(UserError, match="device or pipe"):
            require_writable(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    fill(tmp_path / "disk" / "model", "old")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    replace_folder(tmp_path / "model")
    assert (tmp_path / "model").is_symlink() and content(tmp_path / "disk" / "model") == {"new"}


def test_marks_tell_damage(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    fill(folder, "weights")
    mark_complete(folder)
    assert damage(folder) is None
    for name in ("a", "sub/c"):
        path = folder / name
        path.write_bytes(b"Weights")
        assert damage(folder) == f"{name} has changed"
        path.unlink()
        assert damage(folder) == f"{name} is missing"
        path.write_text("weights")
    (folder / "complete").write_text("{")
    assert "'complete'" in damage(folder)

"""Training on data of one's own from the command line, in all three families."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import deqzoo
from deqzoo.cli import run
from deqzoo.data import own, own_pictures, own_text
from deqzoo.errors import UserError
from deqzoo.evaluation.dispatch import evaluator_of
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer
from deqzoo.tasks.finetuning import Settings
from deqzoo.tasks.text import with_words
from deqzoo.training.trainer import DEQTrainer

pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
COLOURS = {"blue thing": (20, 40, 220), "green thing": (30, 200, 60), "red thing": (210, 30, 40)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_folder(folder: Path, count: int = 6, side: int = 48, mode: str = "RGB") -> Path:
    """A folder per class of pictures in its colour."""
    draws = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = draws.integers(-30, 30, (side, side + 8, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{number}.png")
    return folder


def finetuned(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert run(["finetune", *map(str, arguments), "--quiet"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def lines(capsys: pytest.CaptureFixture, *arguments: object) -> list[dict]:
    capsys.readouterr()
    assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_pictures(tiny_mdeq: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, output = write_folder(tmp_path / "things"), tmp_path / "tuned"
    options = ["--max-steps", 60, "--lr", 0.01, "--no-augment", "--gradient", "jfb"]
    options += ["--freeze", "none"]
    printed = finetuned(capsys, tiny_mdeq, "--data", data, "--output", output, *options)
    assert "100.00 % on things test" in printed
    model = deqzoo.DEQModel.from_pretrained(output)
    assert list(model.config.id2label.values()) == list(COLOURS)
    assert model.config.gradient["name"] != "jfb"  # of training steps alone
    content = json.loads((output / "evaluation" / "things-test.json").read_text())
    assert content["results"]["accuracy"] == 1 and content["data"]["samples"] == 3
    record = json.loads((output / "run.json").read_text())
    assert record["samples"] == 15 and record["held_out"] == 3 and record["curve"]
    card = (output / "README.md").read_text()
    assert "things" in card and "deqzoo/tuned" not in card  # which is no repository
    assert f'DEQModel.from_pretrained("{output}")' in card and f"evaluate {output} --data" in card
    assert not (output / "checkpoints").exists()
    rows = lines(capsys, "classify", data, "--model", output)
    assert [row["labels"][0]["label"] for row in rows] == [
        Path(r["file"]).parent.name for r in rows
    ]
    # The hold-out is found again wherever the files lie.
    moved = tmp_path / "elsewhere"
    shutil.move(data, moved)
    figures = {}
    for split, count in (("test", 3), ("train", 15), ("all", 18)):
        file = tmp_path / f"{split}.json"
        arguments = ["evaluate", output, "--data", moved, "--split", split, "--output", file]
        assert run(list(map(str, arguments))) == 0
        figures[split] = json.loads(file.read_text())["data"]["samples"]
        assert figures[split] == count
    capsys.readouterr()
    assert run(["publish", str(output), "--repo-id", "org/things", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    again = ["finetune", str(tiny_mdeq), "--data", str(moved), "--output", str(output)]
    assert run(again) == 2 and "already holds a model" in capsys.readouterr().err


def test_a_log_in_a_file_has_lines_and_no_bar(tiny_mdeq: Path, tmp_path: Path, capsys) -> None:
    data = write_folder(tmp_path / "things")
    arguments = ["finetune", tiny_mdeq, "--data", data, "--output", tmp_path / "tuned"]
    assert run([*map(str, arguments), "--max-steps", "1"]) == 0
    printed = capsys.readouterr()
    assert "'eval_loss'" in printed.out and "%|" not in printed.err


def test_every_layout_of_pictures_gives_the_same(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "things", count=2)
    files = sorted(folder.rglob("*.png"))
    expected = own_pictures.load_own_pictures(folder)["train"]
    assert expected.classes == tuple(COLOURS) and len(expected) == 6
    with zipfile.ZipFile(tmp_path / "things.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(folder))
    with (tmp_path / "table.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label"])
        writer.writerows([file.relative_to(tmp_path), file.parent.name] for file in files)
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    names = [file.parent.name for file in files]
    pq.write_table(pa.table({"image": cells, "label": names}), tmp_path / "t.parquet")
    for source in ("things.zip", "table.csv", "t.parquet"):
        found = own_pictures.load_own_pictures(tmp_path / source)["train"]
        assert found.classes == expected.classes, source
        pairs = [
            sorted(zip(p.digests(), p.labels.tolist(), strict=True)) for p in (found, expected)
        ]
        assert pairs[0] == pairs[1], source
    parted = tmp_path / "parted"
    for split, rows in (("train", files[::2]), ("test", files[1::2])):
        for file in rows:
            target = parted / split / file.parent.name / file.name
            target.parent.mkdir(parents=True)
            shutil.copy(file, target)
    found = own_pictures.load_own_pictures(parted)
    assert {split: len(part) for split, part in found.items()} == {"train": 3, "test": 3}


@pytest.mark.parametrize("names", [("train", "Val", "TEST"), ("Training", "dev", "Evaluation")])
@pytest.mark.parametrize("layout", ["folder", "zip", "shards", "files"])
def test_splits_are_found_however_they_are_spelt(tmp_path: Path, names, layout: str) -> None:
    """Nor does a word in a picture's own name part them."""
    whole = write_folder(tmp_path / "whole", count=3)
    files = sorted(whole.rglob("*.png"))
    parted = tmp_path / "parted"
    parted.mkdir()
    for number, name in enumerate(names):
        chosen = files[number::3]
        cells = [{"bytes": file.read_bytes(), "path": None} for file in chosen]
        table = pa.table({"image": cells, "label": [file.parent.name for file in chosen]})
        if layout == "shards":
            pq.write_table(table, parted / f"{name.lower()}-00000-of-00001.parquet")
        elif layout == "files":
            pq.write_table(table, parted / f"{name}.parquet")
        for file in chosen if layout in ("folder", "zip") else ():
            target = parted / name / file.parent.name / f"a_val_{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    source = parted
    if layout == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "parted"), "zip", parted))
    found = own_pictures.load_own_pictures(source)
    assert {split: len(part) for split, part in found.items()} == dict.fromkeys(own.SPLITS, 3)
    assert {part.classes for part in found.values()} == {tuple(sorted(COLOURS))}


def test_words_in_the_names_of_pictures_part_nothing(tmp_path: Path) -> None:
    """With a table of labels beside them, too; `datasets` alone would read three of them."""
    folder = write_folder(tmp_path / "things", count=2)
    for file in sorted(folder.rglob("*.png"))[::2]:
        file.rename(file.with_name("test-1.png"))
    (folder / "link").symlink_to(next(path for path in folder.iterdir() if path.is_dir()))
    (folder / "up").symlink_to(folder)
    found = own_pictures.load_own_pictures(folder)
    assert {split: len(part) for split, part in found.items()} == {"train": 8}
    (folder / "link").unlink()
    (folder / "up").unlink()
    rows = [f"{f.relative_to(folder)},{f.parent.name}" for f in sorted(folder.rglob("*.png"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    found = own_pictures.load_own_pictures(folder)
    assert {split: len(part) for split, part in found.items()} == {"train": 6}


def zipped(folder: Path, inside: str = "") -> Path:
    """A zip of a folder's content, in a folder of its own where `inside` names one."""
    target = folder.with_name(f"{folder.name}{inside}.zip")
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, f"{inside or '.'}/{file.relative_to(folder)}")
    return target


def test_pictures_beside_splits_are_refused(tmp_path: Path) -> None:
    """In a zip, too, also in one that holds one folder of all."""
    folder = write_folder(tmp_path / "things" / "Train", count=1).parent
    write_folder(folder / "more", count=1)
    for source in (folder, zipped(folder), zipped(folder, "all")):
        with pytest.raises(UserError, match="no folder of a split, as others do .train."):
            own_pictures.load_own_pictures(source)
    bare = tmp_path / "bare"
    for name in ("train", "test"):
        (bare / name).mkdir(parents=True)
        shutil.copy(next(folder.rglob("*.png")), bare / name / "a.png")
    for source in (bare, zipped(bare), zipped(bare, "all")):
        with pytest.raises(UserError, match="no folder of a class"):
            own_pictures.load_own_pictures(source)


def layout(folder: Path, *places: str) -> Path:
    """Two pictures of their own in each of the places below a folder."""
    for number, place in enumerate(places):
        (folder / place).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (4, 4), 10 * number + i).save(folder / place / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "places",
    (
        ("cat/photos", "cat/drawings", "dog/photos", "dog/drawings"),
        ("cat", "cat/more", "dog"),
        ("training_set/training_set/cat", "training_set/training_set/dog", "test_set/test_set/cat"),
        ("train/cat", "train/dog", "test/old/cat"),
    ),
)
def test_folders_that_leave_a_class_open_are_refused(tmp_path: Path, places) -> None:
    """The name of the last folder alone would mix classes, make new ones, or join splits."""
    folder = layout(tmp_path / "things", *places)
    for source in (folder, zipped(folder)):
        with pytest.raises(UserError, match="leaves their class open: give every class one folder"):
            own_pictures.load_own_pictures(source)


def test_nothing_of_a_folder_is_passed_over_unsaid(tmp_path: Path, caplog) -> None:
    """But what systems and programs leave there in hiding."""
    folder = layout(tmp_path / "things", "cat", "dog")
    expected = own_pictures.load_own_pictures(folder)["train"].digests()
    layout(folder, ".ipynb_checkpoints", "__MACOSX/cat")
    (folder / ".ipynb_checkpoints" / "metadata.csv").write_text("file_name,label\n0.png,x\n")
    (folder / ".a.heic").write_bytes(b"of an iPhone")
    (folder / "cat" / "Thumbs.db").write_bytes(b"of Windows")
    assert own_pictures.load_own_pictures(folder)["train"].digests() == expected
    assert not caplog.records
    (folder / "metadata.txt").write_text("no table")
    (folder / "cat" / "more").symlink_to(folder / "dog")  # a link leads to a folder of a class
    with pytest.raises(UserError, match="leaves their class open"):
        own_pictures.load_own_pictures(folder)
    (folder / "cat" / "more").unlink()
    (folder / "metadata.txt").unlink()
    caplog.clear()
    (folder / "dog" / "a.svg").write_text("<svg/>")
    for source in (folder, zipped(folder)):
        assert own_pictures.load_own_pictures(source)["train"].digests() == expected
    for said in (record.getMessage() for record in caplog.records):
        assert said.startswith("1 file(s) of ") and "as dog/a.svg: save pictures as" in said
    assert len(caplog.records) == 2
    (folder / "dog" / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot read .*b.png: No such file"):
        own_pictures.load_own_pictures(folder)["train"].digests()


def test_splits_may_lie_in_the_folders_of_classes(tmp_path: Path) -> None:
    folder = layout(tmp_path / "things", *(f"{c}/{s}" for c in ("cat", "dog") for s in own.SPLITS))
    for source in (folder, zipped(folder, "all")):
        found = own_pictures.load_own_pictures(source)
        assert {*found} == {*own.SPLITS}
        for split, part in found.items():
            assert part.classes == ("cat", "dog") and part.labels.tolist() == [0, 0, 1, 1]
            files = [folder / c / split / f"{i}.png" for c in ("cat", "dog") for i in range(2)]
            assert [part.content(row) for row in range(4)] == [f.read_bytes() for f in files]


def test_classes_are_the_same_however_their_accents_are_written(tmp_path: Path) -> None:
    """macOS writes them as marks of their own in the names of files, tables do not."""
    plain, apart = "caf\u00e9", "cafe\u0301"
    folder = layout(tmp_path / "things", f"train/{plain}", "train/the", f"test/{apart}", "test/the")
    table = tmp_path / "t.csv"
    files = sorted(folder.rglob("*.png"))
    table.write_text("\n".join(["path,label", *(f"{f},{f.parent.name}" for f in files)]))
    for source in (folder, zipped(folder), table):
        for classes in (None, (plain, "the"), (apart, "the")):
            found = own_pictures.load_own_pictures(source, classes)
            assert {part.classes for part in found.values()} == {classes or (plain, "the")}
            assert all({*part.labels.tolist()} == {0, 1} for part in found.values())


def test_a_zip_may_hold_one_folder_of_all(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "things" / "train", count=2).parent
    write_folder(folder / "test", count=1)
    whole = own_pictures.load_own_pictures(folder)
    for source in (zipped(folder), zipped(folder, "all")):
        found = own_pictures.load_own_pictures(source)
        assert {split: len(part) for split, part in found.items()} == {"test": 3, "train": 6}
        for split, part in found.items():
            assert part.classes == tuple(COLOURS) and part.digests() == whole[split].digests()


def test_zips_of_windows_part_folders_by_backslashes(tmp_path: Path) -> None:
    folder = layout(tmp_path / "things", "train/cat", "train/dog", "test/cat", "test/dog")

    def written(name: str) -> Path:
        target = tmp_path / name
        with zipfile.ZipFile(target, "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                entry = zipfile.ZipInfo(str(file.relative_to(tmp_path)).replace("/", "\\"))
                archive.writestr(entry, file.read_bytes())
        return target

    expected = own_pictures.load_own_pictures(folder)
    plain = own_pictures.load_own_pictures(written("plain.zip"))
    for split in ("train", "test"):
        rows = [f"{c}/{i}.png,{c}" for c in ("cat", "dog") for i in range(2)]
        (folder / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    for found in (plain, own_pictures.load_own_pictures(written("tables.zip"))):
        assert {*found} == {"train", "test"}
        for split, part in expected.items():
            assert found[split].classes == ("cat", "dog")
            assert found[split].digests() == part.digests()


def test_paths_in_parquet_are_relative_to_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "things", count=2)
    files = sorted(folder.rglob("*.png"))
    labels = [file.parent.name for file in files]
    for table in (tmp_path / "t.parquet", folder / "t.parquet"):
        paths = [str(file.relative_to(table.parent)) for file in files]
        pq.write_table(pa.table({"path": paths, "label": labels}), table)
        source = table if table.parent == tmp_path else folder
        found = own_pictures.load_own_pictures(source)["train"]
        assert [found.content(row) for row in range(6)] == [f.read_bytes() for f in files]


@pytest.mark.parametrize("inside", ["", "all"])
def test_zips_have_the_tables_of_folders(tmp_path: Path, inside: str) -> None:
    """metadata.csv by split, with labels that differ from the folders' names; parquet files."""
    folder = write_folder(tmp_path / "things" / "train", count=2).parent
    write_folder(folder / "test", count=1)
    for split in ("train", "test"):
        files = sorted((folder / split).rglob("*.png"))
        rows = [f"{f.relative_to(folder / split)},{i % 2},{i % 3}" for i, f in enumerate(files)]
        table = "\n".join(["file_name,label,kind", *rows])
        (folder / split / "metadata.csv").write_text(table)
    cells = [{"bytes": f.read_bytes(), "path": None} for f in sorted(folder.rglob("*.png"))]
    (tmp_path / "rows").mkdir()
    table = pa.table({"image": cells, "label": [i % 2 for i in range(9)], "kind": [*"abc"] * 3})
    pq.write_table(table, tmp_path / "rows" / "test.parquet")
    for source in (folder, tmp_path / "rows"):
        for column in (None, "kind"):
            expected = own_pictures.load_own_pictures(source, label_column=column)
            found = own_pictures.load_own_pictures(zipped(source, inside), label_column=column)
            assert list(found) == list(expected)
            for split, part in expected.items():
                assert len(part.classes) == (3 if column else 2)
                assert found[split].classes == part.classes
                assert found[split].labels.tolist() == part.labels.tolist()
                assert found[split].digests() == part.digests()
                assert found[split].picture(0).size == part.picture(0).size
    # A folder may be around everything, too.
    outer = tmp_path / "outer"
    outer.mkdir(exist_ok=True)
    shutil.move(folder, outer / "all")
    around = own_pictures.load_own_pictures(outer)
    shutil.move(outer / "all", folder)
    assert {split: len(part) for split, part in around.items()} == {"test": 3, "train": 6}
    (folder / "test" / "metadata.csv").write_text("file_name,label\nabsent.png,1")
    with pytest.raises(UserError, match="things.*zip"):
        own_pictures.load_own_pictures(zipped(folder, inside))


@pytest.mark.parametrize("layout", ("csv", "parquet", "metadata"))
def test_a_column_of_a_table_parts_it(tmp_path: Path, layout: str) -> None:
    folder = write_folder(tmp_path / "things", count=3)
    files = sorted(folder.rglob("*.png"))

    def loaded(splits: list, name: str = "split") -> dict:
        place = {"csv": "t.csv", "parquet": "t.parquet", "metadata": "metadata.csv"}[layout]
        if layout == "parquet":
            cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
            labels = [file.parent.name for file in files]
            table = pa.table({"image": cells, "label": labels, name: splits})
            pq.write_table(table, folder / place)
        else:
            rows = zip(files, splits, strict=True)
            lines = [f"{f.relative_to(folder)},{f.parent.name},{split}" for f, split in rows]
            (folder / place).write_text("\n".join([f"file_name,label,{name}", *lines]))
        return own_pictures.load_own_pictures(folder if layout == "metadata" else folder / place)

    found = loaded(["train", "Val", "testing"] * 3)
    assert {split: len(part) for split, part in found.items()} == dict.fromkeys(own.SPLITS, 3)
    for number, split in enumerate(own.SPLITS):
        contents = [file.read_bytes() for file in files[number::3]]
        assert [found[split].content(row) for row in range(3)] == contents
        assert found[split].labels.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="'fold 2' in the column split.* rename the column"):
        loaded(["train", "test", "fold 2"] * 3)
    with pytest.raises(UserError, match="in the column split"):
        loaded(["train", "test", None if layout == "parquet" else ""] * 3)
    found = loaded(["train", "Val", "testing"] * 3, "Split")
    assert {split: len(part) for split, part in found.items()} == dict.fromkeys(own.SPLITS, 3)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_column_of_splits_parts_the_rows_of_texts(tmp_path: Path, suffix: str) -> None:
    def write(file: Path, splits: Sequence[str | None], name: str = "split") -> Path:
        texts = [f"line {i}\nand on" for i in range(len(splits))]
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": texts, name: splits}), file)
            return file
        pairs = zip(texts, splits, strict=True)
        records = [json.dumps({"text": text, name: split}) for text, split in pairs]
        content = "\n\n".join(records).encode()
        file.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
        return file

    file = write(tmp_path / f"table{suffix}", ["train", "Val", "test", "train"], "Split")
    text = own_text.load_own_text(file)
    assert text.lines == ["line 0", "and on", "line 3", "and on"]
    assert text.stored == {"validation": ["line 1", "and on"], "test": ["line 2", "and on"]}
    with pytest.raises(UserError, match="row 1 of .* has 'fold 2' in the column split"):
        own_text.load_own_text(write(file, ["train", "fold 2"]))
    with pytest.raises(UserError, match="row 1 of .* has None in the column split"):
        own_text.load_own_text(write(file, ["train", None]))
    parts = ["fold 1", "fold 2"]  # may be the texts, if somebody says so
    assert own_text.load_own_text(write(file, parts), column="split").lines == parts
    write(file, ["fold 1", "test"], "kind")
    assert len(own_text.load_own_text(file).lines) == 4
    file.unlink()
    write(tmp_path / f"train{suffix}", ["train", "training"])
    write(tmp_path / f"test{suffix}", ["test"])
    text = own_text.load_own_text(tmp_path)
    assert (len(text.lines), [*text.stored]) == (4, ["test"])
    write(tmp_path / f"test{suffix}", ["train"])
    with pytest.raises(UserError, match="rows of other splits in its test split"):
        own_text.load_own_text(tmp_path)


def test_parquet_files_that_no_split_takes_are_refused(tmp_path: Path, caplog) -> None:
    folder = write_folder(tmp_path / "things", count=2)
    cells = [{"bytes": file.read_bytes(), "path": None} for file in sorted(folder.rglob("*.png"))]
    table = pa.table({"image": cells, "label": [i // 2 for i in range(6)]})

    def loaded(*names: str) -> dict:
        data = tmp_path / "-".join(names)
        data.mkdir()
        for name in names:
            pq.write_table(table, data / name)
        return {split: len(p) for split, p in own_pictures.load_own_pictures(data).items()}

    assert loaded("train-00000-of-00001.parquet", "test.parquet") == {"train": 6, "test": 6}
    known = ("train-00000-of-00001.parquet", "extra-00000-of-00001.parquet", "._train.parquet")
    assert loaded(*known) == {"train": 6}  # a split of another name, and what macOS leaves
    assert "of other splits are passed over" in caplog.text
    for names in (("train.parquet", "train_more.parquet"), ("test.parquet", "more.parquet")):
        with pytest.raises(UserError, match="more.parquet is named by no split, as others are"):
            loaded(*names)


def test_metadata_that_would_not_be_read_is_said(tmp_path: Path, caplog) -> None:
    folder = write_folder(tmp_path / "things" / "train")
    (folder.parent / "metadata.csv").write_text("file_name,label\ntrain/blue thing/0.png,x\n")
    with pytest.raises(UserError, match="metadata.csv lies beside folders of splits"):
        own_pictures.load_own_pictures(folder.parent)
    (folder.parent / "metadata.csv").rename(folder.parent / "metadata.json")
    assert len(own_pictures.load_own_pictures(folder.parent)["train"]) == 18  # another's file
    (folder / "blue thing" / "metadata.csv").write_text("file_name,label\n0.png,x\n1.png,y\n")
    assert len(own_pictures.load_own_pictures(folder)["train"]) == 2
    assert "16 picture(s)" in caplog.text and "stand in no metadata file" in caplog.text


def test_all_pictures_of_stored_splits_can_be_measured(tmp_path: Path, caplog) -> None:
    write_folder(tmp_path / "things" / "train")
    write_folder(tmp_path / "things" / "test", count=2)
    pictures = own_pictures.pictures_of_split(tmp_path / "things", "all", [*COLOURS], None)
    assert len(pictures) == 24 and pictures.labels.bincount().tolist() == [8, 8, 8]
    assert pictures.picture(23).size == (56, 48)
    shutil.move(tmp_path / "things" / "test", tmp_path / "only" / "validation")
    only = own_pictures.pictures_of_split(tmp_path / "only", "validation", [*COLOURS], None)
    assert len(only) == 6 and not caplog.records
    record = {"train": only.digests()[:4]}
    own_pictures.pictures_of_split(tmp_path / "only", "validation", [*COLOURS], record)
    assert "4 picture(s) of the validation split were learnt" in caplog.text


def test_what_is_in_the_way_of_a_run_stays(tmp_path: Path, capsys) -> None:
    """Files of others are not replaced, whatever their names."""
    data = write_folder(tmp_path / "things")
    for name in ("README.md", "checkpoints/important.pt", "evaluation/mine.json"):
        output = tmp_path / name.replace("/", "-")
        (output / name).parent.mkdir(parents=True)
        (output / name).write_text("mine")
        arguments = ["finetune", "mdeq-tiny-cifar-upg", "--data", data, "--output", output]
        assert run([*map(str, arguments)]) == 2
        assert "of no run of finetune: it would be replaced" in capsys.readouterr().err
        assert (output / name).read_text() == "mine"
    arguments = ["finetune", "mdeq-tiny-cifar-upg", "--data", "-", "--output", tmp_path / "x"]
    assert run([*map(str, arguments)]) == 2 and "save them to a file" in capsys.readouterr().err


def test_files_of_splits_whose_column_says_another_are_refused(tmp_path: Path) -> None:
    cell = {"bytes": b"picture", "path": None}
    for split in ("train", "test"):
        table = pa.table({"image": [cell], "label": ["a"], "split": ["train"]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="other splits in its test split"):
        own_pictures.load_own_pictures(tmp_path)


def test_copies_under_another_label_are_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "things", count=2)
    assert own_pictures.contradictions(own_pictures.load_own_pictures(folder)) == []
    first, second = sorted(path for path in folder.iterdir() if path.is_dir())[:2]
    shutil.copy(next(first.iterdir()), second / "copy.png")
    (said,) = own_pictures.contradictions(own_pictures.load_own_pictures(folder))
    assert said.startswith("1 picture has copies under another label")
    assert first.name in said and second.name in said


def test_classes_that_only_other_splits_hold_are_said(tmp_path: Path) -> None:
    folder = layout(tmp_path / "things", "train/cat", "train/dog", "test/cat", "test/dog")
    assert own_pictures.unlearnt(own_pictures.load_own_pictures(folder)) == []
    layout(folder, "test/Cat")
    (said,) = own_pictures.unlearnt(own_pictures.load_own_pictures(folder))
    assert said == "1 of the classes have no picture to learn (Cat): mend the data"


def test_stored_pictures_that_were_learnt_are_said(tmp_path: Path, caplog) -> None:
    """Also where the data were parted after the training."""
    folder = layout(tmp_path / "things", "train/cat", "train/dog", "test/cat", "test/dog")
    found = own_pictures.load_own_pictures(folder)
    record = {"train": found["train"].digests()}
    classes = ("cat", "dog")
    own_pictures.pictures_of_split(folder, "test", classes, record)
    assert not caplog.records
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "test" / "cat" / "copy.png")
    assert len(own_pictures.pictures_of_split(folder, "test", classes, record)) == 5
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == "1 picture(s) of the test split were learnt: its figure flatters"


def test_a_column_without_a_table_is_refused(tmp_path: Path, tiny_mdeq: Path, capsys) -> None:
    pictures, text = write_folder(tmp_path / "things"), tmp_path / "t.txt"
    text.write_text("the dog\n" * 30)
    base, output = tiny_text(tmp_path / "base"), tmp_path / "out"
    capsys.readouterr()
    for source in (pictures, zipped(pictures)):
        with pytest.raises(UserError, match="holds no table: leave --label-column out"):
            own_pictures.load_own_pictures(source, label_column="kind")
    for refused in (
        ["finetune", tiny_mdeq, "--data", pictures, "--output", output, "--label-column", "kind"],
        ["finetune", base, "--data", text, "--output", output, "--label-column", "kind"],
        ["finetune", base, "--data", text, "--output", output, "--column", "story"],
        ["evaluate", base, "--data", text, "--output", output, "--column", "story"],
        ["perplexity", text, "--model", base, "--column", "story"],
    ):
        assert run(list(map(str, refused))) == 2
        said = capsys.readouterr().err
        assert "column" in said and "leave" in said and said.count("\n") == 1, said


def test_a_column_of_labels_is_remembered(tiny_mdeq: Path, tmp_path: Path, capsys) -> None:
    """What finetune was told about a table, its own measurement and later ones know."""
    folder = write_folder(tmp_path / "things", count=8)
    files = sorted(folder.rglob("*.png"))
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in files]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,kind", *lines]))
    output = tmp_path / "out"
    command = ["finetune", str(tiny_mdeq), "--data", str(table), "--output", str(output)]
    assert run([*command, "--label-column", "kind", "--max-steps", "1", "--quiet"]) == 0
    assert json.loads((output / "own_data.json").read_text())["label_column"] == "kind"
    for data in (table, folder):  # a folder has no columns
        assert run(["evaluate", str(output), "--data", str(data)]) == 0, capsys.readouterr().err


def test_pictures_without_a_class_are_refused(tmp_path: Path) -> None:
    """Beside the folders of classes, or labelled with nothing or a list."""
    for place in ("loose.png", "train/loose.png"):
        folder = write_folder(tmp_path / place.replace("/", "-") / "things", count=1)
        first = sorted(folder.rglob("*.png"))[0]
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copy(first, folder / place)
        with pytest.raises(UserError, match="loose.png lies in no folder of a class"):
            own_pictures.load_own_pictures(folder)
        (folder / place).unlink()
        assert len(own_pictures.load_own_pictures(folder)["train"]) == 3
    cell = {"bytes": first.read_bytes(), "path": None}
    for label, message in (
        (float("nan"), "has no label"),
        (" ", "has no label"),
        (["a"], "has no single label"),
    ):
        pq.write_table(pa.table({"image": [cell], "label": [label]}), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=message):
            own_pictures.load_own_pictures(tmp_path / "t.parquet")


def test_tables_are_read_as_people_write_them(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "things", count=1)
    files = [str(file.relative_to(tmp_path)) for file in sorted(folder.rglob("*.png"))]
    table = tmp_path / "table.csv"
    table.write_text(
        f'path, label\n{files[0]}, red\n\n{files[1]},red ,\n {files[2]} , "sky, blue"\n',
        "utf-8-sig",
    )
    found = own_pictures.load_own_pictures(table)["train"]
    assert found.classes == ("red", "sky, blue") and found.labels.tolist() == [0, 0, 1]
    capitals = own_pictures.load_own_pictures(table.rename(tmp_path / "table.CSV"))["train"]
    assert capitals.classes == found.classes
    table.write_text(f"Image_Path;LABEL;Split\r\n{files[0]};sky, blue;test\r\n{files[1]};red;Train")
    found = own_pictures.load_own_pictures(table)
    assert {s: (p.classes, p.labels.tolist()) for s, p in found.items()} == {
        "test": (("red", "sky, blue"), [1]), "train": (("red", "sky, blue"), [0]),
    }  # fmt: skip
    assert own_pictures.load_own_pictures(table, label_column="Split")["train"].classes == (
        "Train", "test",
    )  # fmt: skip
    table.write_text(f"path,label\n{files[0]},sky, blue\n")
    with pytest.raises(UserError, match="line 2 .* has 3 fields"):
        own_pictures.load_own_pictures(table)
    table.write_bytes("path,label\nx.png,gr\u00fcn\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        own_pictures.load_own_pictures(table)


@pytest.mark.parametrize("layout", ("folder", "zip", "csv"))
def test_pictures_of_iphones(tmp_path: Path, monkeypatch, layout: str) -> None:
    """Read where pillow-heif is there, refused in one line where not, never passed over."""
    folder = write_folder(tmp_path / "things", count=2, side=64)
    one = folder / "red thing" / "phone.HEIC"
    pictures = Image.open(folder / "red thing" / "0.png")
    try:
        import pillow_heif
    except ImportError:
        one.write_bytes(b"\0\0\0\x18ftypheic")
    else:
        pillow_heif.from_pillow(pictures).save(one)
    source = folder
    if layout == "zip":
        source = tmp_path / "things.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in folder.rglob("*.*"):
                archive.write(file, file.relative_to(folder))
    elif layout == "csv":
        source = tmp_path / "things.csv"
        files = [file.relative_to(tmp_path) for file in folder.rglob("*.*")]
        rows = [f"{file},{file.parent.name}" for file in files]
        source.write_text("\n".join(["path,label", *rows]))
    if importlib.util.find_spec("pillow_heif") is not None:
        found = own_pictures.load_own_pictures(source)["train"]
        assert len(found) == 7
        row = next(i for i in range(7) if found.content(i) == one.read_bytes())
        seen = np.asarray(found.picture(row)).astype(float)
        assert np.abs(seen - np.asarray(pictures)).mean() < 20
        assert found.classes[int(found.labels[row])] == "red thing"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match="pip install pillow-heif"):
        own_pictures.load_own_pictures(source)


def test_pictures_that_cannot_be_learnt(tiny_mdeq: Path, tmp_path: Path, capsys) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(one / "cat" / "a.png")
    broken = write_folder(tmp_path / "broken", count=2)
    (broken / "red thing" / "0.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("path,label\nabsent.png,cat\n")
    (tmp_path / "bad.zip").write_text("no zip")
    for source, said in (
        ("flat", "at least two"),
        ("one", "at least two"),
        ("broken", "0.png is no picture"),
        ("empty", "cannot read"),
        ("absent", "no file or folder"),
        ("bad.csv", "absent.png"),
        ("bad.zip", "not a zip"),
    ):
        arguments = ["finetune", str(tiny_mdeq), "--data", str(tmp_path / source), "--quiet"]
        assert run([*arguments, "--output", str(tmp_path / "out")]) == 2, source
        printed = capsys.readouterr()
        assert said in printed.err.splitlines()[-1] and "Traceback" not in printed.err, printed.err
    for option, value in (("--freeze", "all"), ("--lr", "-1"), ("--epochs", "inf")):
        arguments = ["finetune", str(tiny_mdeq), "--data", str(broken), option, value]
        assert run([*arguments, "--output", str(tmp_path / "out")]) == 2
        assert option[2:] in capsys.readouterr().err


def test_a_frozen_backbone_stays(tiny_mdeq: Path, tmp_path: Path, capsys) -> None:
    data, output = write_folder(tmp_path / "things", mode="L"), tmp_path / "tuned"
    options = ["--max-steps", 3, "--freeze", "backbone"]
    finetuned(capsys, tiny_mdeq, "--data", data, "--output", output, *options)
    before = deqzoo.DEQModel.from_pretrained(tiny_mdeq).state_dict()
    after = deqzoo.DEQModel.from_pretrained(output).state_dict()
    same = {
        n for n in after if before[n].shape == after[n].shape and torch.equal(before[n], after[n])
    }
    assert {n for n in after if n.startswith("mdeq.")} <= same
    assert not any(name.startswith("classifier") for name in same)


WORDS = ["<eos>", "the", "<unk>", ",", ".", "dog", "cat", "saw"]


def tiny_text(folder: Path, cutoffs: tuple[int, ...] = ()) -> Path:
    torch.manual_seed(0)
    config = deqzoo.DEQTransformerConfig(
        vocab_size=len(WORDS), d_model=16, d_embed=16, n_head=2, d_inner=16,
        tgt_len=8, local_size=8,  # a text is read with the context that was trained
        cutoffs=list(cutoffs), tie_projections=[True] * (len(cutoffs) + 1),
    )  # fmt: skip
    deqzoo.DEQTransformerForCausalLM(config).save_pretrained(folder)
    build_tokenizer(WORDS, "wikitext").save_pretrained(folder)
    return folder


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, output = tiny_text(tmp_path / "base"), tmp_path / "tuned"
    file = tmp_path / "notes.txt"
    file.write_text("The dog saw the cat.\nthe cat saw the horse.\n" * 30)
    options = ["--max-steps", 160, "--lr", 0.01, "--tokenizer", "extend"]
    printed = finetuned(capsys, base, "--data", file, "--output", output, *options)
    assert "perplexity" in printed and "notes test" in printed
    (before,) = lines(capsys, "perplexity", file, "--model", base)
    (after,) = lines(capsys, "perplexity", file, "--model", output)
    assert before["unknown_share"] > 0 and after["unknown_share"] == 0
    assert after["perplexity"] < 0.6 * before["perplexity"]
    content = json.loads((output / "evaluation" / "notes-test.json").read_text())
    assert content["data"]["samples"] == 6 * 7  # the last tenth of the lines
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "other.txt").write_text("the dog .\n")
    arguments = [
        "evaluate",
        str(output),
        "--data",
        str(folder),
        "--output",
        str(tmp_path / "e.json"),
    ]
    assert run(arguments) == 0
    assert json.loads((tmp_path / "e.json").read_text())["data"]["samples"] == 4


NAMED = ("train", "valid", "test")


def write_splits(folder: Path, form: str = "{}.txt", names=NAMED, count: int = 60) -> Path:
    """A folder of texts whose words say which split they are of."""
    for name in names:
        file = folder / form.format(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"the {name.lower()[:2]} dog"] * (count if name.lower()[:2] == "tr" else 4)
        if file.suffix == ".parquet":
            pq.write_table(pa.table({"text": lines}), file)
        else:
            file.write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("form", "names"),
    (
        ("{}.txt", NAMED),
        ("{}.txt", ("Training", "DEV", "Test")),
        ("wiki.{}.tokens", NAMED),
        ("{}/a.txt", ("Train", "val", "TEST")),
        ("{}-00000-of-00001.parquet", ("train", "validation", "test")),
        ("data/{}.parquet", NAMED),
    ),
)
def test_stored_splits_of_texts(tmp_path: Path, form: str, names: tuple[str, ...]) -> None:
    folder = write_splits(tmp_path / "sp", form, names)
    (folder / "README.md").write_text("what they are")
    text = own_text.load_own_text(folder)
    parts = text.divided_in_three()
    assert [len(part) for part in parts] == [60, 4, 4]
    for part, name in zip(parts, names, strict=True):
        assert set(part) == {f"the {name.lower()[:2]} dog"}
    (folder / "more.txt").write_text("and the cat")
    with pytest.raises(UserError, match="more.txt is named by no split, as others are"):
        own_text.load_own_text(folder)


def test_splits_may_be_words_in_the_names_of_texts(tmp_path: Path) -> None:
    """Where every file has one; a text about a train is none."""
    folder = write_splits(tmp_path / "sp", "my_{}-data.txt")
    (folder / "README.md").write_text("what they are")
    text = own_text.load_own_text(folder)
    assert [len(part) for part in text.divided_in_three()] == [60, 4, 4]
    assert text.stored["test"] == ["the te dog"] * 4
    (folder / "README.md").unlink()
    (folder / "journeys.txt").write_text("by train")
    text = own_text.load_own_text(folder)
    assert not text.stored and len(text.lines) == 60 + 4 + 4 + 1


def test_copies_and_cards_are_no_texts(tmp_path: Path, caplog) -> None:
    """Else the lines that are measured were learnt."""
    lines = [f"line {i}" for i in range(20)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b (copy).txt").write_text("\n".join(lines))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "\n".join(lines)}))
    (tmp_path / "d.txt").write_text("another")
    # Nor is the card of a model that was written among its data one of them.
    own.write_record(tmp_path, {"kind": "text"})
    (tmp_path / "README.md").write_text("about the model")
    assert own_text.load_own_text(tmp_path).lines == [*lines, "another"]
    said = caplog.records[-1].getMessage()
    assert said.startswith("2 file(s) are copies of others and passed over, as ")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_column_that_nobody_named_is_said(tmp_path: Path, caplog, suffix: str) -> None:
    def write(rows: list[dict]) -> Path:
        file = tmp_path / f"t{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_text("\n".join(map(json.dumps, rows)))
        return file

    with pytest.raises(UserError, match="no text in the column 'text'.*--column: id"):
        own_text.load_own_text(write([{"id": "a", "text": 5}, {"id": "b", "text": 6}]))
    assert own_text.load_own_text(write([{"text": "the dog"}])).lines == ["the dog"]
    assert not caplog.records
    file = write([{"lang": "en", "review": ["a"]}])
    assert own_text.load_own_text(file).lines == ["en"]
    assert "reading the column 'lang'; choose another with --column" in caplog.text


def test_files_that_tell_of_texts_are_no_texts(tmp_path: Path, caplog) -> None:
    for name in ("README.md", "LICENSE.txt", "a.txt"):
        (tmp_path / name).write_text(f"of {name}")
    assert own_text.load_own_text(tmp_path).lines == ["of a.txt"]
    assert "LICENSE.txt and the like tell of the texts" in caplog.text
    (tmp_path / "a.txt").unlink()
    assert own_text.load_own_text(tmp_path).lines == ["of LICENSE.txt", "of README.md"]


def test_a_folder_of_splits_is_a_corpus_where_its_words_are(tmp_path: Path) -> None:
    """train.txt, valid.txt and test.txt are what people call their own files, too."""
    from deqzoo.evaluation.text import _is_text
    from deqzoo.models.readers import load_tokenizer

    model = deqzoo.DEQModel.from_pretrained("deq-transformer-ptb-upg")
    tokenizer = load_tokenizer(model)
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("the company said <unk> N\n")
    assert not _is_text(tokenizer, tmp_path, "test")
    (tmp_path / "test.txt").write_text("The Zeitgeist said: 1,000!\n")
    assert _is_text(tokenizer, tmp_path, "test")
    record = evaluated("deq-transformer-ptb-upg", tmp_path, tmp_path)
    assert record["data"]["name"] == tmp_path.name


def test_a_text_that_has_changed_is_said(tmp_path: Path, caplog) -> None:
    file = tmp_path / "notes.txt"
    lines = [f"line {i}" for i in range(60)]
    file.write_text("\n".join(lines))
    text = own_text.load_own_text(file)
    training, choosing, test = text.divided_in_three()
    record = text.record(training, choosing)
    file.write_text("\n".join([*lines, "one more"]))
    text = own_text.load_own_text(file)
    assert own_text.lines_of_split(text, "test", record) == [*test, "one more"]
    assert not caplog.records
    file.write_text("\n".join(["before", *lines]))
    text = own_text.load_own_text(file)
    assert len(own_text.lines_of_split(text, "test", record)) == 61
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("notes has changed since the model was trained on it")
    caplog.clear()
    other = tmp_path / "other.txt"  # the same by another name
    other.write_text("\n".join(["before", *lines]))
    own_text.lines_of_split(own_text.load_own_text(other), "test", record)
    assert f"about {len(training) / 61:.0%} of the lines of other were learnt" in caplog.text
    caplog.clear()
    other.write_text("\n".join(f"new {i}" for i in range(60)))
    own_text.lines_of_split(own_text.load_own_text(other), "test", record)
    assert not caplog.records


def test_a_sketch_of_many_lines_is_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "_SKETCH_SIZE", 500)
    record = {"sketch": own_text._sketch(f"line {i}" for i in range(20_000))}
    assert len(record["sketch"]) == 500
    mixed = [f"line {i}" for i in range(6_000)] + [f"new {i}" for i in range(14_000)]
    assert own_text._learnt_share(mixed, record) == pytest.approx(0.3, abs=0.07)
    assert own_text._learnt_share(mixed, {}) == own_text._learnt_share(mixed, None) == 0


def test_what_texts_do_not_store_is_drawn(tmp_path: Path) -> None:
    for stored, sizes, chosen in (
        (("train",), (48, 6, 6), 6),
        (("train", "test"), (54, 6, 4), 6),
        (("train", "valid"), (54, 4, 6), 0),
        (NAMED, (60, 4, 4), 0),
    ):
        text = own_text.load_own_text(write_splits(tmp_path / "-".join(stored), names=stored))
        parts = text.divided_in_three()
        assert tuple(map(len, parts)) == sizes, stored
        record = text.record(*parts[:2])
        assert record["lines"] == sizes[0] and record["validation"] == chosen
        for split, part in zip(own.SPLITS, parts, strict=True):
            assert own_text.lines_of_split(text, split, record) == part
        assert len(own_text.lines_of_split(text, "all", record)) == sum(sizes)
    # What chose the weights of a recipe measures them, where nothing else can.
    training, other = (text := own_text.load_own_text(tmp_path / "train-valid")).divided()
    record = text.record(training, [])
    assert own_text.lines_of_split(text, "test", record) == other == ["the va dog"] * 4
    assert own_text.lines_of_split(text, "test", None) == other
    text = own_text.load_own_text(write_splits(tmp_path / "none", names=("valid", "test")))
    with pytest.raises(UserError, match="no split to train on"):
        text.divided_in_three()
    write_splits(tmp_path / "half", "{}-00000-of-00002.parquet", ("train",))
    with pytest.raises(UserError, match="names say that there are 2"):
        own_text.load_own_text(tmp_path / "half")


def test_the_stored_test_split_of_a_text_is_measured(tmp_path: Path, capsys) -> None:
    base, output = tiny_text(tmp_path / "base"), tmp_path / "tuned"
    data = write_splits(tmp_path / "sp2")
    options = ["--max-steps", 1, "--tokenizer", "build"]
    printed = finetuned(capsys, base, "--data", data, "--output", output, *options)
    assert "sp2 test" in printed and "chose the weights" not in printed
    words = json.loads((output / "tokenizer.json").read_text())["model"]["vocab"]
    assert "tr" in words and not {"te", "va"} & set(words)  # nothing of theirs was learnt
    test = own_text.text_digest(["the te dog"] * 4)
    content = evaluated(output, data, tmp_path)
    assert content["data"]["fingerprint"] == test and content["data"]["samples"] == 4 * 4
    assert json.loads((output / "own_data.json").read_text())["stored"]["test"] == test


def test_options_of_another_task_are_refused(tiny_mdeq: Path, tmp_path: Path, capsys) -> None:
    deqzoo.IGNNForGraphClassification(
        deqzoo.IGNNConfig(num_features=3, hidden_sizes=[8], num_labels=2)
    ).save_pretrained(tmp_path / "graphs")
    for model, option, value in (
        (tiny_mdeq, "--tokenizer", "extend"),
        (tiny_mdeq, "--column", "story"),
        (tmp_path / "graphs", "--label-column", "kind"),
    ):
        arguments = [model, "--data", tmp_path, "--output", tmp_path / "tuned", option, value]
        assert run(["finetune", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert option in error and "leave it out" in error and not (tmp_path / "tuned").exists()


def test_a_column_of_texts_is_remembered(tmp_path: Path, tiny_mdeq: Path, capsys) -> None:
    base, output = tiny_text(tmp_path / "base"), tmp_path / "tuned"
    table, others = tmp_path / "t.jsonl", tmp_path / "others"
    rows = [{"title": "a cat", "story": f"the dog saw a cat {'the ' * i}"} for i in range(20)]
    table.write_text("\n".join(map(json.dumps, rows)))
    command = ["finetune", str(base), "--data", str(table), "--output", str(output)]
    assert run(command) == 2 and "choose with --column: title, story" in capsys.readouterr().err
    finetuned(capsys, *command[1:], "--column", "story", "--max-steps", 1)
    assert own.read_record(output)["column"] == "story"
    file = output / "evaluation" / "t-test.json"
    digest = own_text.text_digest([row["story"] for row in rows[-2:]])
    assert json.loads(file.read_text())["data"]["fingerprint"] == digest
    assert evaluated(output, table, tmp_path)["data"]["fingerprint"] == digest
    pq.write_table(pa.table({"text": ["the cat"], "title": ["a dog"]}), tmp_path / "u.parquet")
    others.mkdir()
    shutil.copy(tmp_path / "u.parquet", others)
    (others / "v.txt").write_text("the cat")
    # Where there is no such column, the usual ones count; a name that is given has to be there.
    assert evaluated(output, others, tmp_path)["data"]["samples"] == 2 * 3
    command = ["evaluate", str(output), "--data", str(others), "--output", str(tmp_path / "e.json")]
    assert run([*command, "--column", "title"]) == 0
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["data"]["fingerprint"] == own_text.text_digest(["a dog", "the cat"])
    assert content["command"].endswith("--column title")
    capsys.readouterr()
    assert run([*command, "--column", "story"]) == 2
    assert "no column of text 'story'; it has text, title" in capsys.readouterr().err
    # Pictures and known corpora have no such columns.
    data, out = write_folder(tmp_path / "things"), tmp_path / "out"
    for refused in (
        ["finetune", tiny_mdeq, "--data", data, "--output", out, "--column", "title"],
        ["evaluate", tiny_mdeq, "--data", data, "--output", out, "--column", "title"],
        ["evaluate", output, "--column", "title"],
    ):
        assert run(list(map(str, refused))) == 2
        said = capsys.readouterr().err
        assert "--column" in said and said.count("\n") == 1


@pytest.mark.parametrize("cutoffs", ((), (4,)))
def test_known_words_keep_their_vectors(tmp_path: Path, cutoffs: tuple[int, ...]) -> None:
    model = deqzoo.DEQModel.from_pretrained(tiny_text(tmp_path / "base", cutoffs))
    from deqzoo.models.readers import load_tokenizer

    tokenizer = load_tokenizer(model)
    wider, words = with_words(model, tokenizer, ["the horse saw a horse"], "extend")
    assert len(words) == len(WORDS) + 2 and words.get_vocab()["horse"] == len(WORDS)
    ids = torch.tensor([[1, 5, 7, 6]])
    with torch.no_grad():
        states = [m.transformer(ids).last_hidden_state for m in (model, wider)]
    torch.testing.assert_close(states[0], states[1])
    if cutoffs:
        with pytest.raises(UserError, match="extend"):
            with_words(model, tokenizer, ["horse"], "build")
    else:
        built, own_words = with_words(model, tokenizer, ["the horse"], "build")
        assert set(own_words.get_vocab()) == {"<eos>", "<unk>", "the", "horse"}
        assert built.config.vocab_size == 4


def test_graphs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data_class = pytest.importorskip("torch_geometric.data").Data
    torch.manual_seed(0)
    config = deqzoo.IGNNConfig(num_features=5, hidden_sizes=[8], num_labels=3)
    base, output = tmp_path / "base", tmp_path / "tuned"
    deqzoo.IGNNForGraphClassification(config).save_pretrained(base)
    graphs = []
    for number in range(40):
        kind, n = number % 2, 4 + number % 5
        pairs = [(i, (i + 1) % n) for i in range(n)]
        edges = torch.tensor(pairs + [(b, a) for a, b in pairs]).T
        x = torch.eye(2)[[kind] * n] + 0.01 * number
        graphs.append(data_class(x=x, edge_index=edges, y=torch.tensor([3 + 4 * kind])))
    torch.save(graphs, tmp_path / "rings.pt")
    options = ["--max-steps", 60, "--lr", 0.01]
    printed = finetuned(capsys, base, "--data", tmp_path / "rings.pt", "--output", output, *options)
    assert "100.00 % on rings test" in printed
    rows = lines(capsys, "predict-graphs", output, tmp_path / "rings.pt")
    assert [row["label"] for row in rows] == ["3", "7"] * 20
    assert all(row["target"] == row["label"] for row in rows)
    content = json.loads((output / "evaluation" / "rings-test.json").read_text())
    assert content["data"]["samples"] == 8
    model = deqzoo.DEQModel.from_pretrained(output)
    assert model.config.graph_encoding["classes"] == [3, 7]
    # The last one is only measured; it is refused before anything is trained.
    graphs[-1].edge_weight = torch.ones(3)
    torch.save(graphs, tmp_path / "rings.pt")
    arguments = ["finetune", base, "--data", tmp_path / "rings.pt", "--output", tmp_path / "out"]
    capsys.readouterr()
    assert run(list(map(str, arguments))) == 2
    assert "graph 39 of rings: edge_weight has 3 entries" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tiny_mdeq: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    data = write_folder(tmp_path / "things", count=7, side=32)
    base = ["finetune", tiny_mdeq, "--data", data, "--quiet", "--max-steps", 7, "--lr", 0.01]
    command = [*map(str, base), "--output"]
    assert run([*command, str(tmp_path / "whole")]) == 0
    step, calls = DEQTrainer.training_step, []

    def dies(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 5:  # within the second epoch of three steps
            raise KeyboardInterrupt
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(DEQTrainer, "training_step", dies)
        assert run([*command, str(tmp_path / "cut")]) == 130
    capsys.readouterr()
    assert run([*command, str(tmp_path / "cut")]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert run([*command, str(tmp_path / "cut"), "--resume", "--seed", "1"]) == 2
    assert "other data or settings" in capsys.readouterr().err
    # The same pictures in the same order, but with other labels.
    before = own_pictures.load_own_pictures(data)["train"].describe()["fingerprint"]
    (data / "red thing").rename(data / "rose thing")
    assert own_pictures.load_own_pictures(data)["train"].describe()["fingerprint"] != before
    assert run([*command, str(tmp_path / "cut"), "--resume"]) == 2
    assert "other data or settings" in capsys.readouterr().err
    (data / "rose thing").rename(data / "red thing")
    assert run([*command, str(tmp_path / "cut"), "--resume"]) == 0
    assert "going on from" in capsys.readouterr().err
    results = []
    for name in ("whole", "cut"):
        record = json.loads((tmp_path / name / "run.json").read_text())
        weights = load_file(tmp_path / name / "model.safetensors")
        results.append((weights, record["curve"], record["steps"]))
        assert not (tmp_path / name / "checkpoints").exists()
        assert not (tmp_path / name / "begun.json").exists()
    assert results[0][1:] == results[1][1:]
    assert all(torch.equal(results[0][0][key], results[1][0][key]) for key in results[0][0])
    assert run([*command, str(tmp_path / "cut"), "--resume"]) == 2
    assert "already holds a model" in capsys.readouterr().err


def test_a_run_cut_off_after_its_training_is_finished(
    tiny_mdeq: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    data, output = write_folder(tmp_path / "things"), tmp_path / "tuned"
    base = ["finetune", tiny_mdeq, "--data", data, "--output", output, "--quiet", "--max-steps", 4]
    command = [*map(str, base)]

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("deqzoo.data.own.write_record", dies)  # the weights are saved by then
        assert run(command) == 130
    before = load_file(output / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(DEQTrainer, "training_step", dies)
        patch.setattr("deqzoo.hub.finetune_cli.finish", dies)
        assert run([*command, "--resume"]) == 130
    assert run([*command, "--resume"]) == 0
    after = load_file(output / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (output / "README.md").is_file() and not (output / "checkpoints").exists()
    assert "on things test" in capsys.readouterr().out


def test_the_figure_is_not_of_what_chose_the_weights(
    tiny_mdeq: Path, tmp_path: Path, capsys
) -> None:
    data, output = write_folder(tmp_path / "things", count=20, side=24), tmp_path / "tuned"
    command = ["finetune", tiny_mdeq, "--data", data, "--output", output, "--max-steps", 2]
    printed = finetuned(capsys, *command[1:])
    assert "chose the weights" not in printed
    record = own.read_record(output)
    parts = {
        split: own_pictures.pictures_of_split(data, split, tuple(COLOURS), record)
        for split in (*own.SPLITS, "all")
    }
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 42, "validation": 6, "test": 12, "all": 60,
    }  # fmt: skip
    seen = [set(parts[split].digests()) for split in own.SPLITS]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert torch.bincount(parts["test"].labels).tolist() == [4, 4, 4]
    content = json.loads((output / "evaluation" / "things-test.json").read_text())
    assert content["data"]["samples"] == 12 and "chose_weights" not in content["data"]
    # Six pictures of a class are too few for three parts, and that is said.
    few, output = write_folder(tmp_path / "few"), tmp_path / "of-few"
    assert run([*map(str, ["finetune", tiny_mdeq, "--data", few, "--output", output]),
                "--max-steps", "2", "--quiet"]) == 0  # fmt: skip
    printed = capsys.readouterr()
    assert "(which chose the weights, too)" in printed.out and "flatters" in printed.err
    content = json.loads((output / "evaluation" / "few-test.json").read_text())
    assert content["data"]["chose_weights"] is True
    assert "also chose the weights" in (output / "README.md").read_text()
    # Measured on other data, the same model's figure is as good as any.
    file = tmp_path / "e.json"
    assert run(["evaluate", str(output), "--data", str(data), "--output", str(file)]) == 0
    assert "chose_weights" not in json.loads(file.read_text())["data"]


def test_a_limit_takes_samples_of_all_classes(tiny_mdeq: Path, tmp_path: Path) -> None:
    """Folders and lists of one's own are sorted by class."""
    data_class = pytest.importorskip("torch_geometric.data").Data
    folder = tmp_path / "things"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (8, 8), (i, len(name), ord(name[0]))).save(folder / name / f"{i}.png")
    edges = torch.tensor([[0, 1], [1, 0]])
    torch.manual_seed(0)
    graphs = [data_class(x=torch.rand(2, 3), edge_index=edges, y=i // 30) for i in range(60)]
    torch.save(graphs, tmp_path / "g.pt")
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[4], num_labels=2)
    pictures = deqzoo.DEQModel.from_pretrained(tiny_mdeq)
    for model, data in (
        (pictures, folder),
        (deqzoo.IGNNForGraphClassification(config), tmp_path / "g.pt"),
    ):
        whole = evaluator_of(model, data=data)
        some = evaluator_of(model, data=data, limit=20)
        labels = some.batches(None).labels
        assert len(labels) == 20 and 2 < labels.eq(labels[0]).sum() < 18
        assert torch.equal(whole.batches(None).labels[:20], labels)
        assert whole.batches(None).labels.eq(labels[0]).sum() == 30


def test_copies_of_a_sample_are_in_one_part() -> None:
    labels = torch.arange(3).repeat_interleave(40)
    digests = [str(row // 4) for row in range(120)]  # every sample four times
    parts = own.three_parts(labels, digests=digests)
    assert sorted(row for part in parts for row in part) == list(range(120))
    owners = [{digests[row] for row in part} for part in parts]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    assert all(owners)
    # A class of copies alone has nothing to be measured by.
    train, _, held_out = own.three_parts(labels, digests=["a"] * 40 + digests[40:])
    assert set(range(40)) <= set(train) and held_out


def test_stored_splits_are_taken(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "things", count=40, side=8)
    whole = own_pictures.load_own_pictures(folder)["train"]
    rows = own.three_parts(whole.labels)
    parts = {s: whole.part(r, s) for s, r in zip(own.SPLITS, rows, strict=True)}
    for stored, sizes in (
        (("train",), (57, 9, 18)),
        (("train", "test"), (75, 9, 24)),
        (("train", "validation"), (66, 12, 18)),
        (own.SPLITS, (84, 12, 24)),
    ):
        found = own_pictures.divide_in_three({split: parts[split] for split in stored})
        assert tuple(map(len, found)) == sizes, stored
        for split, part in zip(own.SPLITS, found, strict=True):
            if split in stored and split != "train":
                assert part is parts[split]


def test_settings_are_checked() -> None:
    for wrong in ({"freeze": "all"}, {"tokenizer": "new"}, {"held_out": 1.0}, {"epochs": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Settings(**wrong)


def scratch(tmp_path: Path, content: dict, capsys: pytest.CaptureFixture) -> Path:
    """Train a recipe from nothing; the folder of the model."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert run(["train", str(recipe), "--dry-run"]) == 0, capsys.readouterr().err
    arguments = ["train", str(recipe), "--output", str(tmp_path / "run"), "--quiet"]
    assert run(arguments) == 0, capsys.readouterr().err
    capsys.readouterr()
    return tmp_path / "run" / "model"


def evaluated(model: Path, data: Path, tmp_path: Path) -> dict:
    file = tmp_path / "evaluation.json"
    arguments = ["evaluate", model, "--data", data, "--output", file]
    assert run(list(map(str, arguments))) == 0
    return json.loads(file.read_text())


def test_pictures_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_folder(tmp_path / "things", count=10, side=20, mode="L")
    content = {
        "name": "own",
        "task": "image-classification",
        "data": {"name": "imagefolder", "path": str(data), "options": {"size": 16}},
        "model": {
            "family": "mdeq",
            "preset": "mdeq-phantom-cifar-small",
            "overrides": {
                "channels": [8, 8], "head_channels": [4, 4], "final_channels": 16, "expansion": 1,
                "num_groups": 2, "image_size": 16,
            },
        },
        "optimizer": {"name": "adamw", "lr": 0.005},
        "batch_size": 8,
        "evaluation": {"snapshots": 0},
        "stages": [{"epochs": 2, "solver": {"name": "anderson", "max_steps": 3}}],
        "report_to": ["tensorboard"],
    }  # fmt: skip
    model = scratch(tmp_path, content, capsys)
    record = evaluated(model, data, tmp_path)
    assert record["data"]["samples"] == 6 and record["data"]["name"] == "things"
    assert list(deqzoo.DEQModel.from_pretrained(model).config.id2label.values()) == list(COLOURS)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    recipe = tmp_path / "recipe.yaml"

    def refused(**changes: dict) -> str:
        recipe.write_text(yaml.safe_dump(content | changes))
        capsys.readouterr()
        assert run(["train", str(recipe), "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    for key, value in (
        ("num_labels", 20),
        ("id2label", {0: "cat", 1: "dog"}),
        ("id2label", {0: "cat", 1: "dog", 2: "ship"}),
        ("label2id", dict.fromkeys(COLOURS, 0)),
    ):
        overrides = {**content["model"]["overrides"], key: value}
        error = refused(model={**content["model"], "overrides": overrides})
        assert "which the data decide: leave it out" in error, error
    same = {"num_labels": 3, "id2label": dict(enumerate(COLOURS))}
    overrides = content["model"]["overrides"] | same
    recipe.write_text(
        yaml.safe_dump(content | {"model": {**content["model"], "overrides": overrides}})
    )
    assert run(["train", str(recipe), "--dry-run"]) == 0, capsys.readouterr().err


def test_a_recipe_trains_at_the_side_that_the_model_is_used_at(tmp_path: Path) -> None:
    """Without a resolution of a stage; pictures are kept larger in memory."""
    from deqzoo.recipe import Recipe, from_plain
    from deqzoo.tasks import build_task
    from deqzoo.tasks.base import Plan

    data = write_folder(tmp_path / "things", count=10, side=70)
    content = {
        "name": "own", "task": "image-classification",
        "data": {"name": "imagefolder", "path": str(data)},
        "model": {"family": "mdeq", "preset": "mdeq-phantom-cifar-small"},
        "optimizer": {"name": "adamw", "lr": 0.005}, "batch_size": 8, "stages": [{"epochs": 1}],
    }  # fmt: skip
    recipe = from_plain(Recipe, content, "")
    task = build_task(recipe, None)
    assert task.training.pixels.shape[-1] == 64 and task.config.image_size == 32
    shape = (8, 3, 32, 32)
    assert task.batch(Plan.of(recipe, task), 0, 0, 1)["pixel_values"].shape == shape
    resident = task.resident(torch.device("cpu"))
    rows = resident.epoch(0, recipe.stages[0])[0]
    inputs = resident.inputs(rows, torch.tensor(0), recipe.stages[0])
    assert inputs["pixel_values"].shape == shape
    sizes = []

    class Seen(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, pixel_values: torch.Tensor, shallow: bool) -> SimpleNamespace:
            n = len(pixel_values)
            sizes.append(pixel_values.shape[-1])
            one = torch.ones(n)
            return SimpleNamespace(
                logits=torch.zeros(n, 3), n_steps=one, residual=one, converged=one.bool()
            )

    task.evaluate(Seen(), recipe.stages[0], 100)
    assert sizes == [32]
    # The first samples of a validation are of several classes.
    assert len(task.validation.labels[:4].unique()) > 1
    with pytest.raises(UserError, match="a batch of 64 is more than the training data hold"):
        Plan.of(replace(recipe, batch_size=64), SimpleNamespace(steps_per_epoch=lambda stage: 0))


def test_text_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("The dog saw the cat.\nA cat-dog saw 1,000 horses.\n" * 50)
    content = {
        "name": "own",
        "task": "language-modeling",
        "data": {"name": "text", "path": str(file)},
        "model": {
            "family": "deq_transformer",
            "preset": "deq-transformer-wikitext2",
            "overrides": {
                "d_model": 16, "d_embed": 16, "n_head": 2, "d_inner": 16, "tgt_len": 8,
                "mem_len": 8, "local_size": 8, "cutoffs": [], "tie_projections": [True],
            },
        },
        "optimizer": {"name": "adamw", "lr": 0.01},
        "batch_size": 4,
        "evaluation": {"snapshots": 0, "keep": "best"},
        "stages": [{"epochs": 2, "solver": {"name": "anderson", "max_steps": 3}}],
    }  # fmt: skip
    model = scratch(tmp_path, content, capsys)
    record = evaluated(model, file, tmp_path)
    assert record["data"]["samples"] == 5 * (7 + 11) and record["data"]["unknown_share"] == 0
    assert record["data"]["chose_weights"] is True
    (row,) = lines(capsys, "perplexity", file, "--model", model)
    assert row["unknown_share"] == 0


def test_stored_splits_of_texts_in_recipes(tmp_path: Path) -> None:
    corpus, record = own_text.own_corpus(write_splits(tmp_path / "sp"))
    assert {split: len(corpus.stream(split)) for split in own.SPLITS} == {
        "train": 240, "validation": 16, "test": 16,
    }  # fmt: skip
    assert not {"va", "te"} & set(corpus.vocabulary) and record["lines"] == 60
    assert not torch.equal(corpus.stream("test"), corpus.stream("train")[:16])
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"title": ["a"] * 9, "story": ["the dog"] * 9}), table)
    assert own_text.own_corpus(table, column="story")[1]["column"] == "story"
    two, _ = own_text.own_corpus(write_splits(tmp_path / "two", names=("train", "test")))
    assert torch.equal(two.stream("validation"), two.stream("test"))
    assert len(two.stream("train")) == 240


def test_graphs_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data_class = pytest.importorskip("torch_geometric.data").Data
    edges = torch.tensor([[0, 1], [1, 0]])
    graphs = [
        data_class(x=torch.eye(3)[[i % 2, 2]], edge_index=edges, y=torch.tensor([i % 2]))
        for i in range(30)
    ]
    for i, graph in enumerate(graphs):
        graph.x = graph.x + 0.001 * i
    torch.save(graphs, tmp_path / "pairs.pt")
    content = {
        "name": "own",
        "task": "graph-classification",
        "data": {"name": "graphs", "path": str(tmp_path / "pairs.pt")},
        "model": {"family": "ignn", "overrides": {"hidden_sizes": [8], "dropout": 0.0}},
        "optimizer": {"name": "adam", "lr": 0.02},
        "schedule": {"name": "constant", "warmup": 0},
        "stages": [{"epochs": 60}],
        "batch_size": 8,
        "precision": "float32",
        "evaluation": {"per_epoch": 0.1},
        "report_to": ["tensorboard"],
    }
    model = scratch(tmp_path, content, capsys)
    record = evaluated(model, tmp_path / "pairs.pt", tmp_path)
    assert record["results"]["accuracy"] == 1 and record["data"]["samples"] == 6
    capsys.readouterr()
    for change in (
        {"name": "a/b"},
        {"data": {"name": "graphs"}},
        {"model": {"family": "ignn", "overrides": {"width": 3}}},
        {"x": 1},
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**content, **change}))
        assert run(["train", str(recipe), "--dry-run"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_reports_go_where_the_user_says(tiny_mdeq: Path, tmp_path: Path, capsys) -> None:
    data, output = write_folder(tmp_path / "things"), tmp_path / "tuned"
    options = ["--max-steps", 2, "--report-to", "tensorboard"]
    finetuned(capsys, tiny_mdeq, "--data", data, "--output", output, *options)
    assert list(output.rglob("events.out.tfevents*"))
    arguments = ["finetune", str(tiny_mdeq), "--data", str(data), "--output", str(tmp_path / "x")]
    assert run([*arguments, "--report-to", "nobody"]) == 2
    assert "report_to: unknown 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "files"), (("wandb", "*.wandb"), ("trackio", "*.db")))
def test_reports_reach_those_who_have_them(
    tiny_mdeq: Path, tmp_path: Path, name: str, files: str
) -> None:
    """In a process of its own: trackio reads its folder when it is imported."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    data, output = write_folder(tmp_path / "things"), tmp_path / "tuned"
    command = [sys.executable, "-m", "deqzoo", "finetune", tiny_mdeq, "--data", data, "--quiet"]
    folders = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), "--output", str(output), "--max-steps", "2", "--report-to", name],
        cwd=tmp_path, env={**os.environ, "WANDB_MODE": "offline", **folders},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.rglob(files))

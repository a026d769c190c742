"""Image data sets: splits and fingerprints that depend on the pictures alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deqzoo.data import (
    CIFAR10,
    IMAGENETTE,
    TINY_IMAGENET,
    load_cifar10,
    load_imagenette,
    load_tiny_imagenet,
)
from deqzoo.data.images import picture_digests, validation_rows
from deqzoo.errors import UserError
from deqzoo.models.mdeq.image_processing_mdeq import to_rgb
from tests.conftest import write_pictures


def test_splits_partition_the_stored_one(cifar_folder: Path) -> None:
    whole = load_cifar10("train+validation", cifar_folder)
    train = load_cifar10("train", cifar_folder)
    validation = load_cifar10("validation", cifar_folder)
    assert whole.pixels.shape == (80, 3, 32, 32) and whole.pixels.dtype == torch.uint8
    together = picture_digests(train.pixels, train.labels) + picture_digests(
        validation.pixels, validation.labels
    )
    assert sorted(together) == sorted(picture_digests(whole.pixels, whole.labels))
    assert validation.labels.bincount().tolist() == [4] * 10
    assert len({whole.fingerprint, train.fingerprint, validation.fingerprint}) == 3


def test_row_order_and_compression_change_nothing(cifar_folder: Path, tmp_path: Path) -> None:
    name = "plain_text/train-00000-of-00001.parquet"
    table = pq.read_table(cifar_folder / name)
    (tmp_path / "plain_text").mkdir()
    rows = table.to_pylist()[::-1]
    for row in rows:
        stream = pa.BufferOutputStream()
        picture = Image.open(pa.BufferReader(row["img"]["bytes"]))
        picture.save(stream, "WEBP", lossless=True)
        row["img"]["bytes"] = stream.getvalue().to_pybytes()
    pq.write_table(
        pa.Table.from_pylist(rows[:30]), tmp_path / "plain_text/train-00000-of-2.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist(rows[30:]), tmp_path / "plain_text/train-00001-of-2.parquet"
    )
    for split in ("train", "validation"):
        one, other = load_cifar10(split, cifar_folder), load_cifar10(split, tmp_path)
        assert one.fingerprint == other.fingerprint
        assert not torch.equal(one.pixels, other.pixels)


def test_the_seed_changes_the_split(cifar_folder: Path) -> None:
    one = load_cifar10("validation", cifar_folder, seed=0)
    other = load_cifar10("validation", cifar_folder, seed=1)
    assert one.fingerprint != other.fingerprint and len(one) == len(other)


def test_published_split_is_five_thousand_balanced_pictures() -> None:
    labels = torch.arange(10).repeat_interleave(5000)
    digests = [index.to_bytes(8, "big") for index in range(50_000)]
    chosen = validation_rows(digests, labels, CIFAR10.validation_per_class, seed=0)
    assert labels[chosen].bincount().tolist() == [500] * 10


def test_stand_ins_are_not_called_complete(cifar_folder: Path, caplog) -> None:
    pictures = load_cifar10("test", cifar_folder)
    assert not pictures.complete and "10000" in caplog.text
    assert pictures.describe()["pictures"] == 40


def test_changed_pixel_changes_the_fingerprint(cifar_folder: Path) -> None:
    pictures = load_cifar10("test", cifar_folder)
    digests = picture_digests(pictures.pixels, pictures.labels)
    pixels = pictures.pixels.clone()
    pixels[7, 0, 0, 0] += 1
    changed = picture_digests(pixels, pictures.labels)
    assert [a != b for a, b in zip(digests, changed, strict=True)].count(True) == 1


def test_other_folders_are_refused(tmp_path: Path, cifar_folder: Path) -> None:
    with pytest.raises(UserError, match="does not hold CIFAR-10"):
        load_cifar10("test", tmp_path)
    with pytest.raises(UserError, match="no split 'dev'.*train, validation"):
        load_cifar10("dev", cifar_folder)
    with pytest.raises(UserError, match="does not exist"):
        load_cifar10("test", tmp_path / "absent")
    with pytest.raises(UserError, match="--data"):
        load_cifar10("test")
    file = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), file)
    with pytest.raises(UserError, match="columns are text, label"):
        load_cifar10("test", tmp_path)
    file.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot read CIFAR-10"):
        load_cifar10("test", tmp_path)


def png(picture: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", **options)
    return stream.getvalue()


def named(names: object) -> dict[bytes, bytes]:
    """Class names as `datasets` writes them into a parquet file."""
    label = {"names": names, "_type": "ClassLabel"}
    return {b"huggingface": json.dumps({"info": {"features": {"label": label}}}).encode()}


def test_labels_are_mapped_by_the_names_in_the_file(tmp_path: Path) -> None:
    pictures = [png(Image.new("RGB", (32, 32), (i, 0, 0))) for i in range(10)]
    order = sorted(CIFAR10.classes, reverse=True)
    labels = [order.index(name) for name in CIFAR10.classes]
    table = pa.table({"img": [{"bytes": p} for p in pictures], "label": labels})
    file = tmp_path / "test-0.parquet"
    pq.write_table(table.replace_schema_metadata(named(order)), file)
    assert load_cifar10("test", tmp_path).labels.tolist() == list(range(10))
    pq.write_table(pa.table({"img": pictures, "label": list(CIFAR10.classes)}), file)
    assert load_cifar10("test", tmp_path).labels.tolist() == list(range(10))
    for names in ([f"thing {i}" for i in range(10)], list(CIFAR10.classes)[:9]):
        pq.write_table(table.replace_schema_metadata(named(names)), file)
        with pytest.raises(UserError, match="does not hold CIFAR-10: its classes are"):
            load_cifar10("test", tmp_path)
    for broken in ({b"huggingface": b"{no"}, {b"huggingface": b"[]"}, named(3)):
        pq.write_table(table.replace_schema_metadata(broken), file)
        with pytest.raises(UserError, match="write the file anew"):
            load_cifar10("test", tmp_path)


def test_pictures_are_decoded_as_the_processor_does(tmp_path: Path) -> None:
    ramp = np.arange(1024).reshape(32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    cases = [
        png(Image.fromarray((ramp // 4).astype(np.uint8)).convert("RGB"), exif=exif),
        png(Image.new("RGBA", (32, 32), (255, 0, 0, 0))),
        png(Image.fromarray((ramp * 64).astype(np.uint16))),
    ]
    table = pa.table({"img": [{"bytes": case} for case in cases], "label": [0, 1, 2]})
    pq.write_table(table, tmp_path / "test-0.parquet")
    found = load_cifar10("test", tmp_path).pixels
    for seen, case in zip(found, cases, strict=True):
        right = np.asarray(to_rgb(Image.open(io.BytesIO(case))))
        assert np.array_equal(seen.permute(1, 2, 0).numpy(), right)


def test_copies_and_missing_parts_are_no_guess(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a" / "test-00000-of-00001.parquet", 20, seed=0)
    write_pictures(tmp_path / "a" / "test-old.parquet", 20, seed=1)
    assert len(load_cifar10("test", tmp_path)) == 20
    write_pictures(tmp_path / "backup" / "test-00000-of-00001.parquet", 20, seed=0)
    with pytest.raises(UserError, match="more than once"):
        load_cifar10("test", tmp_path)
    assert len(load_cifar10("test", tmp_path / "a")) == 20
    write_pictures(tmp_path / "b" / "test-00000-of-00002.parquet", 20, seed=0)
    with pytest.raises(UserError, match="1 files .* there are 2"):
        load_cifar10("test", tmp_path / "b")


def test_rows_without_a_picture(tmp_path: Path) -> None:
    content = png(Image.new("RGB", (32, 32)))
    for cells in ([None, {"bytes": content}], [{"bytes": None, "path": "x.png"}] * 2):
        cells = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"img": cells, "label": [0, 1]}), tmp_path / "test-0.parquet")
        with pytest.raises(UserError, match="picture is empty"):
            load_cifar10("test", tmp_path)
    table = pa.table({"img": [{"bytes": content[:60]}], "label": [0]})
    pq.write_table(table, tmp_path / "test-0.parquet")
    with pytest.raises(UserError, match="cannot read a picture of CIFAR-10"):
        load_cifar10("test", tmp_path)


def write_photographs(
    path: Path, sizes: list[tuple[int, int]], labels: list[int], names: list[str] | None = None
) -> None:
    """Pictures of noise; `names` of the classes are kept as the Hub keeps them."""
    rows = []
    for size, label in zip(sizes, labels, strict=True):
        stream = pa.BufferOutputStream()
        noise = np.random.default_rng(label).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue().to_pybytes()}, "label": label})
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pq.write_table(table, path)


def test_imagenette_is_scaled_and_cropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "160px" / "validation-00000-of-00001.parquet"
    write_photographs(file, [(40, 60), (50, 20)], [0, 9])
    pictures = load_imagenette("test", tmp_path, size=16)
    assert pictures.pixels.shape == (2, 3, 16, 16)
    assert pictures.classes[9] == "parachute"
    assert not pictures.complete
    monkeypatch.setitem(IMAGENETTE.rows, "validation", 2)
    assert load_imagenette("test", tmp_path, size=16).complete


def _write_tiny_imagenet(folder: Path, shades: dict[str, list[int]]) -> None:
    """The authors' layout: pictures of one shade each, as many to train as to test."""
    rows = []
    for number, values in shades.items():
        images = folder / "train" / number / "images"
        images.mkdir(parents=True)
        for i, value in enumerate(values):
            Image.new("L", (64, 64), value).save(images / f"{number}_{i}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    for number, values in shades.items():
        for value in values:
            name = f"val_{len(rows)}.JPEG"
            Image.new("RGB", (64, 64), (value, 0, 0)).save(folder / "val" / "images" / name)
            rows.append(f"{name}\t{number}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))


def test_tiny_imagenet_in_its_authors_layout(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    _write_tiny_imagenet(folder, {"n01443537": [10, 20], "n12267677": [200, 220]})
    for data in (tmp_path, folder):
        test = load_tiny_imagenet("test", data)
        assert [test.classes[label] for label in test.labels] == ["goldfish"] * 2 + ["acorn"] * 2
        assert test.pixels.shape == (4, 3, 64, 64) and not test.complete
        assert (test.pixels[:, 1].float().mean() < 5) and test.pixels[2, 0].float().mean() > 150
    train, held_out = (load_tiny_imagenet(split, folder) for split in ("train", "validation"))
    assert train.labels.tolist() == held_out.labels.tolist() == [0, test.labels[-1].item()]
    grey = load_tiny_imagenet("train+validation", folder).pixels
    assert grey.shape[1] == 3 and torch.equal(grey[:, 0], grey[:, 2])
    (folder / "train" / "n01443537").rename(folder / "train" / "n00000001")
    with pytest.raises(UserError, match="does not hold Tiny ImageNet: class n00000001"):
        load_tiny_imagenet("train", folder)


def test_tiny_imagenet_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    """There the classes are WordNet's numbers, in their order."""
    stored = sorted(TINY_IMAGENET.stored_names)
    file = tmp_path / "data" / "valid-00000-of-00001.parquet"
    write_photographs(file, [(64, 64), (64, 64)], [0, 199], names=stored)
    test = load_tiny_imagenet("test", tmp_path)
    assert [test.classes[label] for label in test.labels] == ["goldfish", "acorn"]


def test_variants_and_converted_layouts_are_told_apart(tmp_path: Path) -> None:
    write_photographs(tmp_path / "160px" / "validation" / "0000.parquet", [(40, 60)], [3])
    write_photographs(tmp_path / "320px" / "validation" / "0000.parquet", [(80, 120)], [4])
    assert load_imagenette("test", tmp_path, size=16).labels.tolist() == [3]


def test_wrong_pictures_and_labels_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "test-00000-of-00001.parquet"
    write_photographs(file, [(40, 60), (50, 20)], [0, 9])
    with pytest.raises(UserError, match="pictures of 2 sizes"):
        load_cifar10("test", tmp_path)
    write_photographs(file, [(32, 32)], [10])
    with pytest.raises(UserError, match="labels outside 0..9"):
        load_cifar10("test", tmp_path)

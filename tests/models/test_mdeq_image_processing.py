"""Pictures of any mode and size become the batch the model expects; the pipeline works on them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import deqzoo  # noqa: F401  (registers the classes)
from deqzoo.data.pictures import read_picture
from deqzoo.evaluation.classify import classify
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.image_processing_mdeq import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    MDEQImageProcessor,
    to_rgb,
)
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification


def picture(mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_a_cifar_picture_is_only_scaled_and_normalised():
    image = picture()
    found = MDEQImageProcessor()(image, return_tensors="pt")["pixel_values"]
    scaled = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    torch.testing.assert_close(found, (scaled - mean) / std)


@pytest.mark.parametrize(
    "mode", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16")
)
@pytest.mark.parametrize("size", ((32, 32), (50, 31), (7, 90), (1, 1)))
def test_every_mode_and_size(mode, size):
    image = picture("RGB", size)
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], 40_000, np.uint16))
        assert image.mode == "I;16"
    else:
        image = image.convert(mode)
    pixels = MDEQImageProcessor()(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32
    assert pixels.isfinite().all()


def test_several_at_once():
    images = [picture("L", (40, 40)), picture("RGBA"), picture("P", (33, 80))]
    pixels = MDEQImageProcessor()(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 32, 32)


def test_arrays_and_tensors():
    array = np.asarray(picture())
    expected = MDEQImageProcessor()(picture(), return_tensors="pt")["pixel_values"]
    for given in (array, torch.tensor(array).permute(2, 0, 1)):
        found = MDEQImageProcessor()(given, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected)


def test_16_bit_grey_keeps_its_brightness():
    for values, mode, expected in (
        (np.full((2, 2), 32_896, np.uint16), "I;16", 128),
        (np.full((2, 2), 200, np.uint16), "I;16", 1),
        (np.full((2, 2), 32_896, np.int32), "I", 128),
        (np.full((2, 2), 200, np.int32), "I", 200),
        (np.full((2, 2), 0.5, np.float32), "F", 128),
        (np.full((2, 2), 77, np.float32), "F", 77),
    ):
        image = Image.fromarray(values)
        assert image.mode == mode
        assert to_rgb(image).getpixel((0, 0)) == (expected,) * 3


def test_white_is_not_set_by_one_value_that_overshoots():
    for values, expected in (
        (np.array([[0.5, 1.002]], np.float32), 128),  # a filter's overshoot
        (np.array([[127.5, 256.0]], np.float32), 128),
        (np.array([[0.5, np.inf]], np.float32), 128),
        (np.array([[0.5, np.nan]], np.float32), 128),
        (np.array([[128, 256]], np.int32), 128),
        (np.array([[2048, 4000]], np.int32), 128),  # 12 bit
    ):
        assert abs(to_rgb(Image.fromarray(values)).getpixel((0, 0))[0] - expected) <= 1, values


def processed(image, **options) -> torch.Tensor:
    return MDEQImageProcessor()(image, return_tensors="pt", **options)["pixel_values"]


@pytest.mark.parametrize("size", ((32, 32), (50, 31)))
def test_arrays_of_every_range_and_layout_equal_the_picture(size):
    array = np.asarray(picture("RGB", size))
    expected = processed(Image.fromarray(array))
    first = torch.tensor(array).permute(2, 0, 1)
    for given in (
        array,
        (array / 255).astype(np.float32),
        array / 255,
        array.astype(np.float32),
        array.astype(np.int64),
        array.astype(np.uint16) * 257,
        array.transpose(2, 0, 1),
        first,
        first / 255,
        [first / 255],
        first[None],
        np.concatenate([array, np.full((*array.shape[:2], 1), 255, np.uint8)], axis=2),
    ):
        assert torch.equal(processed(given), expected)
    half = processed((first / 255).bfloat16())
    assert (half - expected).abs().max() < 0.03  # bfloat16 has eight bits


def test_grey_and_thin_arrays():
    grey = np.asarray(picture("L", (40, 36)))
    expected = processed(Image.fromarray(grey))
    for given in (grey, grey[..., None], grey[None], torch.tensor(grey), [grey], grey / 255):
        assert torch.equal(processed(given), expected)
    thin = np.asarray(picture("RGB", (40, 3)))  # (3, 40, 3): either side may be the channels
    assert torch.equal(processed(thin), processed(Image.fromarray(thin)))
    tensor = torch.tensor(thin).permute(2, 0, 1)  # (3, 3, 40)
    assert torch.equal(processed(tensor), processed(Image.fromarray(thin)))
    other = torch.tensor(np.asarray(picture("RGB", (3, 40)))).permute(2, 0, 1)
    assert torch.equal(processed(other), processed(picture("RGB", (3, 40))))
    assert torch.equal(
        processed(thin.transpose(2, 0, 1), input_data_format="channels_first"), processed(thin)
    )


@pytest.mark.parametrize(
    ("given", "said"),
    (
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros((5, 7, 9), np.uint8), "1, 3 or 4 channels"),
        (np.full((8, 8, 3), np.nan), "NaN"),
        (np.random.default_rng(0).normal(size=(8, 8, 3)), "do_rescale=False"),
        (np.full((8, 8, 3), "a"), "numbers"),
        ([], "no picture"),
    ),
)
def test_arrays_that_are_no_pictures(given, said):
    with pytest.raises(ValueError, match=said) as caught:
        processed(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ((33, 32), (32, 400), (5, 3000), (3001, 7), (777, 130), (64, 300)))
@pytest.mark.parametrize("stem_downsamples", (0, 2))
def test_only_the_centre_is_scaled_and_equals_the_crop_of_the_whole(size, stem_downsamples):
    image = picture("RGB", size)
    kind = MDEQConfig(image_size=32, stem_downsamples=stem_downsamples)
    processor = MDEQImageProcessor.for_config(kind)
    found = processor(image, return_tensors="pt", do_normalize=False)["pixel_values"]
    short = processor.size["shortest_edge"]
    scaled = (short if side == min(size) else short * side // min(size) for side in size)
    whole = image.resize(tuple(scaled), processor.resample)
    left, top = ((side - 32) // 2 for side in whole.size)
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32)), np.float32) / 255
    difference = (found[0].permute(1, 2, 0) - torch.tensor(expected)).abs().max()
    assert difference <= 1.01 / 255  # Pillow's fixed-point weights


def test_a_strip_costs_what_its_centre_costs():
    tracemalloc.start()
    strip = np.zeros((1, 300_000, 3), np.uint8)
    strip[:, 149_990:150_010] = 255
    pixels = processed(strip, do_normalize=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(pixels, torch.ones_like(pixels))
    assert peak < 20e6  # scaled as a whole it is 0.9 GB


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)
    grey = Image.new("LA", (2, 2), (0, 128))
    for mode in ("LA", "La"):  # La: multiplied by its transparency
        assert to_rgb(grey.convert(mode)).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_the_cameras_rotation_is_undone(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is on the right
    image.save(tmp_path / "rotated.png", exif=exif)
    upright = to_rgb(Image.open(tmp_path / "rotated.png"))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 255, 255) and upright.getpixel((10, 35)) == (0, 0, 0)


def test_the_centre_is_kept():
    image = Image.new("RGB", (96, 32), "black")
    image.paste("white", (32, 0, 64, 32))
    pixels = MDEQImageProcessor(do_normalize=False)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.ones_like(pixels))


def test_processor_for_a_config():
    cifar = MDEQImageProcessor.for_config(MDEQConfig.from_preset("mdeq-cifar-large"))
    assert cifar.size["shortest_edge"] == 32 and list(cifar.image_mean) == CIFAR10_MEAN
    imagenet = MDEQImageProcessor.for_config(MDEQConfig.from_preset("mdeq-imagenet-small"))
    assert imagenet.size["shortest_edge"] == 256 and imagenet.image_mean[0] == 0.485
    assert imagenet(picture("RGB", (500, 300)), return_tensors="pt")["pixel_values"].shape == (
        (1, 3, 224, 224)
    )


def test_round_trip_through_auto_classes(tmp_path):
    processor = MDEQImageProcessor(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    )
    processor.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MDEQImageProcessor and loaded.to_dict() == processor.to_dict()
    a, b = (
        p(picture("LA", (70, 40)), return_tensors="pt")["pixel_values"] for p in (processor, loaded)
    )
    assert torch.equal(a, b)


def tiny_model() -> MDEQForImageClassification:
    torch.manual_seed(0)
    config = MDEQConfig(
        channels=[8, 8],
        head_channels=[2, 2],
        final_channels=8,
        expansion=1,
        num_groups=4,
        id2label={0: "cat", 1: "dog", 2: "ship"},
        label2id={"cat": 0, "dog": 1, "ship": 2},
    )
    return MDEQForImageClassification(config).eval()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_pipeline(tmp_path, dtype):
    tiny_model().save_pretrained(tmp_path)
    MDEQImageProcessor().save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), dtype=dtype)
    images = [picture("RGB", (64, 48)), picture("P"), picture("RGBA", (20, 20))]
    alone = [classify(image) for image in images]
    together = classify(images, batch_size=2)
    for a, b in zip(alone, together, strict=True):
        assert {entry["label"] for entry in a} == {"cat", "dog", "ship"}
        assert sum(entry["score"] for entry in a) == pytest.approx(1, abs=1e-2)
        scores = {entry["label"]: entry["score"] for entry in b}
        for entry in a:
            assert scores[entry["label"]] == pytest.approx(entry["score"], abs=1e-2)


def test_pipeline_of_16_bit_pictures(tmp_path):
    """What the documentation tells to give it has the answer of `deqzoo classify`."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    MDEQImageProcessor().save_pretrained(tmp_path)
    grey = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    answer = pipeline("image-classification", model=str(tmp_path))
    rows = answer(to_rgb(Image.open(tmp_path / "grey.png")))
    picture = read_picture(tmp_path / "grey.png")
    (expected,) = classify(model, [picture], processor=MDEQImageProcessor())
    assert [row["label"] for row in rows] == [name for name, _ in expected.labels]
    scores = [score for _, score in expected.labels]
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-5)

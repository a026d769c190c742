"""Variations of training pictures: whole batches on their device, or one picture at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deqzoo.errors import UserError

AREA = (0.08, 1.0)
"""Share of a picture that random resized crops take where a recipe does not say."""
ASPECT = (3 / 4, 4 / 3)
"""Their width / height."""


def check_augmentation(
    options: dict[str, Any],
    valid_keys: tuple[str, ...],
    flips: tuple[str, ...] = ("alternating", "random"),
) -> None:
    """Check the options of `augment` before anything runs.

    Raises:
        UserError: unknown option or value.
    """
    unknown = sorted(set(options) - set(valid_keys))
    if unknown:
        raise UserError(f"unknown augmentation {unknown[0]!r}; valid: {', '.join(valid_keys)}")
    if options.get("flip") not in (None, *flips):
        raise UserError(f"augment.flip must be {' or '.join(flips)}, got {options['flip']!r}")
    for key in {"crop", "cutout"} & set(options):
        if type(options[key]) is not int or options[key] < 0:
            raise UserError(f"augment.{key} must be a number of pixels, got {options[key]!r}")
    share = options.get("cutmix", 0)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise UserError(f"augment.cutmix must be a share of the pictures, got {share!r}")
    for key, limit in (("area", 1.0), ("aspect", math.inf)):
        if key in options and not _is_range(options[key], limit):
            raise UserError(
                f"augment.{key} must be two positive numbers, the smaller first"
                f"{' and none above 1' if limit == 1 else ''}, got {options[key]!r}"
            )


def _is_range(value: Any, limit: float) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    if not all(isinstance(bound, (int, float)) for bound in value):
        return False
    return 0 < value[0] <= value[1] <= limit


def augment(
    pixels: Tensor,
    rows: Tensor,
    epoch: int | Tensor,
    options: dict[str, Any],
    generator: torch.Generator | None,
    side: int | None = None,
) -> Tensor:
    """Augment uint8 pictures (B, 3, H, W) on their device, without reading any value on the host.

    Args:
        pixels: the batch.
        rows: indices of its pictures in the data set, which decide about alternating flips.
        epoch: number of the epoch.
        options: `crop`: pixels of reflected padding around which a crop of the old size is drawn;
            `flip`: "alternating" (every picture is flipped every other epoch, the first time at
            random) or "random"; `cutout`: side of a square that is blanked; `area` and `aspect`: a
            random part of each picture (see `random_boxes`), scaled to `side`.
        generator: source of the draws, on the pictures' device; None for the device's own.
        side: of the results of `area`; that of the pictures if None.
    """
    n, device = len(pixels), pixels.device
    flip = options.get("flip")
    if flip == "alternating":
        # A fixed pseudo-random bit per picture, then every other epoch.
        is_flipped = ((rows * 2654435761 >> 7) + epoch) % 2 == 1
    elif flip == "random":
        is_flipped = torch.rand(n, generator=generator, device=device) < 0.5
    else:
        is_flipped = None
    if is_flipped is not None:
        pixels = torch.where(is_flipped.reshape(n, 1, 1, 1), pixels.flip(3), pixels)
    if "area" in options or "aspect" in options:
        area, aspect = options.get("area", AREA), options.get("aspect", ASPECT)
        height, width = pixels.shape[-2:]
        boxes = random_boxes(n, width, height, area, aspect, generator, device)
        pixels = cropped(pixels, boxes, side or width).round().to(pixels.dtype)
    if pad := options.get("crop"):
        pixels = _random_crop(pixels, pad, generator)
    if square := options.get("cutout"):
        pixels = _cutout(pixels, square, generator)
    return pixels


def _random_crop(pixels: Tensor, pad: int, generator: torch.Generator | None) -> Tensor:
    n, channels, height, width = pixels.shape
    device = pixels.device
    padded_pixels = F.pad(pixels.float(), (pad,) * 4, mode="reflect").to(pixels.dtype)
    tops = torch.randint(2 * pad + 1, (n,), generator=generator, device=device)
    lefts = torch.randint(2 * pad + 1, (n,), generator=generator, device=device)
    rows = (tops[:, None] + torch.arange(height, device=device))[:, None, :, None]
    columns = (lefts[:, None] + torch.arange(width, device=device))[:, None, None, :]
    index = torch.arange(n, device=device)[:, None, None, None]
    return padded_pixels[
        index, torch.arange(channels, device=device)[None, :, None, None], rows, columns
    ]


def random_boxes(
    n: int,
    width: int,
    height: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """`random_box` for n pictures of one size at once: left, top, width and height, (n, 4)."""
    draws = torch.rand(4, n, 10, generator=generator, device=device)
    target = width * height * (area[0] + (area[1] - area[0]) * draws[0])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + (high - low) * draws[1])
    w, h = (target * ratio).sqrt().round(), (target / ratio).sqrt().round()
    left, top = ((width - w + 1) * draws[2]).floor(), ((height - h + 1) * draws[3]).floor()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    boxes = torch.stack((left, top, w, h), dim=-1)
    first_fit = fits.int().argmax(1).reshape(n, 1, 1).expand(n, 1, 4)
    fitting_boxes = boxes.gather(1, first_fit).squeeze(1)
    limits = _central_box(width, height, aspect)
    central_boxes = torch.stack([torch.full((n,), float(x), device=device) for x in limits], dim=1)
    return torch.where(fits.any(1, keepdim=True), fitting_boxes, central_boxes)


def cropped(pixels: Tensor, boxes: Tensor, side: int) -> Tensor:
    """The boxes (B, 4) of pictures (B, C, H, W), scaled to side × side, float32.

    Bilinear with antialiasing, as `F.interpolate` does it for one box, written as two products
    with a matrix of weights for each picture.
    """
    height, width = pixels.shape[-2:]
    left, top, w, h = boxes.unbind(1)
    columns, rows = _resampling(left, w, width, side), _resampling(top, h, height, side)
    across = pixels.float() @ columns.mT.unsqueeze(1)
    return rows.unsqueeze(1) @ across


def _resampling(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Weights (B, side, size) that scale `length` pixels from `start` on to `side`, linearly."""
    device = start.device
    scale = (length / side)[:, None, None]
    target = torch.arange(side, device=device)[None, :, None]
    source = torch.arange(size, device=device)[None, None, :]
    centre = start[:, None, None] + (target + 0.5) * scale - 0.5
    weights = (1 - (source - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    last = (start + length)[:, None, None]
    weights = weights * ((source >= start[:, None, None]) & (source < last))
    return weights / weights.sum(2, keepdim=True)


def _cutout(pixels: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
    n, _, height, width = pixels.shape
    device = pixels.device
    y = torch.randint(height, (n, 1), generator=generator, device=device)
    x = torch.randint(width, (n, 1), generator=generator, device=device)
    rows = (torch.arange(height, device=device) - y).abs() <= side // 2
    columns = (torch.arange(width, device=device) - x).abs() <= side // 2
    return pixels.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 128)


def cutmix(
    pixels: Tensor,
    labels: Tensor,
    n_classes: int,
    share: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Put a box of another picture of the batch into some pictures (Yun et al., ICCV 2019).

    The area of a box is uniform, as with their Beta(1, 1); a label is shared by the visible areas.

    Args:
        pixels: pictures (B, C, H, W) in random order; the other picture is the one before.
        labels: their classes (B,) int64.
        n_classes: number of classes K.
        share: of the pictures that get a box.
        generator: source of the draws, on the pictures' device; None for the device's own.

    Returns:
        The pictures, and probabilities of the classes (B, K) float32.
    """
    n, _, height, width = pixels.shape
    draws = torch.rand(4, n, 1, generator=generator, device=pixels.device)
    side = draws[0].sqrt() * (draws[3] < share)
    inside = []
    for length, draw in ((height, draws[1]), (width, draws[2])):
        centre, reach = draw * length, side * length / 2
        place = torch.arange(length, device=pixels.device) + 0.5
        inside.append((place - centre).abs() < reach)
    box = inside[0][:, :, None] & inside[1][:, None, :]
    pixels = torch.where(box.unsqueeze(1), pixels.roll(1, 0), pixels)
    other_share = box.float().mean((1, 2)).unsqueeze(1)
    classes = F.one_hot(labels, n_classes).float()
    return pixels, classes.lerp(classes.roll(1, 0), other_share)


def random_box(
    width: int,
    height: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """A random part of a picture, in pixels: left, top, width and height.

    Args:
        width: of the picture.
        height: of the picture.
        area: smallest and largest share of the picture's area.
        aspect: smallest and largest width / height; drawn uniformly in the logarithm.
        generator: source of the draws.

    Returns:
        The largest central box of an allowed shape if none of ten draws fits.
    """
    for _ in range(10):
        target = width * height * generator.uniform(*area)
        ratio = math.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(width - w + 1))
            return left, int(generator.integers(height - h + 1)), w, h
    return _central_box(width, height, aspect)


def _central_box(width: int, height: int, aspect: tuple[float, float]) -> tuple[int, int, int, int]:
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def random_resized_crop(
    picture: Image.Image,
    side: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: bool,
    generator: np.random.Generator,
) -> Tensor:
    """A random part of a picture, scaled to a square: uint8 (3, side, side).

    Args:
        picture: RGB.
        side: of the result, in pixels.
        area: smallest and largest share of the picture's area.
        aspect: smallest and largest width / height; drawn uniformly in the logarithm.
        flip: mirror every other picture.
        generator: source of the draws.
    """
    left, top, width, height = random_box(*picture.size, area, aspect, generator)
    part = picture.resize(
        (side, side), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
    if flip and generator.random() < 0.5:
        pixels = pixels.flip(2)
    return pixels.contiguous()


def resize(pixels: Tensor, side: int | None) -> Tensor:
    """Scale pictures (B, C, H, W) down to side × side: by area averaging where side divides H."""
    size = pixels.shape[-1]
    if side is None or side == size:
        return pixels
    if size % side == 0:
        return F.interpolate(pixels, size=(side, side), mode="area")
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)

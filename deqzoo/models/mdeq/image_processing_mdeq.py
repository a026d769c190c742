"""Pictures of any size and mode -> the normalised batch an MDEQ expects; needs no torchvision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, SizeDict

from deqzoo.errors import UserError
from deqzoo.zoo import bundled_source

from .configuration_mdeq import MDEQConfig

CIFAR10_MEAN = [0.4914, 0.4822, 0.4465]
CIFAR10_STD = [0.2023, 0.1994, 0.2010]
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class MDEQImageProcessor(PilBackend):
    """Scales the shorter side, crops the centre, and normalises; by default as for CIFAR-10.

    Pictures may be PIL images of any mode (the camera's rotation is undone, transparency is laid
    on white, 16 bit grey is scaled to 8 bit), or arrays and tensors, (H, W) or with one, three or
    four channels, whose values go from 0 to 1 where they are floating-point numbers up to 1, else
    to 255 or the next power of two. A pipeline of transformers makes pictures RGB before they come
    here; give it `to_rgb(picture)` for 16 bit or transparent ones.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = CIFAR10_MEAN
    image_std = CIFAR10_STD
    size = {"shortest_edge": 32}
    default_to_square = False
    crop_size = {"height": 32, "width": 32}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; the zoo's names are known too."""
        source = bundled_source(pretrained_model_name_or_path, kwargs.get("revision"))
        return super().from_pretrained(source, *args, **kwargs)

    @classmethod
    def for_config(cls, config: MDEQConfig) -> MDEQImageProcessor:
        """The processor of a model: ImageNet's if its stem halves pictures, else CIFAR's.

        ImageNet's evaluation scales the shorter side to 256 and crops 224, or in proportion.
        """
        side = config.image_size
        crop = {"height": side, "width": side}
        if config.stem_downsamples == 0:
            return cls(size={"shortest_edge": side}, crop_size=crop)
        return cls(
            size={"shortest_edge": round(side * 256 / 224)},
            crop_size=crop,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            resample=PILImageResampling.BILINEAR,
        )

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> ImageInput:
        """Flat list of pictures; grey arrays (H, W) get the axis that the library asks for."""
        if isinstance(images, (list, tuple)):
            images = [_with_channels(image) for image in images]
        else:
            images = _with_channels(images)
        if isinstance(images, list) and not images:
            raise UserError("there is no picture to process")
        return super()._prepare_images_structure(images, expected_ndims=expected_ndims)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One picture as an array (3, H, W); its values are checked where it is rescaled.

        Where either side of an array could be its channels, a tensor is read as (C, H, W) and an
        array as (H, W, C), as torch and Pillow write them; `input_data_format` says otherwise.

        Raises:
            UserError: an array or tensor that is no picture.
        """
        if not do_convert_rgb:
            return super().process_image(
                image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **kwargs
            )
        if isinstance(image, Image.Image):
            return np.asarray(to_rgb(image)).transpose(2, 0, 1)
        return _three_channels(image, input_data_format)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_rescale:
            images = [_array_to_8_bit(image) for image in images]
        if do_resize and do_center_crop and size.shortest_edge and not size.longest_edge:
            images = [
                _resized_centre(image, size.shortest_edge, crop_size, int(resample))
                if image.dtype == np.uint8
                else self.resize(image=image, size=size, resample=resample)
                for image in images
            ]
            do_resize = False
        return super()._preprocess(
            images,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            **kwargs,
        )


def _resized_centre(
    image: np.ndarray, shortest_edge: int, crop_size: SizeDict, resample: int
) -> np.ndarray:
    """The part of a scaled picture that the centre crop keeps, and no more of its longer side.

    A picture that is a thousand times longer than high would be scaled to a million pixels for a
    few. What is kept equals the crop of the whole: the filter sees all pixels that it reaches.

    Args:
        image: uint8 (3, H, W).
        shortest_edge: of the scaled picture.
        crop_size: with height and width.
        resample: one of Pillow's filters, none of which reaches further than three pixels.
    """
    height, width = image.shape[1:]
    short, long = sorted((height, width))
    sides = (shortest_edge, int(shortest_edge * long / short))
    new_height, new_width = sides if height <= width else sides[::-1]
    source, box, crop_slices, size = [], [], [], []
    for old, new, crop_side in (
        (height, new_height, int(crop_size.height or 0)),
        (width, new_width, int(crop_size.width or 0)),
    ):
        ratio = old / new
        first = max(0, (new - crop_side) // 2)  # as center_crop counts
        last = min(new, first + crop_side)
        margin = math.ceil(4 * max(1.0, 1 / ratio))
        begin, end = max(0, first - margin), min(new, last + margin)
        if crop_side > new:  # center_crop pads
            begin, end, first, last = 0, new, 0, new
        low, high = math.floor(begin * ratio), min(math.ceil(end * ratio), old)
        source.append(slice(low, high))
        box.append((begin * ratio - low, min(end * ratio, old) - low))
        crop_slices.append(slice(first - begin, last - begin))
        size.append(end - begin)
    part = image[:, source[0], source[1]].transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(part))
    (top, bottom), (left, right) = box
    scaled_picture = picture.resize((size[1], size[0]), resample, box=(left, top, right, bottom))
    return np.asarray(scaled_picture).transpose(2, 0, 1)[:, crop_slices[0], crop_slices[1]]


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8 bit RGB picture from one of any mode.

    Pillow's own conversion clips grey values of 16 bit at 255, and turns transparent pixels into
    whatever colour they hide.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "La":  # Pillow converts it to this mode only
        image = image.convert("LA")
    if image.mode == "F" or image.mode.startswith("I"):
        white = 65535.0 if image.mode.startswith("I;16") else None
        image = Image.fromarray(_to_8_bit(np.asarray(image), white))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _with_channels(image: Any) -> Any:
    """A grey array (H, W) as (H, W, 1), a grey tensor as (1, H, W); anything else as it is."""
    if isinstance(image, np.ndarray) and image.ndim == 2:
        return image[..., None]
    return image[None] if isinstance(image, torch.Tensor) and image.ndim == 2 else image


def _three_channels(image: Any, layout: str | ChannelDimension | None) -> np.ndarray:
    """An array or tensor with one, three or four channels, or none, as (3, H, W)."""
    preferred_axis = ChannelDimension.LAST
    if isinstance(image, torch.Tensor):
        preferred_axis = ChannelDimension.FIRST
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    image = np.asarray(image)
    if image.dtype.kind not in "buif":
        raise UserError(f"a picture must hold numbers, got an array of dtype {image.dtype}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise UserError(
            f"a picture has height, width and 1, 3 or 4 channels, got an array of shape "
            f"{image.shape}"
        )
    if image.ndim == 2:
        return np.repeat(image[None], 3, axis=0)
    places = {ChannelDimension.FIRST: image.shape[0], ChannelDimension.LAST: image.shape[-1]}
    candidates = [place for place, count in places.items() if count in (1, 3, 4)]
    channel_axis = preferred_axis if preferred_axis in candidates else next(iter(candidates), None)
    if layout is not None:
        channel_axis = ChannelDimension(layout) if ChannelDimension(layout) in candidates else None
    if channel_axis is None:
        raise UserError(
            f"a picture has 1, 3 or 4 channels, first or last, got an array of shape {image.shape}"
        )
    if channel_axis == ChannelDimension.LAST:
        image = image.transpose(2, 0, 1)
    if len(image) == 1:
        return np.repeat(image, 3, axis=0)
    if len(image) == 4:  # on white, as transparent pictures of Pillow
        image = _array_to_8_bit(image)
        return np.asarray(to_rgb(Image.fromarray(image.transpose(1, 2, 0)))).transpose(2, 0, 1)
    return image


def _array_to_8_bit(image: np.ndarray) -> np.ndarray:
    """The values of an array as uint8.

    Raises:
        UserError: they are not finite, or negative as those of a normalised picture.
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * 255
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise UserError("the picture holds NaN or infinite values")
    white = 65535.0 if image.dtype == np.uint16 else _white(image)
    if image.min() < -_TOLERANCE * min(white, max(1.0, image.max())):
        raise UserError(
            f"the picture holds values from {image.min():.3g} to {image.max():.3g}, so it was "
            "normalised already: pass values from 0 to 1 or 0 to 255, or do_resize=False, "
            "do_rescale=False and do_normalize=False"
        )
    return _to_8_bit(image, white)


_TOLERANCE = 1 / 16
"""Share by which a sharpening filter may overshoot white and black."""


def _white(values: np.ndarray) -> float:
    """The value of white, guessed from an array's values: 1, 255, or a power of two minus 1.

    The smallest of them that the largest finite value does not exceed by more than a filter's
    overshoot; 1 among floating-point values only.
    """
    finite = values[np.isfinite(values)]
    top = float(finite.max(initial=0.0))
    usual = (1.0, 255.0) if values.dtype.kind == "f" else (255.0,)
    for white in usual:
        if top <= white * (1 + _TOLERANCE):
            return white
    return 2.0 ** math.ceil(math.log2(top + 1)) - 1


def _to_8_bit(values: np.ndarray, white: float | None = None) -> np.ndarray:
    """Values as uint8, white being 255; what is not finite becomes white or black."""
    white = _white(values) if white is None else white
    wide = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=white, neginf=0.0)
    return np.clip(np.round(wide * (255 / white)), 0, 255).astype(np.uint8)


__all__ = ["MDEQImageProcessor"]

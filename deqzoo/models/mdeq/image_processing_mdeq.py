"""Pictures of any size and mode -> the normalised batch an MDEQ expects; needs no torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling

from .configuration_mdeq import MDEQConfig

CIFAR10_MEAN = [0.4914, 0.4822, 0.4465]
CIFAR10_STD = [0.2023, 0.1994, 0.2010]
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class MDEQImageProcessor(PilBackend):
    """Scales the shorter side, crops the centre, and normalises; by default as for CIFAR-10.

    Pictures may be PIL images of any mode (the camera's rotation is undone, transparency is laid
    on white, 16 bit grey is scaled to 8 bit), or arrays and tensors with one or three channels.
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

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One picture as a uint8 or float array (3, H, W)."""
        if isinstance(image, Image.Image) and do_convert_rgb:
            image = to_rgb(image)
        return super().process_image(
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **kwargs
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8 bit RGB picture from one of any mode.

    Pillow's own conversion clips grey values of 16 bit at 255, and turns transparent pixels into
    whatever colour they hide.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "La":  # Pillow converts it to this mode only
        image = image.convert("LA")
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_to_8_bit(np.asarray(image), image.mode))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of Pillow's modes I;16, I and F as uint8.

    Only I;16 says what white is; for the others it is the smallest usual value (1 for F, 255,
    65535) that the picture does not exceed.
    """
    values = np.nan_to_num(values.astype(np.float64))
    top = values.max(initial=0.0)
    if mode.startswith("I;16"):
        white = 65535.0
    elif mode == "F" and top <= 1:
        white = 1.0
    else:
        white = next((usual for usual in (255.0, 65535.0) if top <= usual), top)
    return np.clip(np.round(values * (255 / white)), 0, 255).astype(np.uint8)


__all__ = ["MDEQImageProcessor"]

"""Image classification: the data set stays in memory, whole batches are augmented at once."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from deqzoo.data.cifar import CIFAR10, load_cifar10
from deqzoo.data.imagenette import IMAGENETTE, load_imagenette
from deqzoo.data.images import SPLIT_SEED, ImageSource, Pictures, divide
from deqzoo.data.own import divide_own, load_own_pictures, write_record
from deqzoo.data.tiny_imagenet import TINY_IMAGENET, load_tiny_imagenet
from deqzoo.errors import UserError
from deqzoo.models.mdeq.image_processing_mdeq import MDEQImageProcessor
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification
from deqzoo.models.names import family_class
from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.base import (
    Plan,
    Probe,
    build_config,
    check_options,
    epoch_order,
    mixed_seed,
    own_path,
)
from deqzoo.tasks.metrics import accuracy, joined_summary, negative_log_likelihood

AREA = (0.08, 1.0)
"""Share of a picture that random resized crops take where a recipe does not say."""
ASPECT = (3 / 4, 4 / 3)
"""Their width / height."""
LOADERS = {
    "cifar10": load_cifar10,
    "imagenette": load_imagenette,
    "tiny-imagenet": load_tiny_imagenet,
}
OWN = "imagefolder"
"""Name of pictures of one's own in a recipe."""
PATCHES = 2000 * 32 * 32
"""About how many patches the whitening filters are computed from."""
SOURCES = {source.name: source for source in (CIFAR10, IMAGENETTE, TINY_IMAGENET)}


class ImageClassificationTask:
    """CIFAR-10, Imagenette and Tiny ImageNet with MDEQ."""

    metric = "accuracy"
    training: Any
    validation: Any
    validation_chunk = 250

    def __init__(
        self, recipe: Recipe, data: str | os.PathLike[str] | None, stand_in: bool = False
    ) -> None:
        self.recipe = recipe
        self._check_augmentation(recipe.augment)
        self.record: dict[str, Any] | None = None
        self.training, self.validation = self._load(data, stand_in)
        self._check_sizes()
        self.config = self._config()
        processor: Any = family_class(recipe.model.family, "ImageProcessor") or MDEQImageProcessor
        self.processor = processor.for_config(self.config)
        self.mean = torch.tensor(self.processor.image_mean).reshape(1, 3, 1, 1)
        self.std = torch.tensor(self.processor.image_std).reshape(1, 3, 1, 1)
        self._order: tuple[int, Tensor] | None = None

    def _check_augmentation(self, options: dict[str, Any]) -> None:
        check_augmentation(options, ("area", "aspect", "crop", "flip", "cutout"))

    def _load(self, data: str | os.PathLike[str] | None, stand_in: bool) -> tuple[Any, Any]:
        """Training and validation part."""
        name, options = self.recipe.data.name, self.recipe.data.options
        if name == OWN:
            return self._load_own(data)
        if name not in LOADERS:
            raise UserError(f"unknown image data set {name!r}; choose {', '.join((*LOADERS, OWN))}")
        check_options(LOADERS[name], options)
        if stand_in:
            return stand_in_pictures(SOURCES[name], options.get("size"))
        whole = LOADERS[name]("train+validation", data, **options)
        return divide(whole, SOURCES[name], options.get("seed", SPLIT_SEED))

    def _load_own(self, data: str | os.PathLike[str] | None) -> tuple[Pictures, Pictures]:
        """Pictures of one's own; the validation part is a stored split, or a fifth of each class.

        Raises:
            UserError: nobody says where they are, or they cannot be learnt.
        """
        path = own_path(self.recipe, data)
        check_options(_own_options, self.recipe.data.options)
        options = {"size": 64, "seed": 0, **self.recipe.data.options}
        training, held_out = divide_own(load_own_pictures(path), seed=options["seed"])
        if len(training) < self.recipe.batch_size * self.recipe.accumulate:
            raise UserError(
                f"a step takes {self.recipe.batch_size * self.recipe.accumulate} pictures, but "
                f"{path} has {len(training)} to train on: use a smaller batch_size"
            )
        self.record = {"kind": "pictures", "name": training.name, "train": training.digests()}
        if self.recipe.evaluation.keep == "best":
            self.record |= {"one_hold_out": True, "validation": held_out.digests()}
        return training.in_memory(options["size"]), held_out.in_memory(options["size"])

    def _check_sizes(self) -> None:
        """Refuse crops and squares that are larger than the pictures."""
        side = min(self.training.pixels.shape[-2:])
        for key, most in (("crop", side - 1), ("cutout", side)):
            value = self.recipe.augment.get(key, 0)
            if value > most:
                raise UserError(
                    f"augment.{key} must be at most {most} for pictures of {side} pixels, got "
                    f"{value}"
                )

    def _config(self) -> PreTrainedConfig:
        names = self.training.classes
        return build_config(
            family_class(self.recipe.model.family, "Config"),
            self.recipe.model,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )

    def model(self) -> PreTrainedModel:
        kind = family_class(self.recipe.model.family, "ForImageClassification")
        model = kind(self.config)
        if self.recipe.whiten:
            whiten_stem(model, self._normalised(self._first_pictures()))
        return model

    def _first_pictures(self) -> Tensor:
        """Some training pictures (N, 3, H, W) uint8, to initialise from."""
        return self.training.pixels[:2000]

    def steps_per_epoch(self, stage: Stage) -> int:
        return len(self.training) // (self.recipe.batch_size * self.recipe.accumulate)

    def batch(self, plan: Plan, micro_step: int, rank: int, world: int) -> dict[str, Any]:
        """Pictures (b, 3, S, S) float32 and labels (b,), b = batch_size / world."""
        rows, epoch = self._rows(plan, micro_step, rank, world)
        stage = plan.stage(micro_step // plan.accumulate)
        generator = torch.Generator().manual_seed(mixed_seed(self.recipe.seed, micro_step, rank))
        pixels = self.training.pixels[rows]
        side = stage.resolution or self.config.image_size
        pixels = augment(pixels, rows, epoch, self.recipe.augment, generator, side)
        return {
            "pixel_values": resize(self._normalised(pixels), stage.resolution),
            "labels": self.training.labels[rows],
        }

    def _rows(self, plan: Plan, micro_step: int, rank: int, world: int) -> tuple[Tensor, int]:
        """Which pictures (b,) a process gets, and the number of the epoch."""
        step, part = divmod(micro_step, plan.accumulate)
        epoch, position = plan.position(step)
        size = self.recipe.batch_size
        share = size // world
        first = (position * plan.accumulate + part) * size + rank * share
        return self._epoch_order(epoch)[first : first + share], epoch

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.recipe.seed, epoch, len(self.training)))
        return self._order[1]

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def resident(self, device: torch.device) -> ResidentPictures:
        """The training pictures on a device; see `Resident`."""
        return ResidentPictures(self, device)

    def loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(
            outputs.logits.float(), batch["labels"], label_smoothing=self.recipe.label_smoothing
        )

    def before_forward(self, model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def after_forward(self, outputs: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def sample_size(self, stage: Stage) -> int:
        """One: pictures are counted."""
        return 1

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, stage: Stage, samples: int) -> dict[str, float]:
        """Accuracy and solver report with the config's own solver, at the stage's resolution."""
        n = min(samples, len(self.validation))
        logits, reports = [], []
        for start in range(0, n, self.validation_chunk):
            end = min(start + self.validation_chunk, n)
            pixels, _ = self._validation_batch(start, end, stage.resolution)
            out = model(pixel_values=pixels.to(model.device), shallow=stage.shallow)
            logits.append(out.logits.float().cpu())
            reports.append([t.cpu() for t in (out.n_steps, out.residual, out.converged)])
        scores, labels = torch.cat(logits), self.validation.labels[:n]
        return {
            "accuracy": accuracy(scores, labels),
            "negative_log_likelihood": negative_log_likelihood(scores, labels),
            **joined_summary(reports),
        }

    def _validation_batch(self, start: int, end: int, side: int | None) -> tuple[Tensor, Tensor]:
        """Normalised pictures (b, 3, S, S) and labels (b,) of a range of the validation part."""
        pixels = self._normalised(self.validation.pixels[start:end])
        # The part that the image processor keeps.
        share = self.config.image_size / self.processor.size["shortest_edge"]
        kept = round(share * pixels.shape[-1])
        first = (pixels.shape[-1] - kept) // 2
        pixels = pixels[..., first : first + kept, first : first + kept]
        return resize(pixels, side), self.validation.labels[start:end]

    def probe(self, model: PreTrainedModel, stage: Stage, n: int = 1) -> Probe:
        side = stage.resolution or self.config.image_size
        pixels = torch.zeros(n, 3, side, side, device=model.device)
        family: Any = model
        f, state = family.equilibrium_map(pixels)
        return Probe(f, state, partial(model, pixels))

    def describe(self) -> dict[str, Any]:
        return {"train": self.training.describe(), "validation": self.validation.describe()}

    def save_processor(self, folder: str) -> None:
        self.processor.save_pretrained(folder)
        if self.record is not None:
            write_record(Path(folder), self.record)


class ResidentPictures:
    """Training pictures that live on the device, augmented there; implements `Resident`."""

    def __init__(self, task: ImageClassificationTask, device: torch.device) -> None:
        self.task = task
        self.pixels = task.training.pixels.to(device)
        self.labels = task.training.labels.to(device)
        self.mean, self.std = task.mean.to(device), task.std.to(device)

    def epoch(self, number: int, stage: Stage) -> Tensor:
        """Which pictures each step of an epoch takes, (steps, batch) int64."""
        size = self.task.recipe.batch_size * self.task.recipe.accumulate
        order = self.task._epoch_order(number)
        order = order[: len(order) // size * size].reshape(-1, size)
        return order.to(self.labels.device, non_blocking=True)

    def inputs(self, rows: Tensor, epoch: Tensor, stage: Stage) -> dict[str, Any]:
        """Pictures (B, 3, S, S) float32, channels last, and labels (B,)."""
        side = stage.resolution or self.task.config.image_size
        options = self.task.recipe.augment
        pixels = augment(self.pixels[rows], rows, epoch, options, None, side)
        pixels = resize((pixels.float() / 255 - self.mean) / self.std, stage.resolution)
        return {
            "pixel_values": pixels.contiguous(memory_format=torch.channels_last),
            "labels": self.labels[rows],
        }

    def keep(self, outputs: Any) -> None:
        """Steps leave nothing behind."""

    def tensors(self) -> list[Tensor]:
        """What steps leave behind: nothing."""
        return []


def _own_options(path: str, *, size: int = 64, seed: int = 0) -> None:
    """Options of pictures of one's own: the side at which they are kept, the hold-out's seed."""


def stand_in_pictures(source: ImageSource, side: int | None = None) -> tuple[Pictures, Pictures]:
    """Blank pictures in the numbers of a data set's training and validation part."""
    n_validation = source.validation_per_class * len(source.classes)
    side = source.side or side or 64

    def blank(n: int, split: str) -> Pictures:
        pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8).expand(n, -1, -1, -1)
        labels = torch.arange(n) % len(source.classes)
        return Pictures(pixels, labels, source.classes, split, "", False, f"stand-in-{source.name}")

    return (
        blank(source.rows["train"] - n_validation, "train"),
        blank(n_validation, "validation"),
    )


def resize(pixels: Tensor, side: int | None) -> Tensor:
    """Scale pictures (B, C, H, W) down to side × side: by area averaging where side divides H."""
    size = pixels.shape[-1]
    if side is None or side == size:
        return pixels
    if size % side == 0:
        return F.interpolate(pixels, size=(side, side), mode="area")
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)


def check_augmentation(
    options: dict[str, Any],
    known: tuple[str, ...],
    flips: tuple[str, ...] = ("alternating", "random"),
) -> None:
    """Check the options of `augment` before anything runs.

    Raises:
        UserError: unknown option or value.
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"unknown augmentation {unknown[0]!r}; valid: {', '.join(known)}")
    if options.get("flip") not in (None, *flips):
        raise UserError(f"augment.flip must be {' or '.join(flips)}, got {options['flip']!r}")
    for key in {"crop", "cutout"} & set(options):
        if type(options[key]) is not int or options[key] < 0:
            raise UserError(f"augment.{key} must be a number of pixels, got {options[key]!r}")
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
    """Augment uint8 pictures (B, 3, H, W) where they are, without a look at any value.

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
        chosen = ((rows * 2654435761 >> 7) + epoch) % 2 == 1
    elif flip == "random":
        chosen = torch.rand(n, generator=generator, device=device) < 0.5
    else:
        chosen = None
    if chosen is not None:
        pixels = torch.where(chosen.reshape(n, 1, 1, 1), pixels.flip(3), pixels)
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
    padded = F.pad(pixels.float(), (pad,) * 4, mode="reflect").to(pixels.dtype)
    tops = torch.randint(2 * pad + 1, (n,), generator=generator, device=device)
    lefts = torch.randint(2 * pad + 1, (n,), generator=generator, device=device)
    rows = (tops[:, None] + torch.arange(height, device=device))[:, None, :, None]
    columns = (lefts[:, None] + torch.arange(width, device=device))[:, None, None, :]
    index = torch.arange(n, device=device)[:, None, None, None]
    return padded[index, torch.arange(channels, device=device)[None, :, None, None], rows, columns]


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
    first = fits.int().argmax(1).reshape(n, 1, 1).expand(n, 1, 4)
    chosen = boxes.gather(1, first).squeeze(1)
    limits = _central_box(width, height, aspect)
    central = torch.stack([torch.full((n,), float(x), device=device) for x in limits], dim=1)
    return torch.where(fits.any(1, keepdim=True), chosen, central)


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


def _cutout(pixels: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
    n, _, height, width = pixels.shape
    device = pixels.device
    y = torch.randint(height, (n, 1), generator=generator, device=device)
    x = torch.randint(width, (n, 1), generator=generator, device=device)
    rows = (torch.arange(height, device=device) - y).abs() <= side // 2
    columns = (torch.arange(width, device=device) - x).abs() <= side // 2
    return pixels.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 128)


@torch.no_grad()
def whiten_stem(model: MDEQForImageClassification, pixels: Tensor) -> None:
    """Initialise the first convolution with whitening filters of 3 × 3 patches.

    Filters are ± the eigenvectors of the patch covariance over the square root of their
    eigenvalues, as many as the convolution has channels (Page 2019; Jordan 2024).

    Args:
        model: a model with a 3 × 3 first convolution.
        pixels: normalised pictures (N, 3, H, W).
    """
    weight: Any = model.mdeq.stem.convolutions[0].weight
    size = weight.shape[-1]
    n = max(1, PATCHES // (pixels.shape[-1] * pixels.shape[-2]))
    patches = F.unfold(pixels[:n], size).transpose(1, 2).reshape(-1, 3 * size * size)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    filters = (vectors / (values + 1e-2).sqrt()).T.flip(0)
    filters = torch.cat((filters, -filters))
    filters = filters.repeat(math.ceil(len(weight) / len(filters)), 1)[: len(weight)]
    weight.copy_(filters.reshape(weight.shape) / filters.norm(dim=1).mean())

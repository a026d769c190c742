"""Image classification: the data set stays in memory, whole batches are augmented at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from deqzoo.data.image_sets import (
    CIFAR10,
    IMAGENETTE,
    TINY_IMAGENET,
    load_cifar10,
    load_imagenette,
    load_tiny_imagenet,
)
from deqzoo.data.images import SPLIT_SEED, ImageSource, Pictures, divide
from deqzoo.data.own import write_record
from deqzoo.data.own_pictures import (
    contradictions,
    divide_in_three,
    divide_own,
    load_own_pictures,
    unlearnt,
)
from deqzoo.errors import UserError
from deqzoo.files import warn_once
from deqzoo.models.mdeq.image_processing_mdeq import MDEQImageProcessor
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification
from deqzoo.models.names import family_class
from deqzoo.models.readers import load_processor, to_batch
from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.augmentation import augment, check_augmentation, cutmix, resize
from deqzoo.tasks.base import (
    Plan,
    Probe,
    Task,
    build_config,
    check_options,
    class_names,
    epoch_order,
    mixed_seed,
    own_path,
)
from deqzoo.tasks.finetuning import Job, Settings
from deqzoo.tasks.metrics import accuracy, joined_summary, negative_log_likelihood

LOADERS: dict[str, Callable[..., Pictures]] = {
    "cifar10": load_cifar10,
    "imagenette": load_imagenette,
    "tiny-imagenet": load_tiny_imagenet,
}
OWN = "imagefolder"
"""Name of pictures of one's own in a recipe."""
LARGEST_SIDE = 4096
"""Pixels of a side that pictures are trained at."""
SHARED = "shared_labels"
"""What a batch calls the classes' shares (B, K) of pictures that are mixed with others."""
PATCHES = 2000 * 32 * 32
"""About how many patches the whitening filters are computed from."""
SOURCES = {source.name: source for source in (CIFAR10, IMAGENETTE, TINY_IMAGENET)}


def check_side(side: Any, place: str) -> None:
    """Refuse pictures whose states would not fit into memory.

    Raises:
        UserError: a side above `LARGEST_SIDE`; the message names the place.
    """
    if isinstance(side, int) and side > LARGEST_SIDE:
        raise UserError(f"{place} must be at most {LARGEST_SIDE} pixels, got {side}")


class ImageClassificationTask(Task):
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
        for number, stage in enumerate(recipe.stages):
            check_side(stage.resolution, f"stages[{number}].resolution")
        check_side(recipe.data.options.get("size"), "data.options.size")
        self.record: dict[str, Any] | None = None
        self.training, self.validation = self._load(data, stand_in)
        self._check_sizes()
        self.config = self._config()
        check_side(self.config.image_size, "model.overrides.image_size")
        processor: Any = family_class(recipe.model.family, "ImageProcessor") or MDEQImageProcessor
        self.processor = processor.for_config(self.config)
        self.mean = torch.tensor(self.processor.image_mean).reshape(1, 3, 1, 1)
        self.std = torch.tensor(self.processor.image_std).reshape(1, 3, 1, 1)
        self._order: tuple[int, Tensor] | None = None

    def _check_augmentation(self, options: dict[str, Any]) -> None:
        check_augmentation(options, ("area", "aspect", "crop", "flip", "cutout", "cutmix"))

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
        pictures = LOADERS[name]("train+validation", data, **options)
        return divide(pictures, SOURCES[name], options.get("seed", SPLIT_SEED))

    def _load_own(self, data: str | os.PathLike[str] | None) -> tuple[Pictures, Pictures]:
        """Pictures of one's own; the validation part is a stored split, or a fifth of each class.

        Raises:
            UserError: nobody says where they are, or they cannot be learnt.
        """
        path = own_path(self.recipe, data)
        check_options(_own_options, self.recipe.data.options)
        options = {"size": 64, "seed": 0, **self.recipe.data.options}
        pictures = load_own_pictures(path)
        training, held_out = divide_own(pictures, seed=options["seed"])
        # In the order of their classes the first samples of a validation would be of one class.
        digests = held_out.digests()
        held_out = held_out.part(
            sorted(range(len(held_out)), key=digests.__getitem__), held_out.split
        )
        for line in (*contradictions(pictures), *unlearnt(pictures)):
            warn_once(line)
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
        kind = family_class(self.recipe.model.family, "Config")
        return build_config(kind, self.recipe.model, **class_names(self.training.classes))

    def model(self) -> PreTrainedModel:
        kind = family_class(self.recipe.model.family, "ForImageClassification")
        model = kind(self.config)
        if self.recipe.whiten:
            whiten_stem(model, self._normalise(self._first_pictures()))
        return model

    def _first_pictures(self) -> Tensor:
        """Some training pictures (N, 3, H, W) uint8, to initialise from."""
        return self.training.pixels[:2000]

    def steps_per_epoch(self, stage: Stage) -> int:
        return len(self.training) // (self.recipe.batch_size * self.recipe.accumulate)

    def batch(self, plan: Plan, micro_step: int, rank: int, world: int) -> dict[str, Any]:
        """Pictures (b, 3, S, S) float32 and labels (b,), b = batch_size / world; with `cutmix`
        the classes' shares (b, K) too."""
        rows, epoch = self._rows(plan, micro_step, rank, world)
        stage = plan.stage(micro_step // plan.accumulate)
        generator = torch.Generator().manual_seed(mixed_seed(self.recipe.seed, micro_step, rank))
        pixels = self.training.pixels[rows]
        side = self.side(stage)
        pixels = augment(pixels, rows, epoch, self.recipe.augment, generator, side)
        pixels, labels = self._mix(pixels, self.training.labels[rows], generator)
        return {"pixel_values": resize(self._normalise(pixels), side), **labels}

    def side(self, stage: Stage) -> int:
        """Pixels of a side in a stage: without a resolution of its own that of the model, at which
        pictures are named later."""
        return stage.resolution or self.config.image_size

    def _mix(
        self, pixels: Tensor, labels: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures (B, 3, H, W) and their labels, with `cutmix` shared ones beside them."""
        targets = {"labels": labels}
        if share := self.recipe.augment.get("cutmix"):
            n_classes = len(self.training.classes)
            pixels, targets[SHARED] = cutmix(pixels, labels, n_classes, share, generator)
        return pixels, targets

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

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def resident(self, device: torch.device) -> ResidentPictures:
        """The training pictures on a device; see `Resident`."""
        return ResidentPictures(self, device)

    def loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(
            outputs.logits.float(),
            batch.get(SHARED, batch["labels"]),
            label_smoothing=self.recipe.label_smoothing,
        )

    def forward_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in batch.items() if key != SHARED}

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, stage: Stage, samples: int) -> dict[str, float]:
        """Accuracy and solver report with the config's own solver, at the stage's resolution."""
        n = min(samples, len(self.validation))
        logits, reports = [], []
        for start in range(0, n, self.validation_chunk):
            end = min(start + self.validation_chunk, n)
            pixels, _ = self._validation_batch(start, end, self.side(stage))
            out = model(pixel_values=pixels.to(model.device), shallow=stage.shallow)
            logits.append(out.logits.float().cpu())
            reports.append([t.cpu() for t in (out.n_steps, out.residual, out.converged)])
        scores, labels = torch.cat(logits), self.validation.labels[:n]
        return {
            "accuracy": accuracy(scores, labels),
            "negative_log_likelihood": negative_log_likelihood(scores, labels),
            **joined_summary(reports),
        }

    def _validation_batch(self, start: int, end: int, side: int) -> tuple[Tensor, Tensor]:
        """Normalised pictures (b, 3, S, S) and labels (b,) of a range of the validation part."""
        pixels = self._normalise(self.validation.pixels[start:end])
        # The part that the image processor keeps.
        share = self.config.image_size / self.processor.size["shortest_edge"]
        crop_side = round(share * pixels.shape[-1])
        first = (pixels.shape[-1] - crop_side) // 2
        pixels = pixels[..., first : first + crop_side, first : first + crop_side]
        return resize(pixels, side), self.validation.labels[start:end]

    def probe(self, model: PreTrainedModel, stage: Stage, n: int = 1) -> Probe:
        side = self.side(stage)
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
        """Pictures (B, 3, S, S) float32, channels last, and labels (B,), with `cutmix` shared ones
        (B, K) too."""
        side = self.task.side(stage)
        options = self.task.recipe.augment
        pixels = augment(self.pixels[rows], rows, epoch, options, None, side)
        pixels, labels = self.task._mix(pixels, self.labels[rows], None)
        pixels = resize((pixels.float() / 255 - self.mean) / self.std, side)
        return {
            "pixel_values": pixels.contiguous(memory_format=torch.channels_last),
            **labels,
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


class _VariedPictures(Dataset[dict[str, Any]]):
    """Pictures in memory (N, 3, H, W) uint8, varied anew in every epoch.

    How depends on seed, epoch and row alone, so that a resumed run sees the same.
    """

    def __init__(self, pictures: Any, processor: Any, vary: bool, seed: int) -> None:
        self.seed, self.epoch = seed, 0
        self.pixels, self.labels = pictures.pixels, pictures.labels
        self.side = processor.crop_size["height"]
        self.mean = torch.tensor(processor.image_mean).reshape(3, 1, 1)
        self.std = torch.tensor(processor.image_std).reshape(3, 1, 1)
        self.options = {"area": (0.5, 1.0), "flip": "random"} if vary else {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixels = self.pixels[row][None]
        if self.options:
            draw = np.random.SeedSequence((self.seed, self.epoch, row)).generate_state(1)
            generator = torch.Generator().manual_seed(int(draw[0]))
            pixels = augment(pixels, torch.tensor([row]), 0, self.options, generator, self.side)
        else:
            first = (pixels.shape[-1] - self.side) // 2
            pixels = pixels[..., first : first + self.side, first : first + self.side]
        return {
            "pixel_values": (pixels[0].float() / 255 - self.mean) / self.std,
            "labels": self.labels[row],
        }


def finetuning(load: Callable[..., Any], data: str | Path, settings: Settings) -> Job:
    """A classifier and labelled pictures of one's own for it, see `load_own_pictures`.

    Raises:
        UserError: there are none, or they cannot be learnt.
    """
    pictures = load_own_pictures(data, label_column=settings.label_column)
    training, validation, test = divide_in_three(pictures, settings.held_out, settings.seed)
    held_out = validation or test
    names = training.classes
    model = load(**class_names(names), ignore_mismatched_sizes=True)  # the classifier starts anew
    processor = load_processor(model)
    side = processor.size["shortest_edge"]
    counts = torch.bincount(training.labels, minlength=len(names)).tolist()
    class_counts = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return Job(
        model=model,
        train=_VariedPictures(training.in_memory(side), processor, settings.augment, settings.seed),
        held_out=[
            {
                "pixel_values": to_batch(processor, [held_out.picture(row)], model)[0],
                "labels": label,
            }
            for row, label in enumerate(held_out.labels)
        ],
        collate=None,
        save_processor=processor.save_pretrained,
        record={
            "kind": "pictures",
            "name": training.name,
            "train": training.digests(),
            "validation": held_out.digests(),
            "one_hold_out": validation is None,
            **({"label_column": settings.label_column} if settings.label_column else {}),
        },
        last_layers=("classifier", "head"),
        lr=1e-3,
        unit="pictures",
        n_test=len(test) if validation else 0,
        # Phantom gradients of a rough equilibrium train as well; the recipes take five.
        solver={"max_steps": min(10, model.config.solver["max_steps"])},
        notes=[
            f"to learn: {class_counts if len(names) < 20 else f'{len(names)} classes'}",
            *contradictions(pictures),
            *unlearnt(pictures),
        ],
        fingerprints=[part.describe()["fingerprint"] for part in (training, held_out)],
    )

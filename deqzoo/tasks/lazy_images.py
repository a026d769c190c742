"""Image classification with more pictures than fit into memory: decoded batch by batch."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqzoo.data.imagenet import IMAGENET, BlankPictures, load_imagenet
from deqzoo.recipe import Recipe
from deqzoo.tasks.augmentation import AREA, ASPECT, check_augmentation, random_resized_crop
from deqzoo.tasks.base import Plan, check_options, mixed_seed
from deqzoo.tasks.images import ImageClassificationTask


class LazyImageClassificationTask(ImageClassificationTask):
    """ImageNet-1k with MDEQ.

    Training pictures are random resized crops (`augment.area`: share of the picture, `.aspect`:
    width / height), flipped at random; validation pictures are what the image processor makes.
    Threads decode, a batch ahead of the one that is trained on.
    """

    validation_chunk = 64

    def __init__(
        self, recipe: Recipe, data: str | os.PathLike[str] | None, stand_in: bool = False
    ) -> None:
        super().__init__(recipe, data, stand_in)
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self._ahead: tuple[tuple[int, int, int], list[Future[Tensor]]] | None = None

    def _check_augmentation(self, options: dict[str, Any]) -> None:
        check_augmentation(options, ("area", "aspect", "flip"), flips=("random",))

    def _check_sizes(self) -> None:
        pass  # no such augmentation

    def _load(self, data: str | os.PathLike[str] | None, stand_in: bool) -> tuple[Any, Any]:
        options = self.recipe.data.options
        check_options(load_imagenet, options)
        if stand_in:
            n = IMAGENET.validation_per_class * len(IMAGENET.classes)
            return (
                BlankPictures(IMAGENET.rows["train"] - n, IMAGENET.classes),
                BlankPictures(n, IMAGENET.classes),
            )
        return (
            load_imagenet("train", data, **options),
            load_imagenet("validation", data, **options),
        )

    def _first_pictures(self) -> Tensor:
        rows = torch.arange(min(500, len(self.training)))
        side = self.recipe.stages[0].resolution or self.config.image_size
        return torch.stack([self._crop(int(row), 0, side) for row in rows])

    def batch(self, plan: Plan, micro_step: int, rank: int, world: int) -> dict[str, Any]:
        """Pictures (b, 3, S, S) float32 and labels (b,), b = batch_size / world."""
        key = (micro_step, rank, world)
        if self._ahead is None or self._ahead[0] != key:
            self._ahead = (key, self._submit(plan, *key))
        pictures = self._ahead[1]
        if micro_step + 1 < plan.total * plan.accumulate:
            next_key = (micro_step + 1, rank, world)
            self._ahead = (next_key, self._submit(plan, *next_key))
        rows, _ = self._rows(plan, micro_step, rank, world)
        pixels = torch.stack([picture.result() for picture in pictures])
        return {"pixel_values": self._normalise(pixels), "labels": self.training.labels[rows]}

    def _submit(self, plan: Plan, micro_step: int, rank: int, world: int) -> list[Future[Tensor]]:
        rows, epoch = self._rows(plan, micro_step, rank, world)
        side = plan.stage(micro_step // plan.accumulate).resolution or self.config.image_size
        return [self._threads.submit(self._crop, int(row), epoch, side) for row in rows]

    def _crop(self, row: int, epoch: int, side: int) -> Tensor:
        """A training picture, uint8 (3, side, side); the draw depends on row and epoch alone."""
        options = self.recipe.augment
        generator = np.random.default_rng(mixed_seed(self.recipe.seed, epoch, row))
        return random_resized_crop(
            self.training.picture(row),
            side,
            tuple(options.get("area", AREA)),
            tuple(options.get("aspect", ASPECT)),
            options.get("flip") == "random",
            generator,
        )

    def _validation_batch(self, start: int, end: int, side: int | None) -> tuple[Tensor, Tensor]:
        side = side or self.config.image_size
        shortest = round(side * self.processor.size["shortest_edge"] / self.config.image_size)
        pixels = self.processor(
            [self.validation.picture(row) for row in range(start, end)],
            size={"shortest_edge": shortest},
            crop_size={"height": side, "width": side},
            return_tensors="pt",
        )["pixel_values"]
        return pixels, self.validation.labels[start:end]


def image_task(
    recipe: Recipe, data: str | os.PathLike[str] | None, stand_in: bool = False
) -> ImageClassificationTask:
    """The image task of a recipe: ImageNet is read as it goes, the other sets stay in memory."""
    lazy = recipe.data.name == IMAGENET.name
    kind = LazyImageClassificationTask if lazy else ImageClassificationTask
    return kind(recipe, data, stand_in)

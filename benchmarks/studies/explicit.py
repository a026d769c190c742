"""An explicit network of equal cost beside the tiny MDEQ: as many FLOPs to use, as many to train.

    python benchmarks/studies/explicit.py --data CIFAR [--runs runs/explicit] [--threads 1]

A residual network of transformers (`ResNetForImageClassification`: three groups of three basic
blocks and a 3 × 3 stem, as in He et al. 2016) so wide that a picture costs as much as eight
evaluations of the map of `mdeq-tiny-cifar-upg`, from where on more of them bring no accuracy
(`anytime.py`). It is held against the first release of that model, whose record and test figures
are in `explicit_reference/`: data, augmentation, batches, optimiser, schedule, smoothing, average
and FLOPs are the same, and the epochs at 16, 24 and 32 pixels are in proportion. One seed. The test
split is named once, at the end. A run that was cut off goes on from its last checkpoint; it takes
half an hour of a core with bf16 units.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from cells import HERE, Cells, markdown_table, write_text
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from deqzoo import DEQModel
from deqzoo.data.image_sets import load_cifar10
from deqzoo.files import replacing
from deqzoo.recipe import Recipe, Stage, from_plain
from deqzoo.tasks import build_task
from deqzoo.tasks.augmentation import resize
from deqzoo.tasks.images import ImageClassificationTask
from deqzoo.training.callbacks import SETTLING, append_metrics, copy_buffers
from deqzoo.training.cost import count_flops
from deqzoo.training.optimizers import build_optimizer, rate_factor
from deqzoo.training.run import use_bf16
from deqzoo.training.trainer import moving_average
from deqzoo.zoo import read_json

MODEL = "mdeq-tiny-cifar-upg"
REFERENCE = HERE / "explicit_reference"
NETWORK = "residual network"
BLOCKS = 3
"""Basic blocks in each of three groups; with the stem and the classifier 20 layers."""
EVALUATIONS = 8
"""Evaluations of the map after which the MDEQ names no more pictures right."""
LOG_STEPS, SAVE_SECONDS = 25, 300.0


def network(width: int, n_classes: int = 10) -> ResNetForImageClassification:
    """A residual network for pictures of 32 pixels, from the global random state.

    Args:
        width: channels of the first group; the second has twice and the third four times as many.
        n_classes: number of logits.
    """
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[BLOCKS] * 3,
        layer_type="basic",
        num_labels=n_classes,
    )
    model = ResNetForImageClassification(config)
    # The stem of ImageNet would take 32 pixels to 8.
    model.resnet.embedder.embedder = ResNetConvLayer(3, width, kernel_size=3, stride=1)
    model.resnet.embedder.pooler = nn.Identity()
    return model


def network_flops(model: nn.Module, side: int) -> float:
    """FLOPs of the forward pass of one picture."""
    model.eval()
    return count_flops(lambda: model(torch.zeros(1, 3, side, side)))


def solve_flops(evaluations: int, side: int) -> float:
    """FLOPs of one picture in the MDEQ with so many evaluations of its map, head included."""
    model = DEQModel.from_pretrained(MODEL).eval()
    solver = {"name": "fixed_point", "max_steps": evaluations, "tol": 0.0}
    return count_flops(lambda: model(torch.zeros(1, 3, side, side), solver=solver))


def width_for(flops: float, side: int) -> int:
    """The multiple of eight whose network is nearest to so many FLOPs a picture."""
    return min(range(8, 136, 8), key=lambda w: abs(network_flops(network(w), side) - flops))


def step_flops(recipe: Recipe, model: nn.Module) -> list[float]:
    """FLOPs of an optimiser step of each stage: the backward pass counts as two forward ones."""
    return [3 * recipe.batch_size * network_flops(model, side(stage)) for stage in recipe.stages]


def steps_of(recipe: Recipe, model: nn.Module, flops: float) -> list[int]:
    """Optimiser steps of each stage, by its share of the epochs, that cost so many FLOPs."""
    epochs = [stage.epochs for stage in recipe.stages]
    costs = step_flops(recipe, model)
    scale = flops / sum(e * c for e, c in zip(epochs, costs, strict=True))
    return [round(e * scale) for e in epochs]


def side(stage: Stage) -> int:
    """Pixels of a side in a stage."""
    assert stage.resolution is not None
    return stage.resolution


class Run:
    """The training of the network, and all that a checkpoint of it holds.

    Args:
        recipe: of the MDEQ; what is said of solver, gradient and penalty is left out.
        data: CIFAR-10.
        flops: of the whole training.
        folder: receives `checkpoint.pt` and `metrics.jsonl`.
    """

    def __init__(self, recipe: Recipe, data: Path, flops: float, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        task = build_task(recipe, data)
        assert isinstance(task, ImageClassificationTask)
        self.task, self.data = task, task.resident(torch.device("cpu"))
        torch.manual_seed(recipe.seed)
        width = width_for(solve_flops(EVALUATIONS, 32), 32)
        torch.manual_seed(recipe.seed)
        self.model = network(width)
        self.steps = steps_of(recipe, self.model, flops)
        self.model = self.model.train().to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.bf16 = use_bf16(recipe)
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "checkpoint.pt").is_file():
            self.load(torch.load(folder / "checkpoint.pt", weights_only=True))

    def stage(self, step: int) -> tuple[int, Stage]:
        """The first step of the stage of a step, and the stage."""
        start, last = 0, self.recipe.stages[-1]
        for stage, count in zip(self.recipe.stages[:-1], self.steps[:-1], strict=True):
            if step < start + count:
                return start, stage
            start += count
        return start, last

    def train(self) -> None:
        """All steps that are left."""
        total = sum(self.steps)
        rows_of: dict[int, Tensor] = {}
        bar = tqdm(total=total, initial=self.step, disable=None, desc=NETWORK)
        last_save = last_time = time.monotonic()
        losses: list[float] = []
        while self.step < total:
            start, stage = self.stage(self.step)
            per_epoch = self.task.steps_per_epoch(stage)
            epoch, position = divmod(self.step, per_epoch)
            if epoch not in rows_of:
                rows_of = {epoch: self.data.epoch(epoch, stage)}
            losses.append(self.update(rows_of[epoch][position], epoch, stage))
            self.step += 1
            if self.step - start == SETTLING:
                copy_buffers(self.average, self.model)
            bar.update()
            now = time.monotonic()
            self.seconds, last_time = self.seconds + now - last_time, now
            if self.step % LOG_STEPS == 0:
                self.log(loss=sum(losses) / len(losses))
                losses = []
            is_end_of_epoch = position + 1 == per_epoch or self.step == total
            if is_end_of_epoch:
                held_out = self.task.validation
                n = self.recipe.evaluation.samples
                self.log(
                    validation=self.right(held_out.pixels[:n], held_out.labels[:n], side(stage)) / n
                )
            if is_end_of_epoch or now - last_save > SAVE_SECONDS:
                self.save()
                last_save = time.monotonic()
            last_time = time.monotonic()
        bar.close()

    def update(self, rows: Tensor, epoch: int, stage: Stage) -> float:
        """One optimiser step on some rows of the training part; returns the loss."""
        factor = rate_factor(self.recipe.schedule, self.step / sum(self.steps))
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        inputs = self.data.inputs(rows, torch.tensor(epoch), stage)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            outputs = self.model(pixel_values=inputs["pixel_values"])
        loss = self.task.loss(outputs, inputs)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        means, values = (
            [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
            for model in (self.average, self.model)
        )
        moving_average(self.recipe.average, warm_up=True)(means, values, self.step)
        return float(loss.detach())

    @torch.inference_mode()
    def right(self, pixels: Tensor, labels: Tensor, resolution: int) -> int:
        """How many pictures (N, 3, H, W) uint8 the averaged weights name right, in float32."""
        count = 0
        for batch, truth in zip(pixels.split(250), labels.split(250), strict=True):
            batch = resize((batch.float() / 255 - self.data.mean) / self.data.std, resolution)
            count += int((self.average(batch).logits.argmax(-1) == truth).sum())
        return count

    def log(self, **figures: float) -> None:
        """Add a line to the run's log."""
        entry = {"seconds": round(self.seconds, 1), **figures}
        append_metrics(self.folder / "metrics.jsonl", self.step, entry)

    def save(self) -> None:
        """Write the checkpoint."""
        content = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with replacing(self.folder / "checkpoint.pt") as file:
            torch.save(content, file)

    def load(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(content["model"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["generator"])
        self.step, self.seconds = content["step"], content["seconds"]


def measure(data: Path, folder: Path) -> dict[str, Any]:
    """Train the network, and name the test split once."""
    reference = read_json(REFERENCE / "training.json")
    recipe = from_plain(Recipe, reference["recipe"], "")
    run = Run(recipe, data, 1e15 * reference["pflop"], folder)
    run.train()
    test = load_cifar10("test", data)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    costs = step_flops(run.recipe, run.average)
    flops = sum(n * cost for n, cost in zip(run.steps, costs, strict=True))
    return {
        "parameters": sum(p.numel() for p in run.average.parameters()),
        "flops_per_picture": network_flops(run.average, 32),
        "reference_flops_per_picture": solve_flops(EVALUATIONS, 32),
        "pflop": flops / 1e15,
        "steps": run.steps,
        "epochs": sum(run.steps) / run.task.steps_per_epoch(run.recipe.stages[0]),
        "seed": run.recipe.seed,
        "accuracy": run.right(test.pixels, test.labels, 32) / len(test),
        "test_pictures": len(test),
        "validation": [(line["step"], line["validation"]) for line in log if "validation" in line],
        "seconds": run.seconds,
    }


def report(cells: dict[str, dict[str, Any]]) -> str:
    """The network and the MDEQ's first release, row by row."""
    record, test = (read_json(REFERENCE / f"{n}.json") for n in ("training", "cifar10-test"))
    rows = []
    for name, cell in cells.items():
        rows.append(
            [
                name,
                f"{cell['parameters']:,}",
                f"{cell['flops_per_picture'] / 1e9:.2f}",
                f"{cell['pflop']:.3f}",
                f"{cell['epochs']:.1f}",
                f"{100 * cell['accuracy']:.1f}",
            ]
        )
        rows.append(
            [
                f"`{MODEL}`, first release",
                f"{test['model']['parameters']:,}",
                f"{cell['reference_flops_per_picture'] / 1e9:.2f} in {EVALUATIONS} evaluations",
                f"{record['pflop']:.3f}",
                f"{record['epochs']:.1f}",
                f"{100 * test['results']['accuracy']:.1f}",
            ]
        )
    head = ["model", "parameters", "GFLOP a picture", "training, PFLOP", "epochs"]
    return markdown_table([*head, "test accuracy, %"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs/explicit"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cells = Cells("explicit")
    missing = cells.fill([NETWORK], lambda _: measure(arguments.data, arguments.runs))
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")
    write_text("explicit_table.md", report(cells.done))


if __name__ == "__main__":
    main()

"""Fine-tune an image model of the zoo on labels of your own, with transformers' Trainer.

    python examples/finetune_image.py pictures/ --output tuned

`pictures/` holds a folder of pictures per class, or parquet files with an image and a label column;
a name of the Hub will do, too. Classes can be merged into new ones:

    python examples/finetune_image.py cifar10/ --groups vehicle=airplane,automobile,ship,truck \\
        animal=bird,cat,deer,dog,frog,horse

A tenth of the pictures is held out where there is no test split; its accuracy is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.models.readers import load_processor
from deqzoo.training.norms import freeze_batch_norm


def load(source: str, cache: str | None) -> DatasetDict:
    """A data set with the splits train and test, and the columns image and label."""
    folder = Path(source)
    if not folder.is_dir():
        data = load_dataset(source, cache_dir=cache)
    elif parquet := sorted(folder.rglob("*.parquet")):
        files: dict[str, list[str]] = {}
        for path in parquet:
            files.setdefault(path.name.split("-")[0].removesuffix(".parquet"), []).append(str(path))
        data = load_dataset("parquet", data_files=files, cache_dir=cache)
    else:
        data = load_dataset("imagefolder", data_dir=source, cache_dir=cache)
    column = next((c for c in ("image", "img") if c in data["train"].column_names), None)
    if column is None or "label" not in data["train"].column_names:
        raise UserError(f"{source} needs the columns image and label")
    if column == "img":
        data = data.rename_column("img", "image")
    data = data.select_columns(["image", "label"]).cast_column("image", Image())
    if "test" not in data:
        data = data["train"].train_test_split(0.1, seed=0)
    return data


def merge_classes(data: DatasetDict, groups: Sequence[str]) -> DatasetDict:
    """Pictures of the named classes only, with the groups as their labels.

    Args:
        groups: as in "vehicle=car,truck".
    """
    old = data["train"].features["label"].names
    names, new = [], {}
    for number, group in enumerate(groups):
        name, _, members = group.partition("=")
        names.append(name)
        for member in members.split(","):
            if member not in old:
                raise UserError(f"no class {member!r}; the classes are {', '.join(old)}")
            new[old.index(member)] = number
    data = data.filter(lambda label: label in new, input_columns="label")
    features = data["train"].features.copy()
    features["label"] = ClassLabel(names=names)
    return data.map(lambda label: {"label": new[label]}, input_columns="label", features=features)


def prepare(processor: Any, batch: dict[str, list[Any]]) -> dict[str, Any]:
    """Pictures as the model sees them, when they are asked for."""
    pixels = processor(images=batch["image"], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": batch["label"]}


def accuracy(prediction: Any) -> dict[str, float]:
    found = prediction.predictions.argmax(-1)
    return {"accuracy": float((found == prediction.label_ids).mean())}


def finetune(
    model: PreTrainedModel, data: DatasetDict, output: Path, settings: argparse.Namespace
) -> float:
    """Train with the model's own solver and gradient, save it, and return the accuracy."""
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=32,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=accuracy,
    )
    trainer.train()
    model.save_pretrained(output)
    return trainer.evaluate()["eval_accuracy"]


def main(argv: list[str] | None = None) -> float:
    """Run the example; the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder, or data set of the Hub")
    parser.add_argument("--model", default="mdeq-tiny-cifar-upg")
    parser.add_argument("--groups", nargs="+", help="new classes, as NAME=class,class,...")
    parser.add_argument("--output", type=Path, default=Path("finetuned"))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--freeze-norm", action="store_true", help="keep batch norms' statistics")
    parser.add_argument("--cache", help="where datasets keeps its files")
    settings = parser.parse_args(argv)
    torch.manual_seed(0)
    data = load(settings.data, settings.cache)
    if settings.groups:
        data = merge_classes(data, settings.groups)
    names = data["train"].features["label"].names
    model = DEQModel.from_pretrained(
        settings.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # the classifier starts anew
    )
    if settings.freeze_norm:
        freeze_batch_norm(model)
    processor = load_processor(model)
    prepared: dict[str, Dataset] = data.with_transform(partial(prepare, processor))
    reached = finetune(model.train(), prepared, settings.output, settings)
    processor.save_pretrained(settings.output)
    print(f"held-out accuracy {reached:.1%} on {', '.join(names)}")
    return reached


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"finetune_image.py: {error}", file=sys.stderr)
        sys.exit(2)

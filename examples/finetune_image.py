"""Fine-tune an image model of the zoo on classes of your own, with transformers' Trainer.

    python examples/finetune_image.py pictures/ --output tuned

PICTURES is anything `datasets.load_dataset` reads: a folder with one subfolder per class (below
`train` and `test`, or without these), parquet files, or a data set on the Hub. The held-out
accuracy is printed before and after.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from deqzoo import DEQModel, MDEQImageProcessor


def load_pictures(source: str) -> tuple[Dataset, Dataset, list[str]]:
    """Training and held-out part with the columns image and label, and the classes' names."""
    parts = load_dataset(source)
    if not isinstance(parts, DatasetDict) or len(parts) == 1:
        whole = parts if isinstance(parts, Dataset) else next(iter(parts.values()))
        parts = whole.train_test_split(test_size=0.2, seed=0)
    held_out = next(name for name in ("test", "validation", *parts) if name in parts)
    features = parts["train"].features
    columns = {
        next(name for name, kind in features.items() if isinstance(kind, Image)): "image",
        next(name for name, kind in features.items() if isinstance(kind, ClassLabel)): "label",
    }
    training, held_out = (
        parts[part].select_columns(list(columns)).rename_columns(
            {old: new for old, new in columns.items() if old != new}
        )
        for part in ("train", held_out)
    )  # fmt: skip
    return training, held_out, training.features["label"].names


def make_collate(processor: MDEQImageProcessor) -> Any:
    """Rows to a batch; pictures of any size and mode."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = processor(images=[row["image"] for row in rows], return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    return collate


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers; the model's first output is the logits."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Run the example; the held-out accuracies before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", help="folder or data set")
    parser.add_argument("--model", default="mdeq-tiny-cifar-upg")
    parser.add_argument("--output", type=Path, default=Path("finetuned"))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args(argv)
    training, held_out, classes = load_pictures(arguments.pictures)
    model = DEQModel.from_pretrained(
        arguments.model,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
        ignore_mismatched_sizes=True,  # the classifier is new
    )
    processor = MDEQImageProcessor.from_pretrained(model.config._name_or_path)
    settings = TrainingArguments(
        output_dir=str(arguments.output),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=32,
        learning_rate=arguments.lr,
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        settings,
        data_collator=make_collate(processor),
        train_dataset=training,
        eval_dataset=held_out,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    print(f"held-out accuracy {before:.1%} before, {after:.1%} after fine-tuning")
    return before, after


if __name__ == "__main__":
    main()

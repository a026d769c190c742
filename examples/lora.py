"""Adapt a model of any family with LoRA (PEFT): the equilibrium map itself gets the adapters.

    python examples/lora.py                                    # images: mdeq-tiny-cifar-upg
    python examples/lora.py --model deq-transformer-ptb-upg    # text
    python examples/lora.py --model ignn-proteins-upg          # graphs

Each trains on a small task made on the spot, prints the loss before and after, merges the adapters
into the weights and saves a model that needs no PEFT. Needs `pip install peft`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer.tokenization_deq_transformer import prepare_text, text_style
from deqzoo.models.readers import load_tokenizer

HERE = Path(__file__).resolve().parent
Batch = dict[str, Tensor]

#: What gets adapters. "all-linear" leaves the embeddings and the softmax tied to them alone; the
#: map of an MDEQ is made of convolutions. The weight of an IGNN's map has a norm bound that keeps
#: it well posed, so its adapters sit behind it.
TARGETS = {
    "mdeq": r".*transformation\..*\.conv[12]?|classifier",
    "deq_transformer": "all-linear",
    "ignn": "all-linear",
}


def pictures(model: PreTrainedModel) -> Callable[[], Batch]:
    """Crops of three of the bundled pictures, to be told apart."""
    size = model.config.image_size
    files = sorted((HERE / "pictures").glob("*.*"))[:3]
    views = [Image.open(file).convert("RGB").resize((4 * size, 4 * size)) for file in files]
    images = torch.stack([torch.from_numpy(np.array(view)) for view in views])
    images = images.permute(0, 3, 1, 2) / 127.5 - 1

    def batch() -> Batch:
        labels = torch.randint(3, (8,))
        crops = []
        for label in labels:
            y, x = torch.randint(3 * size, (2,)).tolist()
            crops.append(images[label, :, y : y + size, x : x + size])
        return {"pixel_values": torch.stack(crops), "labels": labels}

    return batch


def words(model: PreTrainedModel) -> Callable[[], Batch]:
    """Segments of this repository's README."""
    tokenizer = load_tokenizer(model)
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    prepared = prepare_text(text, tokenizer.get_vocab(), text_style(tokenizer))
    ids = torch.tensor(tokenizer(prepared.text)["input_ids"])
    length = min(32, len(ids) // 2)

    def batch() -> Batch:
        starts = torch.randint(len(ids) - length, (8, 1))
        segment = ids[starts + torch.arange(length)]
        return {"input_ids": segment, "labels": segment}

    return batch


def graphs(model: PreTrainedModel) -> Callable[[], Batch]:
    """Rings against stars; every node sees random features and its neighbours."""

    def batch(n: int = 8) -> Batch:
        labels = torch.randint(2, (16,))
        node = torch.arange(n)
        ring = torch.stack([node, (node + 1) % n])
        star = torch.stack([torch.zeros(n - 1, dtype=torch.int64), node[1:]])
        edges = [(star if label else ring) + n * i for i, label in enumerate(labels)]
        forth = torch.cat(edges, dim=1)
        return {
            "x": torch.rand(16 * n, model.config.num_features),
            "edge_index": torch.cat([forth, forth.flip(0)], dim=1),
            "batch": torch.arange(16).repeat_interleave(n),
            "labels": labels,
        }

    return batch


TASKS = {"mdeq": pictures, "deq_transformer": words, "ignn": graphs}


def mean_loss(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Loss of a model on some batches, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return sum(model(**batch).loss.item() for batch in batches) / len(batches)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Adapt, merge and save; the held-out loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mdeq-tiny-cifar-upg", help="zoo name or folder")
    parser.add_argument("--output", type=Path, help="folder for the merged model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DEQModel.from_pretrained(options.model)
    family = model.config.model_type
    if family == "mdeq":  # three pictures instead of the stored labels
        model = DEQModel.from_pretrained(options.model, num_labels=3, ignore_mismatched_sizes=True)
    batch = TASKS[family](model)
    held_out = [batch() for _ in range(2)]
    adapters = peft.LoraConfig(r=options.rank, target_modules=TARGETS[family])
    adapted = peft.get_peft_model(model, adapters)
    adapted.print_trainable_parameters()
    before = mean_loss(adapted, held_out)

    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.lr)
    for step in range(options.steps):
        adapted.train()
        loss = adapted(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    after = mean_loss(adapted, held_out)
    print(f"held-out loss {before:.3f} before, {after:.3f} after")

    merged = adapted.merge_and_unload()
    print(f"held-out loss {mean_loss(merged, held_out):.3f} merged")
    if options.output is not None:
        merged.save_pretrained(options.output)
    return before, after


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"lora.py: {error}", file=sys.stderr)
        sys.exit(2)

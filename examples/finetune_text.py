"""Fine-tune a language model of the zoo on a text of your own, with transformers' Trainer.

    python examples/finetune_text.py notes.txt --output tuned

The last tenth of the lines is held out, so two are needed; its perplexity is printed before and
after.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from deqzoo import DEQModel
from deqzoo.data.lines import read_lines
from deqzoo.errors import UserError
from deqzoo.evaluation.perplexity import perplexity
from deqzoo.models.deq_transformer.tokenization_deq_transformer import prepare_text, text_style
from deqzoo.models.readers import load_tokenizer


class Segments(torch.utils.data.Dataset):
    """A text as segments of words; each starts with the last word of the one before.

    A text that is shorter than a segment is one by itself.

    Raises:
        UserError: no word in the text.
    """

    def __init__(self, lines: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        style, vocabulary = text_style(tokenizer), tokenizer.get_vocab()
        prepared = prepare_text("\n".join(lines) + "\n", vocabulary, style)
        if prepared.n_words == 0:
            raise UserError("the text holds no word to train on before its last tenth")
        print(
            f"{prepared.n_words} words, {prepared.unknown_share:.1%} of them unknown to the model"
        )
        ids = torch.tensor(tokenizer(prepared.text)["input_ids"])
        self.segments = [ids] if len(ids) <= length else list(ids.unfold(0, length + 1, length))

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = self.segments[index]
        return {"input_ids": words, "labels": words}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch; the loss needs no scores of the whole vocabulary."""
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return {**batch, "return_logits": False}


def read_text(path: Path) -> tuple[list[str], list[str]]:
    """Lines to train on, and the last tenth, which is held out.

    Raises:
        UserError: no text file, or less than two lines.
    """
    lines = [line.rstrip("\r\n") for line in read_lines(path)]
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) < 2:
        raise UserError(
            f"{path} has {len(lines)} line(s); at least two are needed, since the last tenth of "
            "the lines is held out"
        )
    cut = len(lines) - max(1, len(lines) // 10)
    return lines[:cut], lines[cut:]


def finetune(
    model: PreTrainedModel, dataset: Segments, output: Path, epochs: float, lr: float
) -> None:
    """Train with the model's own solver and gradient, and save it."""
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=lr,
        warmup_steps=0.1,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=collate).train()
    model.save_pretrained(output)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Run the example; the held-out perplexities before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="UTF-8 text file")
    parser.add_argument("--model", default="deq-transformer-wikitext2-jr-upg")
    parser.add_argument("--output", type=Path, default=Path("finetuned"))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    arguments = parser.parse_args(argv)
    training, held_out = read_text(arguments.text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = DEQModel.from_pretrained(arguments.model)
    tokenizer = load_tokenizer(model)
    dataset = Segments(training, tokenizer, model.config.tgt_len)
    before = perplexity(model, held_out, tokenizer).perplexity
    finetune(model.train(), dataset, arguments.output, arguments.epochs, arguments.lr)
    tokenizer.save_pretrained(arguments.output)
    after = perplexity(model, held_out, tokenizer).perplexity
    print(f"held-out perplexity {before:.1f} before, {after:.1f} after fine-tuning")
    return before, after


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"finetune_text.py: {error}", file=sys.stderr)
        sys.exit(2)

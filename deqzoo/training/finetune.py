"""Training on data of one's own: pictures, texts and graphs, from a model of the zoo or from none.

One run of `DEQTrainer`: a validation part chooses the weights and ends the run early, and a test
part is kept for the figure, both drawn class by class. Few data have one hold-out for both, which
is said.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from deqzoo.data import own
from deqzoo.data.graphs import GraphSet, collate_graphs, load_own_graphs
from deqzoo.data.text import END, UNKNOWN, count_vocabulary
from deqzoo.errors import UserError
from deqzoo.files import mark_complete, replace_text
from deqzoo.models.auto import DEQModel
from deqzoo.models.deq_transformer import DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import (
    build_tokenizer,
    prepare_text,
    text_style,
)
from deqzoo.tasks.graphs import class_settings
from deqzoo.tasks.images import augment
from deqzoo.training.arguments import DEQTrainingArguments, check_report_to
from deqzoo.training.checkpoints import differences, latest_checkpoint
from deqzoo.training.norms import freeze_batch_norm
from deqzoo.training.trainer import DEQTrainer
from deqzoo.zoo import read_json

FREEZE = ("none", "norms", "backbone")
TOKENIZERS = ("keep", "extend", "build")
LEAST_STEPS = 200
"""Optimiser steps that small data are given where nobody says how many."""
FEW = 50
"""A hold-out of fewer samples says little."""
_EVALUATIONS = 12
_PATIENCE = 5


@dataclass(frozen=True)
class Settings:
    """How a model is trained on data of one's own.

    Attributes:
        epochs: passes over the data; None for three, or as many as make `LEAST_STEPS` steps.
        batch_size: samples per step; None for a tenth of them, from 8 to 32.
        lr: peak learning rate of AdamW; None for the kind's own.
        solver: of training steps, a name or settings; if None the model's own, for pictures with at
            most ten steps.
        gradient: likewise.
        freeze: "norms" keeps the statistics of batch norms, "backbone" also all weights but the
            last layers'; "none" trains everything.
        seed: of the hold-out, the new weights and the order.
        report_to: as in `TrainingArguments`: tensorboard, wandb, trackio, ... or none.
        held_out: share of every class that is kept to be measured where the data have no test
            split; half as much chooses the weights. Of texts half of each.
        max_steps: stop after so many optimiser steps.
        augment: vary pictures.
        tokenizer: of texts: "keep" the model's, "extend" it by the new words, or "build" one of
            the text's own words.
    """

    epochs: float | None = None
    batch_size: int | None = None
    lr: float | None = None
    solver: dict[str, Any] | str | None = None
    gradient: dict[str, Any] | str | None = None
    freeze: str = "norms"
    seed: int = 0
    report_to: tuple[str, ...] = ("none",)
    held_out: float = own.HELD_OUT
    max_steps: int | None = None
    augment: bool = True
    tokenizer: str = "keep"
    label_column: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("freeze", FREEZE), ("tokenizer", TOKENIZERS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be positive and finite, got {value}")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out must be a share between 0 and 1, got {self.held_out}")


@dataclass
class Job:
    """A model with the data that it is to learn.

    Attributes:
        model: to train.
        train: samples to learn.
        held_out: samples that choose the weights.
        measured: how many others the figure is of; 0 where `held_out` has to serve for both.
        collate: samples to the model's arguments.
        save_processor: writes what belongs beside the weights.
        record: what `own_data.json` holds.
        last_layers: beginnings of the names of parameters that "backbone" does not freeze.
        lr: default learning rate.
        least_steps: optimiser steps where nobody says how many epochs.
        unit: what a sample is.
        accuracy: whether the figure is one.
        solver: of training steps where nobody says.
        notes: what a user should know about the data.
    """

    model: PreTrainedModel
    train: Dataset
    held_out: Dataset
    collate: Callable[[list[Any]], dict[str, Any]] | None
    save_processor: Callable[[Path], None]
    record: dict[str, Any]
    last_layers: tuple[str, ...]
    lr: float
    unit: str
    measured: int
    accuracy: bool = True
    least_steps: int = LEAST_STEPS
    solver: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def kind_of(model_type: str) -> str:
    """ "pictures", "text" or "graphs"."""
    return {"mdeq": "pictures", "deq_transformer": "text", "ignn": "graphs"}[model_type]


def prepare(name: str | Path, data: str | Path, settings: Settings) -> Job:
    """Load a model and data of one's own for it.

    Args:
        name: zoo name, folder or repository of the model.
        data: see `load_own_pictures`, `load_own_text` and `load_own_graphs`.
        settings: of the training.

    Raises:
        UserError: no such model, or data that it cannot learn.
    """
    from transformers import AutoConfig

    from deqzoo.zoo import resolve_folder

    set_seed(settings.seed)
    folder = resolve_folder(name)
    if folder is None:  # a repository: fetched once, then read from the cache
        model_type = DEQModel.from_pretrained(name).config.model_type
    else:
        model_type = AutoConfig.from_pretrained(folder).model_type
    build = {"pictures": _pictures, "text": _text, "graphs": _graphs}[kind_of(model_type)]
    return build(lambda **changes: DEQModel.from_pretrained(name, **changes), data, settings)


def train(
    job: Job,
    output: str | Path,
    settings: Settings,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Train, keep the weights that the hold-out likes best, and save them with the record.

    Args:
        job: the model and its data.
        output: folder of the model. The run's own files lie in `checkpoints` there, which is
            removed at the end.
        settings: of the training.
        resume: go on from the last checkpoint of a run that was cut off, or start if there is none.
        progress: show a bar.

    Returns:
        The folder, which `from_pretrained` loads.

    Raises:
        UserError: the output is no folder of such a run, or settings do not fit.
    """
    output = Path(output)
    require_free(output, resume)
    output.mkdir(parents=True, exist_ok=True)
    _freeze(job, settings.freeze)
    n = len(job.train)  # type: ignore[arg-type]
    batch_size = settings.batch_size or min(32, max(8, n // 10))
    per_epoch = math.ceil(n / batch_size)
    epochs = settings.epochs or max(3, math.ceil(job.least_steps / per_epoch))
    total = settings.max_steps or max(1, round(epochs * per_epoch))
    every = max(1, total // _EVALUATIONS)
    # Of few samples the best accuracy is that of a lucky step; the loss says more.
    by_accuracy = job.accuracy and len(job.held_out) >= FEW  # type: ignore[arg-type]
    arguments = DEQTrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=total,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=settings.lr or job.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, total // 10),
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=settings.seed,
        logging_steps=max(1, min(every, 20)),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score" if by_accuracy else "eval_loss",
        greater_is_better=by_accuracy,
        report_to=check_report_to(settings.report_to),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=not progress,
        prediction_loss_only=not job.accuracy,
        solver=settings.solver or job.solver,
        gradient=settings.gradient,
        restore_callback_states_from_checkpoint=True,
    )
    started = time.time()
    trainer = DEQTrainer(
        job.model,
        arguments,
        train_dataset=job.train,
        eval_dataset=job.held_out,
        data_collator=job.collate,
        compute_metrics=_accuracy if job.accuracy else None,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=_PATIENCE), _Resumable(job.train)],
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    last = _resumable(output, job, settings, resume)
    if last is None or not _ended(trainer, Path(last), total):
        trainer.train(resume_from_checkpoint=last)
    job.model.save_pretrained(output)
    job.save_processor(output)
    own.write_record(output, job.record)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    content = {
        "settings": {
            **asdict(settings), "report_to": list(settings.report_to), "batch_size": batch_size,
            "epochs": round(total / per_epoch, 3), "lr": arguments.learning_rate,
        },
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - started, 1),
        "samples": n,
        "held_out": len(job.held_out),  # type: ignore[arg-type]
        "measured": job.measured or len(job.held_out),  # type: ignore[arg-type]
        "curve": [
            {k.removeprefix("eval_"): v for k, v in e.items() if k in _KEPT} for e in history
        ],
    }  # fmt: skip
    replace_text(output / "run.json", json.dumps(content, indent=2) + "\n")
    clear(output)
    return output


def clear(output: Path) -> None:
    """Remove what only the run needed."""
    logs = output / "checkpoints" / "runs"  # of TensorBoard
    if logs.is_dir():
        shutil.move(logs, output / "runs")
    (output / BEGUN).unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


BEGUN = "begun.json"
"""In the folder of a run that has not ended: what it is."""
_KEPT = ("step", "eval_loss", "eval_accuracy")


def require_free(output: Path, resume: bool = False) -> None:
    """Refuse an output that holds something else than what may go on.

    Raises:
        UserError: a file, a finished model, or a run that was cut off and is not to be resumed.
    """
    begun = (output / BEGUN).is_file()
    if output.is_file() or ((output / "config.json").is_file() and not begun):
        raise UserError(f"{output} already holds a model or is a file; choose another --output")
    if begun and not resume:
        raise UserError(f"{output} already holds a run; add --resume to go on, or remove it")


class _Resumable(TrainerCallback):
    """Tells pictures the epoch, and marks checkpoints that were written to their end."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate calls `set_epoch` of a data set, but not in an epoch that is resumed.
        self.data.epoch = int(state.epoch + 1e-6)  # type: ignore[attr-defined]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _resumable(output: Path, job: Job, settings: Settings, resume: bool) -> str | None:
    """The last sound checkpoint of the same run, if it was cut off and is to go on.

    Raises:
        UserError: the folder holds the checkpoints of another run, or damaged ones only.
    """
    begun = output / BEGUN
    model = job.model.config._name_or_path
    now = {"model": model, "settings": asdict(settings), "data": job.record}
    last = latest_checkpoint(output / "checkpoints") if resume else None
    if last is not None:
        if differences(read_json(begun), now):
            raise UserError(
                f"{output} holds a run of another model, or with other data or settings; remove it "
                "or choose another --output"
            )
        print(f"going on from {last}", file=sys.stderr)
    replace_text(begun, json.dumps(now))
    return last


def _ended(trainer: DEQTrainer, last: Path, total: int) -> bool:
    """Whether a run was cut off after its last step; its best weights are then taken."""
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    if state.global_step < total and stopping["early_stopping_patience_counter"] < _PATIENCE:
        return False
    trainer.state = state
    best = last.parent / Path(state.best_model_checkpoint or last).name
    trainer.model.load_state_dict(load_file(best / "model.safetensors"), strict=False)
    return True


def _freeze(job: Job, what: str) -> None:
    if what in ("norms", "backbone"):
        freeze_batch_norm(job.model)
    if what == "backbone":
        for name, parameter in job.model.named_parameters():
            parameter.requires_grad = name.startswith(job.last_layers)


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = torch.as_tensor(prediction.label_ids)
    scores = torch.as_tensor(logits).float()
    accuracy = float((scores.argmax(-1) == labels).double().mean())
    loss = float(torch.nn.functional.cross_entropy(scores, labels))
    # Small hold-outs often tie: then the lower loss is better.
    return {"accuracy": accuracy, "score": accuracy - 1e-3 * min(loss, 100.0)}


def warnings_of(job: Job) -> list[str]:
    """What a user should know about the data before the run."""
    measured = job.measured or len(job.held_out)  # type: ignore[arg-type]
    found = list(job.notes)
    if not job.measured:
        found.append(
            f"so few {job.unit} give one hold-out, which chooses the weights and is measured: its "
            "figure flatters"
        )
    if job.accuracy and measured < FEW:
        spread = 100 / math.sqrt(max(measured, 1))
        found.append(
            f"the test part has {measured} {job.unit} only: its accuracy is known to about "
            f"±{spread:.0f} points (two standard errors)"
        )
    return found


# Pictures.


class _Training(Dataset):
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


class _HeldOut(Dataset):
    """Pictures as the processor makes them."""

    def __init__(self, pictures: own.OwnPictures, processor: Any) -> None:
        self.pictures, self.processor = pictures, processor
        self.prepared: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row not in self.prepared:
            batch = self.processor(images=self.pictures.picture(row), return_tensors="pt")
            self.prepared[row] = batch["pixel_values"][0]
        return {"pixel_values": self.prepared[row], "labels": self.pictures.labels[row]}


def _pictures(load: Callable[..., Any], data: str | Path, settings: Settings) -> Job:
    from deqzoo.evaluation.classify import load_processor

    found = own.load_own_pictures(data, label_column=settings.label_column)
    training, choosing, test = own.divide_in_three(found, settings.held_out, settings.seed)
    names = training.classes
    model = load(
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # the classifier starts anew
    )
    processor = load_processor(model)
    side = processor.size["shortest_edge"]
    counts = torch.bincount(training.labels, minlength=len(names)).tolist()
    listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return Job(
        model=model,
        train=_Training(training.in_memory(side), processor, settings.augment, settings.seed),
        held_out=_HeldOut(choosing or test, processor),
        collate=None,
        save_processor=lambda folder: processor.save_pretrained(folder),
        record={
            "kind": "pictures",
            "name": training.name,
            "train": training.digests(),
            "validation": (choosing or test).digests(),
            "one_hold_out": choosing is None,
        },
        last_layers=("classifier", "head"),
        lr=1e-3,
        unit="pictures",
        measured=len(test) if choosing else 0,
        # Phantom gradients of a rough equilibrium train as well; the recipes take five.
        solver={"max_steps": min(10, model.config.solver["max_steps"])},
        notes=[f"to learn: {listed if len(names) < 20 else f'{len(names)} classes'}"],
    )


# Texts.


class _Segments(Dataset):
    """A text as segments of words; each starts with the last word of the one before."""

    def __init__(self, ids: Tensor, length: int) -> None:
        whole = len(ids) <= length
        self.segments = [ids] if whole else list(ids.unfold(0, length + 1, length))

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = self.segments[index]
        return {"input_ids": words, "labels": words}


def _collate_segments(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch; the loss needs no scores of the whole vocabulary."""
    batch = {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "labels")}
    return {**batch, "return_logits": False}


def _text(load: Callable[..., Any], data: str | Path, settings: Settings) -> Job:
    from deqzoo.evaluation.text import load_tokenizer

    text = own.load_own_text(data)
    training, choosing, test = text.divided_in_three(settings.held_out / 2)
    model = load()
    tokenizer = load_tokenizer(model)
    if settings.tokenizer != "keep":
        model, tokenizer = with_words(model, tokenizer, training, settings.tokenizer)
    vocabulary, style = tokenizer.get_vocab(), text_style(tokenizer)

    def ids(lines: list[str]) -> tuple[Tensor, float]:
        prepared = prepare_text("\n".join(lines) + "\n", vocabulary, style)
        if prepared.n_words == 0:
            raise UserError(f"{text.name} holds no word to train on or to hold out")
        return torch.tensor(tokenizer(prepared.text)["input_ids"]), prepared.unknown_share

    words, unknown = ids(training)
    other, _ = ids(choosing or test)
    length = model.config.tgt_len
    note = f"{len(words):,} words to learn, {unknown:.1%} of them unknown to the model"
    if unknown > 0.1 and settings.tokenizer == "keep":
        note += "; --tokenizer extend adds them"
    return Job(
        model=model,
        train=_Segments(words, length),
        held_out=_Segments(other, length),
        collate=_collate_segments,
        save_processor=lambda folder: tokenizer.save_pretrained(folder),
        record={
            "kind": "text",
            "name": text.name,
            "lines": len(training),
            "validation": len(choosing or test),
            "one_hold_out": not choosing,
            "train": own.text_digest(training),
        },
        last_layers=("transformer.embedding", "lm_head"),
        lr=3e-4,
        unit="lines",
        measured=len(test) if choosing else 0,
        accuracy=False,
        notes=[note],
    )


@torch.no_grad()
def with_words(model: Any, tokenizer: Any, lines: Sequence[str], how: str) -> tuple[Any, Any]:
    """The model with another vocabulary; words that it knew keep their vectors.

    Args:
        model: a DEQ-Transformer with its head.
        tokenizer: the model's.
        lines: of the text whose words count.
        how: "extend" the vocabulary by words that occur, the frequent ones first, or "build" one
            of the text's words alone, which a model with clusters by frequency cannot take.

    Raises:
        UserError: "build" for a model with clusters.
    """
    old, style = tokenizer.get_vocab(), text_style(tokenizer)
    prepared = prepare_text("\n".join(lines), old, style).text
    counted = count_vocabulary((prepared.lower() if style == "ptb" else prepared).split("\n"))
    if how == "build":
        if model.config.cutoffs:
            raise UserError(
                "this model sorts its words into clusters by frequency, which a new vocabulary "
                "does not fit: use --tokenizer extend, or train a new model by a recipe"
            )
        words = [END, UNKNOWN, *(word for word in counted if word not in (END, UNKNOWN))]
    else:
        words = sorted(old, key=old.__getitem__)
        words += [word for word in counted if word not in old]
    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": len(words)})
    fresh = DEQTransformerForCausalLM(config)
    source = torch.tensor([old.get(word, -1) for word in words])
    state, target = model.state_dict(), fresh.state_dict()
    size = model.config.vocab_size
    edge = model.config.cutoffs[-1] if model.config.cutoffs else 0
    for name, tensor in target.items():
        known = state[name]
        if known.shape == tensor.shape:
            tensor.copy_(known)
            continue
        # A table of words, whole or of the last cluster.
        first = 0 if known.shape[0] == size else edge
        rows = source[first:] - first
        tensor.copy_(known.mean(0, keepdim=True).expand_as(tensor))
        tensor[rows >= 0] = known[rows[rows >= 0]]
    fresh.load_state_dict(target)
    fresh.config._name_or_path = model.config._name_or_path
    return fresh.eval(), build_tokenizer(words, style)


# Graphs.


def _graphs(load: Callable[..., Any], data: str | Path, settings: Settings) -> Job:
    graphs = load_own_graphs(data)
    model = load(
        num_features=graphs.num_features,
        **class_settings(graphs),
        ignore_mismatched_sizes=True,
    )
    return graph_job(model, graphs, settings)


def graph_job(model: PreTrainedModel, graphs: GraphSet, settings: Settings) -> Job:
    """A graph classifier with a set of graphs, divided class by class.

    Raises:
        UserError: fewer than two classes, or no class with two graphs.
    """
    if not type(model).__name__.endswith("ForGraphClassification"):
        raise UserError(f"{type(model).__name__} classifies no graphs; choose a graph classifier")
    if len(graphs.labels.unique()) < 2:
        raise UserError(f"{graphs.name} holds graphs of one class; at least two are needed")
    share, digests = settings.held_out, own.graph_digests(graphs.graphs)
    rows, choosing, test = own.three_parts(graphs.labels, share, share / 2, settings.seed, digests)
    if not test:
        raise UserError(f"{graphs.name} has one graph of each class; give at least two")
    counts = np.bincount(graphs.labels.numpy())
    names = graphs.encoding.classes if graphs.encoding else range(len(counts))
    listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return Job(
        model=model,
        train=_List([graphs.graphs[i] for i in rows]),
        held_out=_List([graphs.graphs[i] for i in choosing or test]),
        collate=collate_graphs,
        save_processor=lambda folder: None,
        record={
            "kind": "graphs",
            "name": graphs.name,
            "train": [digests[i] for i in rows],
            "validation": [digests[i] for i in choosing or test],
            "one_hold_out": not choosing,
        },
        last_layers=("dense", "classifier"),
        lr=5e-3,
        least_steps=4 * LEAST_STEPS,  # they are cheap, and 200 left rings, paths and stars mixed
        unit="graphs",
        measured=len(test) if choosing else 0,
        notes=[f"graphs of the classes {listed}"],
    )


class _List(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]

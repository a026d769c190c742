"""Training on data of one's own, from a model of the zoo.

One run of `DEQTrainer`: a validation part chooses the weights and ends the run early, and a test
part is kept for the figure, both drawn class by class. Small data sets have one hold-out for both;
the record and the card say so.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from deqzoo.data import own
from deqzoo.errors import UserError
from deqzoo.files import mark_complete, replace_text, require_unclaimed
from deqzoo.models.auto import DEQModel
from deqzoo.tasks import load
from deqzoo.tasks.finetuning import FEW, Job, Settings
from deqzoo.training.arguments import DEQTrainingArguments, check_report_to
from deqzoo.training.callbacks import Divergence
from deqzoo.training.checkpoints import differences, latest_checkpoint
from deqzoo.training.lock import lock
from deqzoo.training.norms import freeze_batch_norm
from deqzoo.training.trainer import DEQTrainer
from deqzoo.zoo import TASKS, read_json, task_of

_EVALUATIONS = 12
_LOCK = ".lock"
_PATIENCE = 5


def prepare(name: str | Path, data: str | Path, settings: Settings) -> Job:
    """Load a model and data of one's own for it.

    Args:
        name: zoo name, folder or repository of the model.
        data: in a layout that the model's task reads.
        settings: of the training.

    Raises:
        UserError: no such model, one of another task, or data that it cannot learn.
    """
    kind = type(DEQModel.from_pretrained(name)).__name__
    task = task_of(kind)
    info = TASKS.get(task or "")
    if info is None or info.finetuning is None:
        raise UserError(f"{name} is of class {kind}, which learns no data of one's own")
    for option, is_set in (
        ("--column", settings.column is not None),
        ("--tokenizer", settings.tokenizer != "keep"),
        ("--label-column", settings.label_column is not None),
    ):
        if is_set:
            own.require_task_of(option, task)
    make = load(info.finetuning)
    set_seed(settings.seed)
    return make(lambda **changes: DEQModel.from_pretrained(name, **changes), data, settings)


def train(
    job: Job,
    output: str | Path,
    settings: Settings,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Train, keep the weights that are best on the hold-out, and save them with the record.

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
    with lock(output, _LOCK):
        return _train(job, output, settings, resume, progress)


def _train(job: Job, output: Path, settings: Settings, resume: bool, progress: bool) -> Path:
    _freeze(job, settings.freeze)
    arguments = _arguments(job, output, settings, progress)
    start = time.time()
    trainer = DEQTrainer(
        job.model,
        arguments,
        train_dataset=job.train,
        eval_dataset=job.held_out,
        data_collator=job.collate,
        compute_metrics=_accuracy if job.accuracy else None,
        callbacks=[
            Divergence(),
            EarlyStoppingCallback(early_stopping_patience=_PATIENCE),
            _Resumable(job.train),
        ],
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    last = _checkpoint_to_resume(output, job, settings, resume)
    if last is None or not _is_over(trainer, Path(last), arguments.max_steps):
        trainer.train(resume_from_checkpoint=last)
    job.model.save_pretrained(output)
    job.save_processor(output)
    own.write_record(output, job.record)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    batch_size = arguments.per_device_train_batch_size
    epochs = arguments.max_steps / math.ceil(len(job.train) / batch_size)
    content = {
        "settings": {
            **asdict(settings), "report_to": list(settings.report_to), "batch_size": batch_size,
            "epochs": round(epochs, 3), "lr": arguments.learning_rate,
        },
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - start, 1),
        "samples": len(job.train),
        "held_out": len(job.held_out),
        "measured": job.n_test or len(job.held_out),
        "curve": [
            {k.removeprefix("eval_"): v for k, v in e.items() if k in _CURVE_KEYS} for e in history
        ],
    }  # fmt: skip
    replace_text(output / "run.json", json.dumps(content, indent=2) + "\n")
    clear(output)
    return output


def _arguments(job: Job, output: Path, settings: Settings, progress: bool) -> DEQTrainingArguments:
    """The trainer's; what the settings leave open follows from the number of samples."""
    n = len(job.train)
    batch_size = settings.batch_size or min(32, max(8, n // 10))
    per_epoch = math.ceil(n / batch_size)
    epochs = settings.epochs or max(3, math.ceil(job.least_steps / per_epoch))
    total = settings.max_steps or max(1, round(epochs * per_epoch))
    interval = max(1, total // _EVALUATIONS)
    # Of few samples the best accuracy is that of a lucky step; the loss says more.
    by_accuracy = job.accuracy and len(job.held_out) >= FEW
    return DEQTrainingArguments(
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
        logging_steps=max(1, min(interval, 20)),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score" if by_accuracy else "eval_loss",
        greater_is_better=by_accuracy,
        report_to=check_report_to(settings.report_to),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=not (progress and sys.stderr.isatty()),
        prediction_loss_only=not job.accuracy,
        solver=settings.solver or job.solver,
        gradient=settings.gradient,
        restore_callback_states_from_checkpoint=True,
    )


def clear(output: Path) -> None:
    """Remove what only the run needed."""
    logs = output / "checkpoints" / "runs"  # of TensorBoard
    if logs.is_dir():
        shutil.move(logs, output / "runs")
    (output / RUN_FILE).unlink(missing_ok=True)
    (output / _LOCK).unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


RUN_FILE = "begun.json"
"""In the folder of a run that has not ended: what it is."""
_CURVE_KEYS = ("step", "eval_loss", "eval_accuracy")


def require_free(output: Path, resume: bool = False) -> None:
    """Refuse an output folder that holds something else than a run to resume.

    Raises:
        UserError: a file, a finished model, files of others that would be replaced, or a run that
            was cut off and is not to be resumed.
    """
    # A run without a checkpoint (its data were refused, say) may simply begin anew.
    is_begun = (output / RUN_FILE).is_file()
    has_checkpoint = any(output.glob("checkpoints/checkpoint-*"))
    if output.is_file() or ((output / "config.json").is_file() and not is_begun):
        raise UserError(f"{output} already holds a model or is a file; choose another --output")
    if not is_begun:
        names = ("README.md", "run.json", "evaluation", "checkpoints")
        require_unclaimed(output, names, "finetune")
    if is_begun and has_checkpoint and not resume:
        raise UserError(f"{output} already holds a run; add --resume to go on, or remove it")


class _Resumable(TrainerCallback):
    """Tells varied data their epoch, and marks checkpoints that were written to their end."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate calls `set_epoch` of a data set, but not in an epoch that is resumed.
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(int(state.epoch + 1e-6))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _checkpoint_to_resume(output: Path, job: Job, settings: Settings, resume: bool) -> str | None:
    """The last sound checkpoint of the same run, if it was cut off and is to go on.

    Raises:
        UserError: the folder holds the checkpoints of another run, or damaged ones only.
    """
    run_file = output / RUN_FILE
    model = job.model.config._name_or_path
    data = {"data": job.record, "fingerprints": job.fingerprints}
    current_run = {"model": model, "settings": asdict(settings), **data}
    last = latest_checkpoint(output / "checkpoints") if resume else None
    if last is not None:
        if differences(read_json(run_file), current_run):
            raise UserError(
                f"{output} holds a run of another model, or with other data or settings; remove it "
                "or choose another --output"
            )
        print(f"going on from {last}", file=sys.stderr)
    replace_text(run_file, json.dumps(current_run))
    return last


def _is_over(trainer: DEQTrainer, last: Path, total: int) -> bool:
    """Whether a run was cut off after its last step; if so, load its best weights."""
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    stop_state = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    if state.global_step < total and stop_state["early_stopping_patience_counter"] < _PATIENCE:
        return False
    trainer.state = state
    best = last.parent / Path(state.best_model_checkpoint or last).name
    trainer.model.load_state_dict(load_file(best / "model.safetensors"), strict=False)
    return True


def _freeze(job: Job, part: str) -> None:
    if part in ("norms", "backbone"):
        freeze_batch_norm(job.model)
    if part == "backbone":
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

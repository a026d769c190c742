"""From a recipe to a folder with weights, log and record."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from deqzoo.errors import UserError, one_line
from deqzoo.files import mark_complete, replace_text, replacing, require_unclaimed, restore
from deqzoo.models.auto import DEQModel
from deqzoo.models.coarse import has_fast_bfloat16
from deqzoo.recipe import Recipe, recorded_recipe, seconds_of
from deqzoo.tasks import build_task
from deqzoo.tasks.base import Plan, Task
from deqzoo.training.arguments import check_report_to
from deqzoo.training.callbacks import (
    AverageCallback,
    CheckpointClock,
    Divergence,
    EvaluationClock,
    MetricsFile,
    Snapshots,
    StopFile,
)
from deqzoo.training.checkpoints import (
    conditions,
    differences,
    keep_newest,
    latest_checkpoint,
)
from deqzoo.training.lock import lock
from deqzoo.training.optimizers import build_optimizer, build_schedule
from deqzoo.training.timed import TimedRun
from deqzoo.training.trainer import RecipeTrainer, knows_start
from deqzoo.zoo import read_json


def run_recipe(
    recipe: Recipe,
    data: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
    max_steps: int | None = None,
    deadline: float | None = None,
    accept_changes: bool = False,
) -> Path:
    """Train a recipe; a run that was cut off at any moment goes on with `resume`.

    The folder receives `checkpoints/` (to resume), `metrics.jsonl` (every log line), `snapshots/`
    (half-precision weights along the way), `model/` (the result so far: weights in half precision,
    config, processor) and `record.json` (recipe, versions, seed, data fingerprints, wall time,
    FLOPs, peak memory).

    Args:
        recipe: what to do.
        data: local folder of the data set; None fetches it from the Hub.
        out: folder of the run.
        resume: go on from the last complete checkpoint, or start if there is none.
        progress: show a progress bar.
        max_steps: stop early after so many optimiser steps, with a checkpoint; a run that has made
            them is left as it is.
        deadline: seconds after which a run with a `time_budget` has written everything.
        accept_changes: go on although the recipe, the data, the precision or the number of threads
            are others than before; the record names each such change.

    Returns:
        The folder with the model.

    Raises:
        UserError: the folder holds another run or one under other conditions, all its checkpoints
            are damaged, or data or settings do not fit.
    """
    out = Path(out)
    end = None if deadline is None else time.monotonic() + deadline
    # The first process holds the folder for all of a launch.
    with lock(out) if _is_first_process() else contextlib.nullcontext():
        if _is_first_process():
            _claim(out, recipe, resume, accept_changes)
        last = latest_checkpoint(out / "checkpoints") if resume else None
        n_steps = int(_recorded_number(out, "steps"))
        if last is not None and max_steps is not None and n_steps >= max_steps:
            if _is_first_process():
                print(
                    f"{out} has made {n_steps} steps already; nothing to do up to step {max_steps}"
                )
            return out / "model"
        task, model, parent_record = _begin(recipe, data, out, last)
        if recipe.time_budget:
            seconds = seconds_of(recipe.time_budget, "time_budget")
            seconds_left = None if end is None else end - time.monotonic()
            bf16 = use_bf16(recipe)
            run = TimedRun(
                recipe, task, model, out, seconds, seconds_left, bf16, progress, max_steps
            )
            run.history.inherit(parent_record)
            _train_timed(run, out, last, accept_changes)
        else:
            trainer = _trainer(recipe, task, model, out, progress, max_steps)
            trainer.history.inherit(parent_record)
            _train(trainer, out, last, accept_changes)
        return out / "model"


def _begin(
    recipe: Recipe, data: str | os.PathLike[str] | None, out: Path, last: str | None
) -> tuple[Task, Any, dict[str, Any]]:
    """Task and fresh model of a recipe, and the record of the run that its weights come from."""
    set_seed(recipe.seed)
    torch.set_flush_denormal(True)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.batch_size % processes:
        raise UserError(f"batch_size {recipe.batch_size} is no multiple of {processes} processes")
    task = build_task(recipe, data)
    set_seed(recipe.seed)
    model: Any = task.model()
    parent_record = {}
    if recipe.model.start and not (last and (recipe.time_budget or knows_start(last))):
        parent_record = start_from(model, recipe.model.start, out.parent)
    if recipe.channels_last and any(p.ndim == 4 for p in model.parameters()):
        model = model.to(memory_format=torch.channels_last)
    if processes > 1 and torch.cuda.is_available():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return task, model, parent_record


def _train(trainer: RecipeTrainer, out: Path, last: str | None, accept_changes: bool) -> None:
    """Train by epochs, on one device or several."""
    keeper = Keeper(trainer, out)
    trainer.add_callback(keeper)
    if last is not None:
        trainer.restore(last, accept_changes)
    _cut_metrics(out / "metrics.jsonl", 0 if last is None else int(last.rsplit("-", 1)[1]))
    trainer.train(resume_from_checkpoint=last)
    keeper.keep()


def _train_timed(run: TimedRun, out: Path, last: str | None, accept_changes: bool) -> None:
    """Train by the clock, on one device."""
    run_conditions = conditions(run.recipe, run.task, run.bf16, run.device)
    if last is not None:
        state = torch.load(Path(last) / "run.pt", weights_only=True)
        run.history.resume(last, state, run_conditions, accept_changes)
        try:
            run.load_state_dict(state)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise UserError(
                f"{last} has weights of other sizes than the data ask for: {one_line(error, 120)}"
            ) from error
    _cut_metrics(out / "metrics.jsonl", run.count)
    keeper = Keeper(run, out)

    def keep() -> None:
        folder = out / "checkpoints" / f"checkpoint-{run.count}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {**run.state_dict(), **run.history.state_dict(run_conditions)}, folder / "run.pt"
        )
        mark_complete(folder)
        keep_newest(folder.parent)
        keeper.keep()

    run.train(keep)


@torch.no_grad()
def start_from(model: PreTrainedModel, name: str, runs: Path) -> dict[str, Any]:
    """Copy the weights of a trained checkpoint into a fresh model.

    Args:
        model: the recipe's.
        name: zoo name, local folder or repository; `runs/NAME/model` is the result of the run
            NAME.
        runs: folder in which `runs/NAME` is.

    Returns:
        The record of the checkpoint's own run, empty if there is none beside it.

    Raises:
        UserError: no such checkpoint, one of another architecture, or a run that is not finished.
    """
    path = Path(name)
    if path.name == "model":
        if path.parts[:-2] == ("runs",):
            path = runs / path.parts[1] / "model"
        restore(path)
        if not path.is_dir():
            raise UserError(
                f"model.start: there is no {path}; train {path.parent.name} first, into "
                f"{path.parent}"
            )
        record = path.parent / "record.json"
        if record.is_file() and not read_json(record).get("finished", True):
            raise UserError(
                f"model.start: the run in {path.parent} is not finished; go on with it first"
            )
        name = str(path)
    trained_model = DEQModel.from_pretrained(name)
    trained_weights, own_weights = trained_model.state_dict(), model.state_dict()
    if {k: v.shape for k, v in trained_weights.items()} != {
        k: v.shape for k, v in own_weights.items()
    }:
        raise UserError(f"model.start: the weights of {name} do not fit the recipe's model")
    model.load_state_dict(trained_weights)
    folder = Path(trained_model.config._name_or_path)
    for record in (folder / "training.json", folder.parent / "record.json"):
        if record.is_file():
            return read_json(record)
    return {}


class Keeper(TrainerCallback):
    """Leaves usable weights and an up-to-date record whenever a checkpoint is written."""

    def __init__(self, run: RecipeTrainer | TimedRun, out: Path) -> None:
        self.run = run
        self.out = out
        self.past_seconds = _recorded_number(out, "seconds")
        self.start = time.monotonic()  # a clock that nobody sets

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.keep()

    def keep(self) -> None:
        if _is_first_process():
            save_result(self.run, self.out)
            _record(self.out, self.run, self.past_seconds + time.monotonic() - self.start)


def _is_first_process() -> bool:
    """Whether this is the only process of a launch, or torchrun's rank 0."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True  # whatever RANK an earlier launch left behind
    return int(os.environ.get("RANK", "0")) == 0


def _cut_metrics(path: Path, step: int) -> None:
    """Drop log lines after the checkpoint that a run goes on from, and one that a kill cut off."""
    if not _is_first_process() or not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                lines.append(line)
    replace_text(path, "".join(lines))


def _trainer(
    recipe: Recipe, task: Task, model: Any, out: Path, progress: bool, max_steps: int | None
) -> RecipeTrainer:
    plan, cuda = Plan.of(recipe, task), torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=plan.total,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.accumulate,
        max_grad_norm=recipe.optimizer.clip,
        seed=recipe.seed,
        bf16=use_bf16(recipe),
        use_cpu=not cuda,
        logging_steps=20,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=check_report_to(recipe.report_to),
        remove_unused_columns=False,
        disable_tqdm=not (progress and sys.stderr.isatty()),
        dataloader_num_workers=0,
        ddp_find_unused_parameters=False,
    )
    optimizer = build_optimizer(model, recipe.optimizer)
    schedule = build_schedule(optimizer, recipe.schedule, plan.total)
    trainer = RecipeTrainer(
        task=task,
        plan=plan,
        recipe=recipe,
        out=out,
        model=model,
        args=arguments,
        train_dataset=range(plan.total),
        optimizers=(optimizer, schedule),
    )
    if not progress:  # what the log says stands in metrics.jsonl
        trainer.remove_callback(PrinterCallback)
    model.use_fixed_steps()
    if recipe.compile:
        model.compile_map(True)
    elif hasattr(model, "use_native_norm") and not cuda:
        model.use_native_norm()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    for callback in (
        Divergence(),
        AverageCallback(trainer),
        CheckpointClock(trainer, recipe.checkpoint_minutes),
        EvaluationClock(trainer, recipe.evaluation.per_epoch),
        Snapshots(trainer, recipe.evaluation.snapshots),
        MetricsFile(out / "metrics.jsonl"),
        StopFile(out, max_steps),
    ):
        trainer.add_callback(callback)
    return trainer


def leave_process_group() -> None:
    """Part from the other processes of a launch together; one that just exits may abort them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def use_bf16(recipe: Recipe) -> bool:
    """Whether to compute in bf16: where asked for, or ("auto") where that is the faster."""
    if recipe.precision != "auto":
        return recipe.precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return has_fast_bfloat16()


def save_result(run: RecipeTrainer | TimedRun, out: Path) -> None:
    """Write the weights of a run so far as a `from_pretrained` folder."""
    with replacing(out / "model") as fresh:
        export(run.history.result(run.averaged()), fresh)
        run.task.save_processor(str(fresh))


def export(model: PreTrainedModel, folder: Path) -> None:
    """Save half-precision weights in shards of at most 16 MB whose config says float32.

    Weights with a norm bound stay as they are: rounded they would no longer meet it.
    """
    if hasattr(model, "project_"):
        model.save_pretrained(folder, max_shard_size="16MB")
        return
    # Halves of tied weights would no longer share memory, and be stored twice.
    tied_names = getattr(model, "all_tied_weights_keys", None) or {}
    state = {
        name: t.half() if t.is_floating_point() else t
        for name, t in model.state_dict().items()
        if name not in tied_names
    }
    model.save_pretrained(folder, state_dict=state, max_shard_size="16MB")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _claim(out: Path, recipe: Recipe, resume: bool, accept_changes: bool) -> None:
    """Take the run's folder, or refuse one that holds another run.

    A folder in which nothing was trained yet is free: its data were not found, say.
    """
    path = out / "recipe.json"
    if not path.exists():
        names = ("model", "checkpoints", "snapshots", "metrics.jsonl", "record.json")
        require_unclaimed(out, names, "a recipe")
    is_begun = (out / "metrics.jsonl").exists() or any(out.glob("checkpoints/checkpoint-*"))
    if path.exists() and is_begun:
        if not resume:
            raise UserError(f"{out} already holds a run; add --resume to go on, or remove it")
        stored_recipe = read_json(path)
        if not accept_changes and recorded_recipe({"recipe": stored_recipe}) != recipe:
            clauses = "; ".join(differences(stored_recipe, recipe.to_dict()))
            raise UserError(
                f"{out} holds a run of another recipe ({clauses}); choose another --output, or add "
                "--accept-changes to go on with it"
            )
    (out / "stop").unlink(missing_ok=True)
    replace_text(path, json.dumps(recipe.to_dict(), indent=2) + "\n")


def _recorded_number(out: Path, key: str) -> float:
    """A number of the record of a run so far; 0 where there is none yet."""
    try:
        return float(json.loads((out / "record.json").read_text())[key])
    except (OSError, ValueError, KeyError):
        return 0.0


def _record(out: Path, run: RecipeTrainer | TimedRun, seconds: float) -> None:
    """What a reader needs to judge or repeat the run."""
    history = run.history
    record = {
        "recipe": run.recipe.to_dict(),
        "data": run.task.describe(),
        **run.figures(),
        "seconds": round(seconds, 1),
        **peak_memory(),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        **({"changes": history.changes} if history.changes else {}),
        **({} if history.best is None else {"best": history.best.describe()}),
        "versions": versions(),
        "validation": history.earlier + _validation_curve(out / "metrics.jsonl"),
    }
    replace_text(out / "record.json", json.dumps(record, indent=2, default=str) + "\n")


def device_name() -> str:
    """What computes: the GPU's name, or the processor's architecture."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.machine()


def _validation_curve(path: Path) -> list[dict[str, float]]:
    """Validation figures of the run with the PFLOP spent until then."""
    if not path.exists():
        return []
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    keys = ("step", "pflop")
    return [
        {k.removeprefix("eval_"): v for k, v in e.items() if k in keys or k.startswith("eval_")}
        for e in entries
        if any(key.startswith("eval_") for key in e)
    ]


def peak_memory() -> dict[str, int]:
    """Largest memory of this process so far, and of its GPU where there is one."""
    peak = {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
    if torch.cuda.is_available():
        peak["gpu_peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peak


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    numbers = {"python": platform.python_version()}
    for name in ("deqzoo", "torch", "transformers", "torch_geometric"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers

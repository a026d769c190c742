"""Taking a finished run into the zoo: measured, checked to be an equilibrium, and sealed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from deqzoo.data.own import read_record
from deqzoo.errors import UserError, as_user_error
from deqzoo.evaluation.dispatch import evaluate_model
from deqzoo.evaluation.files import write_evaluation
from deqzoo.files import replacing, restore
from deqzoo.hub.integrity import write_checksums, write_golden
from deqzoo.models.auto import DEQModel
from deqzoo.recipe import check_name
from deqzoo.sealed import require_inside
from deqzoo.tasks.metrics import METRICS, words
from deqzoo.zoo import checkpoints_root, read_json

MAX_RESIDUAL = 5e-3
MAX_GAP = 0.003
"""Of shares their difference, of other figures such as perplexity the relative one."""
#: Share of the validation split whose equilibrium the default budget of steps must reach.
MIN_CONVERGED = 0.99
# Differences of accuracies such as 0.865 - 0.862 come out a little above their decimal value.
_ROUNDING = 1e-9


def store_run(
    run: Path,
    data: str | os.PathLike[str] | None,
    *,
    name: str | None = None,
    force: bool = False,
) -> Path:
    """Copy a run's model into `hub_configs`, with record, evaluation files, golden and checksums.

    The validation split decides whether it is an equilibrium model (`instabilities`); only then is
    the test split measured. Data of one's own with a single hold-out have no other.

    Args:
        run: folder of `deqzoo train`, or a model folder.
        data: local copy of the data set; its own repository if None.
        name: zoo name; the recipe's by default.
        force: replace a checkpoint of that name, store a run that is not finished, and a model
            that is no stable equilibrium.

    Returns:
        The new folder.

    Raises:
        UserError: no model in the run, a run that is not finished, no name or one that is taken, or
            an unstable equilibrium.
    """
    restore(run / "model")
    model_folder = run / "model" if (run / "model").is_dir() else run
    record = read_json(run / "record.json") if (run / "record.json").is_file() else {}
    if record and not record.get("finished") and not force:
        raise UserError(
            f"the run in {run} is not finished; go on with it, or store it as it is with --force"
        )
    name = name or record.get("recipe", {}).get("name") or run.resolve().name
    # Any other name would lead out of the zoo, and --force replaces what it leads to.
    with as_user_error("choose another --name", ValueError):
        check_name(name)
    target = checkpoints_root() / name
    if target.exists() and not force:
        raise UserError(f"{target} exists; add --force to replace it")
    require_inside(model_folder, deep=True)
    model = DEQModel.from_pretrained(model_folder)
    files = {}
    own_record = read_record(model_folder)
    has_validation = own_record is None or (
        bool(own_record.get("validation") or "validation" in own_record.get("stored", ()))
        and not own_record.get("one_hold_out")
    )
    for split in ("validation", "test") if has_validation else ("test",):
        content = evaluate_model(model, name, split=split, data=data)
        # A test figure that could refuse a model would be choosing among models. Data of one's own
        # may have one hold-out only.
        faults = instabilities(content) if split == "validation" or not has_validation else []
        if faults and not force:
            raise UserError(f"{run} is no stable equilibrium model: {'; '.join(faults)}")
        files[f"{content['data']['name']}-{split}.json"] = content
    target.parent.mkdir(exist_ok=True)
    with replacing(target) as fresh:
        shutil.copytree(model_folder, fresh)
        for file, content in files.items():
            old_file = target / "evaluation" / file
            write_evaluation(fresh / "evaluation" / file, content, old_file)
        if record:
            shutil.copyfile(run / "record.json", fresh / "training.json")
        write_golden(fresh, model)
        write_checksums(fresh)
    return target


def instabilities(evaluation: dict[str, Any]) -> list[str]:
    """Why an evaluated model is no stable equilibrium model, one line each.

    The default budget must reach the equilibrium of nearly every sample, with a small median
    relative residual, and more steps must not change the figure that the evaluation is known by.
    What was not measured is a fault too.
    """
    faults = []
    residual = evaluation["results"].get("residual_median")
    if residual is None:
        faults.append("the median relative residual was not measured")
    elif not residual <= MAX_RESIDUAL:
        faults.append(f"median relative residual {residual:.1e} is above {MAX_RESIDUAL:.0e}")
    share = evaluation["results"].get("converged_share")
    if share is not None and share < MIN_CONVERGED:
        faults.append(
            f"{share:.1%} of the samples converge within the default budget, and not "
            f"{MIN_CONVERGED:.0%}: raise max_steps of the solver in its config.json, or train on"
        )
    budget, name = evaluation.get("budget"), evaluation["metric"]
    if not budget:
        return [*faults, f"{words(name)} after more solver steps was not measured"]
    last = budget["steps"][-1]
    gap = METRICS[name].distance(last[name], budget["default"])
    if not gap <= MAX_GAP + _ROUNDING:
        faults.append(
            f"{words(name)} after {last['max_steps']} steps differs by {gap:.2%} from the default's"
        )
    return faults

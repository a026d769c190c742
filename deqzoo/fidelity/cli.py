"""The command that holds gradient modes against the exact gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deqzoo.errors import as_user_error
from deqzoo.evaluation.options import ModelName
from deqzoo.files import replace_text, require_writable
from deqzoo.zoo import own_name

if TYPE_CHECKING:
    from deqzoo.fidelity.study import Row, Study

_DOUBTFUL_RESIDUAL = 1e-3  # residual above which the exact gradient is not trusted
_FILES = ("gradients.json", "gradients.svg")
_SHOWN_STEPS = (1, 2, 3, 5, 10, 20)
_SHOWN_DAMPINGS = (0.5, 0.8, 1.0)


def gradients(
    name: ModelName,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Local copy of its data set; else a stand-in batch."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures, segments or graphs.")
    ] = None,
    cosine: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="What the recommended setting must reach.")
    ] = 0.95,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Time allowed; what does not fit is left out.")
    ] = 150.0,
    seed: Annotated[int, typer.Option(help="Chooses the batch.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for gradients.json and gradients.svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how right and how costly each gradient mode is for a model."""
    from tqdm import tqdm

    import deqzoo
    from deqzoo.evaluation.files import describe_environment, describe_model, finite
    from deqzoo.fidelity.batches import make_batch
    from deqzoo.fidelity.study import study

    if output is not None:
        for file in _FILES:
            require_writable(output / file)
    model = deqzoo.DEQModel.from_pretrained(name)
    batch, batch_description = make_batch(model, data, split=split, size=batch_size, seed=seed)
    bar = tqdm(desc="settings", disable=True if as_json else None)
    with bar:
        result = study(model, batch, seconds=seconds, on_row=lambda _: bar.update())
    best = result.recommendation(cosine)
    content = finite(
        {
            "format": 1,
            "model": describe_model(model, own_name(name)),
            "batch": batch_description,
            **result.to_dict(),
            "threshold": cosine,
            "recommendation": None if best is None else best.gradient,
            "environment": describe_environment(model),
        }
    )
    if output is not None:
        _write(output, content, plot(result, own_name(name)))
    if as_json:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    typer.echo(report(result, content, cosine))
    if output is not None:
        typer.echo("written to " + " and ".join(str(output / file) for file in _FILES))


def _write(folder: Path, content: dict[str, Any], drawing: str) -> None:
    with as_user_error(f"cannot write to {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        for file, content_of_file in zip(_FILES, (text + "\n", drawing), strict=True):
            replace_text(folder / file, content_of_file)


def report(study: Study, content: dict[str, Any], threshold: float) -> str:
    """The table, and the recommendation that follows from it."""
    from deqzoo.fidelity.study import describe

    radii = study.spectral_radius
    lines = [
        f"batch       {content['batch']}",
        f"solve       {study.solve['steps_mean']:.1f} steps, relative residual at most "
        f"{study.solve['residual_max']:.1e}, {study.solve['seconds']:.2f} s",
        "radius      ρ(∂F/∂h) at the solution: "
        + (f"{min(radii):.3f} to {max(radii):.3f}" if radii else "left out for time"),
        "",
        *_table(study),
        "",
    ]
    if max(study.exact_residuals) > _DOUBTFUL_RESIDUAL:
        forward, adjoint = study.exact_residuals
        lines.append(
            f"The exact gradient is itself uncertain: relative residuals {forward:.1e} of the "
            f"equilibrium, {adjoint:.1e} of the adjoint."
        )
    if study.missing:
        lines.append(f"{study.missing} settings were left out for time (--seconds).")
    best = study.recommendation(threshold)
    if best is None:
        lines.append(f"No timed setting reaches a cosine of {threshold:g}.")
    else:
        lines.append(
            f"Recommended: {describe(best.gradient)}, the cheapest with a cosine of at least "
            f"{threshold:g} ({best.agreement:.3f} in {best.seconds:.2f} s{_speedup(study, best)})."
        )
    return "\n".join(lines)


def _speedup(study: Study, best: Row) -> str:
    implicit = [r for r in study.rows if r.gradient["name"] == "implicit" and r.agreement > 0.999]
    cheapest = min((r.seconds for r in implicit if r.seconds), default=None)
    if not cheapest or not best.seconds or best.gradient["name"] == "implicit":
        return ""
    return f", {cheapest / best.seconds:.1f} times as fast as the implicit gradient"


def _table(study: Study) -> list[str]:
    from deqzoo.fidelity.study import EQUILIBRIUM, describe

    rows = [row for row in study.rows if _is_shown(row.gradient)]
    groups = [g for g in rows[0].cosine if g not in ("all", EQUILIBRIUM)] if rows else []
    head = f"{'gradient':<28}{'cosine':>8}{'error':>9}"
    head += "".join(f"{g[:14]:>16}" for g in groups)
    lines = [head + f"{'seconds':>9}{'saved MiB':>11}{'peak MiB':>10}"]
    for row in rows:
        error = row.relative_error.get(EQUILIBRIUM, row.relative_error["all"])
        line = f"{describe(row.gradient):<28}{row.agreement:>8.4f}{error:>9.3g}"
        line += "".join(f"{row.cosine[g]:>16.4f}" for g in groups)
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        sizes = (
            "" if size is None else f"{size / 2**20:.1f}"
            for size in (row.saved_bytes, row.peak_bytes)
        )
        lines.append(line + "{:>9}{:>11}{:>10}".format(seconds, *sizes))
    lines.append("cosine and error: over the parameters behind the equilibrium; then by group")
    return lines


def _is_shown(gradient: dict[str, Any]) -> bool:
    if gradient["name"] not in ("upg", "npg"):
        return True
    return gradient["steps"] in _SHOWN_STEPS and gradient["damping"] in _SHOWN_DAMPINGS


def plot(study: Study, name: str) -> str:
    """Cosine against k, a line for each λ."""
    from deqzoo.evaluation.chart import line_chart

    series: dict[str, list[tuple[float, float]]] = {}
    for mode in ("npg", "upg"):
        for row in study.rows:
            g = row.gradient
            if g["name"] == mode and (mode == "npg" or g["damping"] in (0.5, 1.0)):
                key = f"{mode} λ={g['damping']:g}"
                series.setdefault(key, []).append((g["steps"], row.agreement))
    lowest = min((y for points in series.values() for _, y in points), default=0.0)
    return line_chart(
        series,
        title=f"Phantom against exact gradient, {name}",
        x_label="k",
        y_label="cosine",
        y_range=(max(-1.0, min(lowest, 0.9)), 1.0),
    )

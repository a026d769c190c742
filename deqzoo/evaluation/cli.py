"""The commands that classify pictures and score texts of a user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import deqzoo.zoo
from deqzoo.errors import UserError
from deqzoo.evaluation.options import (
    AsJson,
    Inputs,
    MaxSteps,
    SolverName,
    Tolerance,
    Trace,
    Waiting,
    complete_model,
    recorded_traces,
    show_json,
    solver_settings,
)

PICTURES_AT_ONCE = 32


def classify(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Picture files, folders of them, or - for standard input.", show_default=False
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Image model.", autocompletion=complete_model)
    ] = deqzoo.zoo.DEFAULT_IMAGE_MODEL,
    top_k: Annotated[int, typer.Option(min=1, help="Labels per picture.")] = 5,
    solver: SolverName = None,
    max_steps: MaxSteps = None,
    tol: Tolerance = None,
    trace: Trace = None,
    as_json: AsJson = False,
) -> None:
    """Name what pictures show."""
    with Waiting("loading PyTorch and transformers ..."):
        from deqzoo.data.pictures import picture_files, read_picture
        from deqzoo.evaluation.classify import classify as classify_pictures
        from deqzoo.models.readers import load_processor

    inputs = Inputs(trace, as_json)
    files = inputs.files(images, picture_files)
    classifier = None
    for start in range(0, len(files), PICTURES_AT_ONCE):
        pictures = []
        for file in files[start : start + PICTURES_AT_ONCE]:
            with inputs.one():
                pictures.append((str(file), read_picture(file)))
        if not pictures:
            continue
        if classifier is None:  # mistakes in files are reported without waiting for the model
            with Waiting(f"loading {model} ..."):
                classifier = deqzoo.DEQModel.from_pretrained(model)
                processor = load_processor(classifier)
            settings = solver_settings(classifier, solver, max_steps, tol)
        with recorded_traces(classifier, trace is not None) as traces:
            results = classify_pictures(
                classifier,
                [p for _, p in pictures],
                top_k=top_k,
                processor=processor,
                solver=settings,
            )
        for row, ((name, _), result) in enumerate(zip(pictures, results, strict=True)):
            _show_classification(name, result, as_json)
            if traces:
                inputs.curves[name] = traces[0][row, : result.n_steps].tolist()
    inputs.end()


def _show_classification(name: str, result: Any, as_json: bool) -> None:
    if as_json:
        return show_json({"file": name, **result.to_dict()})
    typer.echo(name)
    for label, probability in result.labels:
        typer.echo(f"  {label:<20} {probability:6.1%}")
    if not result.labels:
        typer.echo("  no answer: its state was never finite")
    state = "converged" if result.converged else "not converged"
    report = f"{result.n_steps} steps, relative residual {result.residual:.1e}, {state}"
    typer.echo(f"  equilibrium: {report}")


def perplexity(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Texts (.txt, .jsonl, .parquet, .gz), folders, or - for standard input."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Language model; the best bundled WikiText-2 one by default.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the texts in .jsonl and .parquet files.")
    ] = None,
    pretokenized: Annotated[
        bool, typer.Option("--pretokenized", help="One corpus row per line, no preparation.")
    ] = False,
    surprisal: Annotated[
        bool, typer.Option("--surprisal", help="Also print every token's surprisal in nats.")
    ] = False,
    solver: SolverName = None,
    max_steps: MaxSteps = None,
    tol: Tolerance = None,
    trace: Trace = None,
    as_json: AsJson = False,
) -> None:
    """Say how well a language model predicts texts."""
    with Waiting("loading PyTorch and transformers ..."):
        from deqzoo.data.lines import require_table, text_files

    inputs = Inputs(trace, as_json)
    texts = inputs.files(files, text_files)
    if not texts:
        inputs.end()
    require_table(texts, column)
    name = model or default_text_model()
    with Waiting(f"loading {name} ..."):
        text_model = deqzoo.DEQModel.from_pretrained(name)
    if text_model.config.model_type != "deq_transformer" or not hasattr(text_model, "lm_head"):
        raise UserError(f"{name} is no language model; name one with --model")
    settings = solver_settings(text_model, solver, max_steps, tol)
    for text in texts:
        with inputs.one(), recorded_traces(text_model, trace is not None) as traces:
            report = _score(text_model, text, column, pretokenized, surprisal, settings)
            _show_perplexity(name, str(text), report, len(texts) > 1, as_json)
            if traces:  # the median over the first segment's tokens
                inputs.curves[str(text)] = traces[0].flatten(0, -2).nanmedian(0).values.tolist()
    inputs.end()


def _score(
    model: Any,
    file: str | Path,
    column: str | None,
    pretokenized: bool,
    surprisal: bool,
    solver: dict[str, Any] | None,
) -> Any:
    from deqzoo.data import lines
    from deqzoo.evaluation import perplexity as scoring
    from deqzoo.models.readers import load_tokenizer

    if str(file) != "-" and lines.holds_records(Path(file)):
        column = lines.text_column(Path(file), column)
        print(f"{file}: reading the column {column!r}", file=sys.stderr)
    with _progress(str(file)) as bar:
        return scoring.perplexity(
            model,
            lines.read_lines(file, column),
            load_tokenizer(model),
            pretokenized=pretokenized,
            keep_surprisal=surprisal,
            solver=solver,
            on_line=lambda line: bar.update(len(line.encode())),
        )


def _show_perplexity(name: str, file: str, report: Any, several: bool, as_json: bool) -> None:
    if as_json:
        return show_json({"file": file, "model": name, **report.to_dict()})
    for word, nats in report.surprisal:
        typer.echo(f"{nats:8.3f}  {word}")
    typer.echo((f"{file}\n" if several else "") + _summary(name, report))


def _progress(file: str) -> Any:
    """A bar over the bytes of a file, on a terminal only."""
    from tqdm import tqdm

    suffix = Path(file).suffix.lower()
    has_size = suffix not in ("", ".parquet", ".gz", ".bz2", ".xz") and file != "-"
    total = Path(file).expanduser().stat().st_size if has_size else None
    return tqdm(total=total, unit="B", unit_scale=True, disable=None)


def _summary(name: str, report: Any) -> str:
    """The figures in words."""
    figures = report.to_dict()
    lines = [
        f"perplexity          {figures['perplexity']:.2f} per token ({name})",
        f"bits per character  {figures['bits_per_character']:.3f}",
        f"tokens              {figures['tokens']:,} (an <eos> per line included), "
        f"{figures['unknown_share']:.1%} of them <unk>",
        f"equilibrium         {figures['n_steps_mean']:.1f} steps per token on average, "
        f"{figures['n_steps_max']} at most",
        f"not converged       {figures['unconverged_tokens']:,} tokens "
        f"({figures['unconverged_share']:.1%}), largest residual {figures['residual_max']:.1e}",
    ]
    return "\n".join(lines)


def default_text_model() -> str:
    """The bundled WikiText-2 model with the lowest test perplexity.

    Raises:
        UserError: none is bundled.
    """
    from deqzoo.hub.catalogue import best_first, entries

    texts = [e for e in entries() if e.config.get("model_type") == "deq_transformer"]
    ranking = best_first((e for e in texts if "wikitext2" in e.name), "perplexity")
    if not ranking:
        raise UserError("no language model is bundled; name one with --model")
    return ranking[0].name

"""Commands that measure what a user brings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deqzoo.errors import UserError


def add_commands(app: typer.Typer) -> None:
    """Add this room's commands to the command line."""
    app.command(rich_help_panel="Use models")(perplexity)


def perplexity(
    file: Annotated[str, typer.Argument(help="Text or .parquet file, or - for standard input.")],
    model: Annotated[
        str | None, typer.Option(help="Language model; the best bundled WikiText-2 one by default.")
    ] = None,
    pretokenized: Annotated[
        bool, typer.Option("--pretokenized", help="One corpus row per line, no preparation.")
    ] = False,
    surprisal: Annotated[
        bool, typer.Option("--surprisal", help="Also print every token's surprisal in nats.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how well a language model predicts a text."""
    import deqzoo
    from deqzoo.evaluation import perplexity as scoring
    from deqzoo.evaluation.files import finite
    from deqzoo.evaluation.text import load_tokenizer

    if file != "-" and not Path(file).is_file():
        raise UserError(
            f"{file} is a folder, not a file" if Path(file).is_dir() else f"no file {file}"
        )
    name = model or default_text_model()
    loaded = deqzoo.DEQModel.from_pretrained(name)
    if loaded.config.model_type != "deq_transformer" or not hasattr(loaded, "lm_head"):
        raise UserError(f"{name} is no language model; name one with --model")
    bar = _progress(file)
    report = scoring.perplexity(
        loaded,
        scoring.read_lines(file),
        load_tokenizer(loaded),
        # The rows of a corpus file are words already.
        pretokenized=pretokenized or file.endswith(".parquet"),
        keep_surprisal=surprisal,
        on_line=lambda line: bar.update(len(line.encode())),
    )
    bar.close()
    if as_json:
        typer.echo(json.dumps(finite({"model": name, **report.to_dict()}), ensure_ascii=False))
        return
    for word, nats in report.surprisal:
        typer.echo(f"{nats:8.3f}  {word}")
    typer.echo(_summary(name, report))


def _progress(file: str) -> Any:
    """A bar over the bytes of a file, on a terminal only."""
    from tqdm import tqdm

    counted = file != "-" and not file.endswith(".parquet")
    total = Path(file).stat().st_size if counted else None
    return tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


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
    found = best_first((e for e in texts if "wikitext2" in e.name), "perplexity")
    if not found:
        raise UserError("no language model is bundled; name one with --model")
    return found[0].name

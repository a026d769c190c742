"""The command that trains a model on data of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deqzoo.errors import UserError
from deqzoo.evaluation.options import ModelName


def finetune(
    model: ModelName,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Pictures: a folder per class, .zip, .parquet, .csv of paths and labels. Texts: a "
            "file or folder (.txt, .jsonl, .parquet). Graphs: a folder in TUDataset's format, or a "
            ".pt list of PyG Data.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder of the new model.")],
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the data; else 3, or what makes 200 steps (graphs: 800)."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    solver: Annotated[str | None, typer.Option(help="Solver of training steps.")] = None,
    gradient: Annotated[str | None, typer.Option(help="Gradient: upg, npg, jfb, ...")] = None,
    freeze: Annotated[
        str, typer.Option(help="none; norms: statistics stay; backbone: last layers learn.")
    ] = "norms",
    tokenizer: Annotated[
        str, typer.Option(help="Of texts: keep the model's, extend it by new words, or build one.")
    ] = "keep",
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels in a table of pictures.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the texts in .jsonl and .parquet files.")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            help="Share kept to be measured; half as much chooses the weights. Of texts, half of "
            "it is measured, and half chooses."
        ),
    ] = 0.2,
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Crop and mirror pictures at random.")
    ] = True,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps at most.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of hold-out, new weights and order.")
    ] = 0,
    report_to: Annotated[
        str, typer.Option(help="tensorboard, wandb, trackio, ... or none; several by commas.")
    ] = "none",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was cut off.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no log lines.")] = False,
) -> None:
    """Train a model of the zoo further on pictures, texts or graphs of your own."""
    from deqzoo.tasks.finetuning import Settings, warnings_of
    from deqzoo.training.finetune import clear, prepare, require_free, train

    if str(data) == "-":
        raise UserError("finetune reads the data again to measure the model: save them to a file")
    is_unmeasured = (output / "run.json").is_file() and not (output / "README.md").is_file()
    if resume and is_unmeasured:  # cut off when it was trained already
        clear(output)
    else:
        require_free(output, resume)
        settings = Settings(
            epochs=epochs, batch_size=batch_size, lr=lr, solver=solver, gradient=gradient,
            freeze=freeze, seed=seed, report_to=tuple(report_to.split(",")), held_out=held_out,
            max_steps=max_steps, augment=augment, tokenizer=tokenizer, label_column=label_column,
            column=column,
        )  # fmt: skip
        job = prepare(model, data, settings)
        for line in warnings_of(job):
            print(line, file=sys.stderr)
        train(job, output, settings, resume=resume, progress=not quiet)
    typer.echo(f"{finish(output, data)}; model, card and evaluation in {output}")


def finish(folder: Path, data: Path) -> str:
    """Measure a trained model on its test part, seal it and write its card; the main figure."""
    import deqzoo
    from deqzoo.evaluation.dispatch import evaluate_model
    from deqzoo.evaluation.files import write_evaluation
    from deqzoo.hub.cards import render_card
    from deqzoo.hub.catalogue import entry, main_figure
    from deqzoo.hub.integrity import write_checksums, write_golden
    from deqzoo.zoo import own_name

    model = deqzoo.DEQModel.from_pretrained(folder)
    content = evaluate_model(
        model, own_name(folder), split="test", data=data, budget_samples=0, progress=False
    )
    write_evaluation(folder / "evaluation" / f"{content['data']['name']}-test.json", content)
    write_golden(folder, model)
    write_checksums(folder)
    card = render_card(entry(str(folder)), str(folder))  # until it is published, it is there
    (folder / "README.md").write_text(card, encoding="utf-8")
    return main_figure(content) or "trained"

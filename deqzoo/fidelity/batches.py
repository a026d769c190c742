"""Batches with labels on which gradients of a model are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqzoo.data.pictures import read_picture
from deqzoo.errors import UserError
from deqzoo.models.mdeq.image_processing_mdeq import to_rgb
from deqzoo.zoo import checkpoints_root


def make_batch(
    model: Any,
    data: Path | None = None,
    *,
    split: str = "train",
    size: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], str]:
    """Keyword arguments with labels for a model of any family, and what they are.

    Args:
        model: loaded from a folder.
        data: local copy of the data set the model was made for; stand-ins if None.
        split: of that data set.
        size: pictures, sequences or graphs; a size that suits the family if None.
        seed: chooses them.

    Raises:
        UserError: the model has no head with a loss, or the data do not fit.
    """
    makers = {"mdeq": _pictures, "deq_transformer": _tokens, "ignn": _graphs}
    if "For" not in type(model).__name__ or model.config.model_type not in makers:
        raise UserError(f"{type(model).__name__} has no loss whose gradient could be compared")
    generator = torch.Generator().manual_seed(seed)
    return makers[model.config.model_type](model, data, split, size, generator)


def part(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Some pictures or sequences of a batch, with their memories; graphs stay together."""
    if "x" in batch:
        return dict(batch)
    subset = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            subset[name] = value[rows]
        elif isinstance(value, tuple):
            subset[name] = tuple(tensor[rows] for tensor in value)
    return subset


def _pictures(
    model: Any,
    data: Path | None,
    split: str,
    size: int | None,
    generator: torch.Generator,
) -> tuple[dict[str, Any], str]:
    size = size or 8
    if data is not None:
        from deqzoo.evaluation.images import pictures_of
        from deqzoo.models.readers import load_processor, to_batch

        pictures: Any = pictures_of(model, split, data)
        rows = torch.randperm(len(pictures), generator=generator)[:size]
        images = [pictures.picture(row) for row in rows.tolist()]
        pixels = to_batch(load_processor(model), images, model)
        description = f"{len(rows)} pictures of the {split} split"
        return {"pixel_values": pixels, "labels": pictures.labels[rows]}, description
    labels = torch.randint(model.config.num_labels, (size,), generator=generator)
    n_channels = getattr(model.config, "num_channels", 3)
    crops = _example_crops(model, size, generator) if n_channels == 3 else None
    if crops is not None:
        return (
            {"pixel_values": crops, "labels": labels},
            f"{size} crops of the example pictures with random labels",
        )
    side = model.config.image_size
    pixels = torch.randn(size, n_channels, side, side, generator=generator)
    return (
        {"pixel_values": pixels, "labels": labels},
        f"{size} pictures of normalised noise with random labels",
    )


def _example_crops(model: Any, size: int, generator: torch.Generator) -> Tensor | None:
    """Random square parts of the repository's pictures, where both they and a processor exist."""
    from deqzoo.models.readers import load_processor, to_batch

    files = sorted((checkpoints_root().parent / "examples" / "pictures").glob("*.*"))
    files = [f for f in files if f.suffix in (".png", ".jpg")]
    if not files or not Path(model.config._name_or_path).is_dir():
        return None
    crops = []
    for number in range(size):
        upright = to_rgb(read_picture(files[number % len(files)]))
        side = min(upright.size) // 2
        left, top = (
            int(torch.randint(extent - side, (1,), generator=generator)) for extent in upright.size
        )
        crops.append(upright.crop((left, top, left + side, top + side)))
    try:
        return to_batch(load_processor(model), crops, model)
    except UserError:
        return None


def _tokens(
    model: Any,
    data: Path | None,
    split: str,
    size: int | None,
    generator: torch.Generator,
) -> tuple[dict[str, Any], str]:
    size, length, context = size or 4, model.config.tgt_len, model.config.mem_len
    total = context + length + 1
    if data is not None:
        from deqzoo.evaluation.text import corpus_of, corpus_stream
        from deqzoo.models.readers import load_tokenizer

        tokenizer = load_tokenizer(model)
        stream = corpus_stream(corpus_of(tokenizer), split, data, tokenizer)
        starts = torch.randint(len(stream) - total + 1, (size,), generator=generator)
        ids = torch.stack([stream[s : s + total] for s in starts.tolist()])
        description = f"{size} segments of {length} words of the {split} split"
    else:
        # Words by a power law, as in real text.
        rank = torch.rand(size, total, generator=generator)
        ids = (model.config.vocab_size**rank - 1).long()
        description = f"{size} segments of {length} random words"
    batch = {"input_ids": ids[:, context:-1], "labels": ids[:, context + 1 :], "shift": False}
    if context:
        # As in training, where all but the first segment have a memory.
        with torch.no_grad():
            memory = model(ids[:, :context], return_logits=False).memory
        batch["memory"] = tuple(memory)
        description += f" after {context} others"
    return {**batch, "return_logits": False}, description


def _graphs(
    model: Any,
    data: Path | None,
    split: str,
    size: int | None,
    generator: torch.Generator,
) -> tuple[dict[str, Any], str]:
    folder = Path(model.config._name_or_path)
    nodes = type(model).__name__.endswith("ForNodeClassification")
    if data is None:
        return _random_graphs(model, size or 16, nodes, generator)
    from deqzoo.tasks.graphs import read_fold

    if split not in ("train", "validation", "test"):
        raise UserError(f"unknown split {split!r}; choose from train, validation, test")
    if nodes:
        from deqzoo.tasks.nodes import NODE_SETS, node_parts

        name = read_fold(folder)["data"]
        part = node_parts(model.config, NODE_SETS[name].load(Path(data), split), split)[0]
        batch = {"x": part.graphs, "labels": part.labels, "mask": part.mask}
        return batch, f"the {split} nodes of a graph of {name}"
    from deqzoo.data.graphs import load_graph_set
    from deqzoo.evaluation.graphs import encoding_of

    fold = read_fold(folder)
    graphs = load_graph_set(fold["data"], data, encoding_of(model))
    order = torch.randperm(len(fold[split]), generator=generator)[: size or 16].tolist()
    numbers = [fold[split][i] for i in order]
    batch = {"x": graphs.batch(numbers), "labels": torch.as_tensor(graphs.labels)[numbers]}
    return batch, f"{len(numbers)} graphs of {fold['data']}"


def _random_graphs(
    model: Any, size: int, nodes: bool, generator: torch.Generator
) -> tuple[dict[str, Any], str]:
    """Rings of twelve nodes with random chords, features and labels."""
    n = 12
    ring = torch.arange(n)
    edges = []
    for graph in range(size):
        chords = torch.randint(n, (2, 6), generator=generator)
        pair = torch.cat([torch.stack([ring, ring.roll(1)]), chords[:, chords[0] != chords[1]]], 1)
        both = torch.unique(torch.cat([pair, pair.flip(0)], 1), dim=1)
        edges.append(both + graph * n)
    config = model.config
    count = size * n if nodes else size
    if config.problem_type == "multi_label_classification":
        labels = torch.randint(2, (count, config.num_labels), generator=generator).float()
    else:
        labels = torch.randint(config.num_labels, (count,), generator=generator)
    batch = {
        "x": torch.rand(size * n, config.num_features, generator=generator),
        "edge_index": torch.cat(edges, 1),
        "batch": torch.arange(size).repeat_interleave(n),
        "labels": labels,
    }
    return batch, f"{size} random graphs with random features and labels"

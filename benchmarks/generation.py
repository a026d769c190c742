"""Tokens per second of generation with the exact cache against recomputing the whole prefix.

    python benchmarks/generation.py --model deq-transformer-wikitext2-jr-upg --data WIKITEXT

Both ways solve to the same tolerance and choose the most likely next word. With the cache a new
token is one single-token solve; without it the solve runs over all tokens so far. Contexts are
evenly spaced passages of the test split (random words without `--data`); the table says how many of
them were solved to the tolerance in every token. Times are process CPU seconds, so that other
processes count little; the result goes to `benchmarks/results/generation-NAME.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from deqzoo import DEQModel
from deqzoo.evaluation.files import describe_model
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM

CONTEXTS = (128, 512, 1024)
RESULTS = Path(__file__).resolve().parent / "results"


def untrained_model(window: int) -> PreTrainedModel:
    """The WikiText-2 architecture with random weights that give it a well-behaved equilibrium."""
    torch.manual_seed(0)
    config = DEQTransformerConfig.from_preset(
        "deq-transformer-wikitext2", local_size=window, mem_len=window - 1
    )
    model = DEQTransformerForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "injection.weight" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def cached_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], ModelOutput]:
    """A function that appends one token to a cache that holds ``ids`` (1, n)."""
    cache = model(ids, use_cache=True, logits_to_keep=1).cache
    newest = ids[:, -1:]

    def step() -> ModelOutput:
        output = model(newest, cache=cache, logits_to_keep=1)
        newest.copy_(output.logits.argmax(-1))
        return output

    return step


def joint_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], ModelOutput]:
    """A function that solves ``ids`` (1, n) as a whole for the next word."""
    return lambda: model(ids, logits_to_keep=1)


def measure(step: Callable[[], ModelOutput], repeats: int) -> tuple[float, float, float]:
    """Median seconds per call, mean of the solver steps, share of the calls that were solved."""
    step()
    times, steps, solved = [], [], []
    for _ in range(repeats):
        started = time.process_time()
        output = step()
        times.append(time.process_time() - started)
        steps.append(float(output.n_steps.max()))
        solved.append(float(output.converged.double().mean()))
    return statistics.median(times), statistics.mean(steps), statistics.mean(solved)


def passages(model: PreTrainedModel, data: Path | None, count: int, length: int) -> Tensor:
    """Token ids (count, length) of evenly spaced passages of the test split, or random ones."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(2, model.config.vocab_size, (count, length), generator=generator)
    from deqzoo.evaluation import text

    tokenizer = text.load_tokenizer(model)
    stream = text.corpus_stream(text.corpus_of(tokenizer), "test", data, tokenizer)
    starts = [i * (len(stream) - length) // count for i in range(count)]
    return torch.stack([stream[start : start + length] for start in starts])


def table(rows: Sequence[dict[str, float]]) -> str:
    """The result in Markdown."""
    lines = [
        "| context | with cache, tokens/s | recomputed, tokens/s | speed-up | steps | solved |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['context']} | {row['cached_tokens_per_second']:.1f} "
            f"| {row['recomputed_tokens_per_second']:.2f} | {row['speedup']:.1f} "
            f"| {row['cached_steps']:.1f} / {row['recomputed_steps']:.1f} "
            f"| {row['cached_solved']:.0%} / {row['recomputed_solved']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="zoo name or folder; an untrained model by default")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--data", type=Path, help="the model's corpus")
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.model:
        model = DEQModel.from_pretrained(arguments.model).eval()
    else:
        model = untrained_model(max(arguments.contexts) + 1)
    rows = []
    with torch.inference_mode():
        texts = passages(model, arguments.data, arguments.passages, max(arguments.contexts))
        for context in arguments.contexts:
            row: dict[str, float] = {"context": context}
            for name, kind, repeats in (("cached", cached_step, 20), ("recomputed", joint_step, 3)):
                found = [measure(kind(model, t[None, :context].clone()), repeats) for t in texts]
                seconds, steps, solved = map(statistics.mean, zip(*found, strict=True))
                row[f"{name}_tokens_per_second"] = 1 / seconds
                row[f"{name}_steps"], row[f"{name}_solved"] = steps, solved
            row["speedup"] = row["cached_tokens_per_second"] / row["recomputed_tokens_per_second"]
            rows.append(row)
    name = Path(arguments.model or "untrained").name
    content = {
        "model": describe_model(model, name),
        "threads": arguments.threads, "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    stem = RESULTS / f"generation-{name}"
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows), end="")


if __name__ == "__main__":
    main()

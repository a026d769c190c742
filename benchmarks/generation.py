"""Tokens per second of generation with the exact cache against recomputing the whole prefix.

    python benchmarks/generation.py --model deq-transformer-wikitext2-jr-upg

Both ways solve to the same tolerance and choose the most likely next word. With the cache a new
token is one single-token solve; without it the solve runs over all tokens so far.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deqzoo import DEQModel
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM

CONTEXTS = (128, 512, 1024)


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


def cached_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    """A function that appends one token to a cache that holds ``ids`` (1, n)."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    newest = ids[:, -1:]

    def step() -> Tensor:
        output = model(newest, past_key_values=cache, logits_to_keep=1)
        newest.copy_(output.logits.argmax(-1))
        return output.n_steps

    return step


def joint_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    """A function that solves ``ids`` (1, n) as a whole for the next word."""
    return lambda: model(ids, logits_to_keep=1).n_steps


def measure(step: Callable[[], Tensor], seconds: float) -> tuple[float, float]:
    """Median seconds per call, and mean solver steps, over about ``seconds``."""
    step()
    times, steps = [], []
    while sum(times) < seconds or len(times) < 3:
        started = time.perf_counter()
        steps.append(float(step().max()))
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2], sum(steps) / len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="zoo name or folder; an untrained model by default")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.model:
        model = DEQModel.from_pretrained(arguments.model).eval()
    else:
        model = untrained_model(max(arguments.contexts) + 1)
    rows = []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for context in arguments.contexts:
            ids = torch.randint(2, model.config.vocab_size, (1, context), generator=generator)
            cached, cached_steps = measure(cached_step(model, ids.clone()), arguments.seconds)
            joint, joint_steps = measure(joint_step(model, ids), arguments.seconds)
            rows.append(
                {
                    "context": context,
                    "cached_tokens_per_second": 1 / cached,
                    "recomputed_tokens_per_second": 1 / joint,
                    "speedup": joint / cached,
                    "cached_steps": cached_steps,
                    "recomputed_steps": joint_steps,
                }
            )
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "rows": rows}, indent=2))
        return
    print(f"{'context':>8} {'cached/s':>10} {'recomputed/s':>13} {'speed-up':>9} {'steps':>12}")
    for row in rows:
        print(
            f"{row['context']:>8} {row['cached_tokens_per_second']:>10.1f} "
            f"{row['recomputed_tokens_per_second']:>13.2f} {row['speedup']:>8.1f}x "
            f"{row['cached_steps']:>5.1f} / {row['recomputed_steps']:.1f}"
        )


if __name__ == "__main__":
    main()

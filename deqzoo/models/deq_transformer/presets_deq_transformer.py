"""Named configurations: the official WikiText-103 ones, about 98M parameters each, and small ones.

Training settings (optimiser, schedule, Jacobian penalty) are in the recipes of the same names.
"""

from typing import Any

_WIKITEXT103: dict[str, Any] = {
    "variant": "locuslab-deq",
    "vocab_size": 267735,
    "d_model": 700,
    "d_embed": 700,
    "n_head": 10,
    "d_inner": 48000,
    "norm_placement": "post",
    "weight_norm": True,
    "cutoffs": [20000, 40000, 200000],
    "div_val": 4,
    "tie_word_embeddings": True,
    "tie_projections": [False, True, True, True],
    "local_size": 0,
    "mem_len": 150,
    "tgt_len": 150,
    "dropout": 0.05,
    "dropatt": 0.0,
}

# One block of 0.85M parameters; the memory covers the window, so that what a token gets does not
# depend on how the text is cut into segments.
_SMALL: dict[str, Any] = {
    "variant": "locuslab-deq",
    "d_model": 256,
    "d_embed": 256,
    "n_head": 8,
    "d_inner": 1024,
    "norm_placement": "post",
    "weight_norm": True,
    "div_val": 1,
    "local_size": 128,
    "mem_len": 127,
    "tgt_len": 70,
    "dropout": 0.2,
    "dropword": 0.1,
    "output_dropout": "feature",
}

# Blocks of a size that reaches the published perplexities of such corpora, with a plain tied
# softmax and 128 new tokens beside 128 of memory; weights in half precision take 44 and 15 MB.
_LARGE: dict[str, Any] = {
    **_SMALL,
    "d_model": 512,
    "d_embed": 512,
    "d_inner": 2560,
    "cutoffs": [],
    "local_size": 129,
    "mem_len": 128,
    "tgt_len": 128,
    "dropout": 0.2,
    "input_dropout": 0.5,
    "final_dropout": 0.5,
    "dropatt": 0.1,
    "dropword": 0.2,
}


def _implicit(forward_steps: int, backward_steps: int) -> dict[str, Any]:
    """Solver and gradient settings with the official budgets and tolerance."""
    return {
        "solver": {"name": "anderson", "max_steps": forward_steps, "tol": 1e-3},
        "gradient": {
            "name": "implicit",
            "solver": {"name": "anderson", "max_steps": backward_steps, "tol": 1e-3},
        },
    }


PRESETS: dict[str, dict[str, Any]] = {
    "deq-transformer-wikitext2": {**_SMALL, "vocab_size": 33278, "cutoffs": [2000, 10000]},
    "deq-transformer-ptb": {**_SMALL, "vocab_size": 10000, "cutoffs": [2000]},
    "deq-transformer-wikitext2-large": {**_LARGE, "vocab_size": 33278},
    "deq-transformer-ptb-large": {
        **_LARGE,
        "vocab_size": 10000,
        "d_model": 448,
        "d_embed": 448,
        "d_inner": 1792,
    },
    "deq-transformer-wikitext103-post": {**_WIKITEXT103, **_implicit(30, 35)},
    "deq-transformer-wikitext103-pre": {
        **_WIKITEXT103,
        "norm_placement": "pre",
        **_implicit(30, 35),
    },
    "deq-transformer-wikitext103-pre-jr": {
        **_WIKITEXT103,
        "norm_placement": "pre",
        "mem_len": 300,
        "dropout": 0.06,
        "dropatt": 0.01,
        **_implicit(14, 14),
    },
    "deq-transformer-wikitext103-upg": {
        **_WIKITEXT103,
        "solver": {"name": "anderson", "max_steps": 30, "tol": 1e-3},
        "gradient": {"name": "upg", "steps": 5, "damping": 0.8},
    },
    "torchdeq-seq-wikitext103": {
        **_WIKITEXT103,
        "variant": "torchdeq-seq",
        **_implicit(35, 35),
    },
    "torchdeq-lm-wikitext103": {
        **_WIKITEXT103,
        "variant": "torchdeq-lm",
        "norm_placement": "pre",
        "n_sublayers": 3,
        "d_inner": 14800,
        "fixed_iterations": 12,
    },
}

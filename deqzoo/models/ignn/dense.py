"""Products of a tall, narrow matrix with a small weight.

On CPUs PyTorch sends float32 products to MKL, which is slow on processors of other makers: 0.42 ms
for (5354, 64) x (64, 64) on one Zen 5 core, where oneDNN, the library behind PyTorch's convolutions
and compiled models, needs 0.19 ms at the same accuracy. It is used where this build has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _onednn_linear() -> Any:
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN_LINEAR = _onednn_linear()
_WORTH_IT = 2**16
"""Numbers in x from which it pays: a call takes 17 microseconds more than PyTorch's own."""


def times_transposed(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return x @ weight^T (+ plus), a new tensor, without recording it where grad mode is off.

    Args:
        x: (n, p).
        weight: (m, p).
        plus: (n, m).
    """
    plain = _ONEDNN_LINEAR is None or torch.is_grad_enabled() or torch.compiler.is_exporting()
    if plain or not _fits(x, weight):
        # Equilibria are solved in the weights' dtype; and a backward pass, which runs outside
        # of autocast, could not multiply what autocast had narrowed.
        kind = x.device.type
        has_autocast = torch.amp.is_autocast_available(kind)  # meta tensors have none
        if has_autocast and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return times_transposed(x, weight, plus)
        return x @ weight.T if plus is None else torch.addmm(plus, x, weight.T)
    if plus is None:
        return _ONEDNN_LINEAR(x, weight, None, "none", [], "")
    return _ONEDNN_LINEAR.binary(x, plus, weight, None, "add")


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() >= _WORTH_IT
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() > 0
    )

"""Memory between segments: what the last tokens of a segment hand to the next one."""

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentMemory(NamedTuple):
    """States and injections of the last M tokens, never differentiated.

    Unlike the generation cache this holds what does not depend on the block's weights, so that
    keys and values can be computed anew after every training step.
    """

    states: Tensor  # (B, M, d)
    injections: Tensor  # (B, M, 3d)

    def extended(self, states: Tensor, injections: Tensor, length: int) -> "SegmentMemory":
        """The last ``length`` tokens of this memory followed by T new ones."""
        return SegmentMemory(
            torch.cat([self.states, states.detach()], dim=1)[:, -length:],
            torch.cat([self.injections, injections.detach()], dim=1)[:, -length:],
        )


def updated_memory(
    memory: SegmentMemory | tuple[Tensor, Tensor] | None,
    states: Tensor,
    injections: Tensor,
    length: int,
) -> SegmentMemory | None:
    """Memory after a segment with states (B, T, d) and injections (B, T, 3d); None for length 0."""
    if length == 0:
        return None
    if memory is None:
        return SegmentMemory(
            states.detach()[:, -length:].clone(), injections.detach()[:, -length:].clone()
        )
    return SegmentMemory(*memory).extended(states, injections, length)

"""The modules of an MDEQ: they hold the weights; the map itself is in `map_mdeq`.

Order of operations and which norms have a scale and shift follow the reference implementation
(locuslab/deq), so that its weights give the same logits.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deqzoo.models.weights import WeightNorm, conv_weight, norm_tensors

from .configuration_mdeq import MDEQConfig
from .map_mdeq import BlockTensors, ConvNormTensors, MapTensors


class WeightNormConv2d(WeightNorm, nn.Conv2d):
    """A bias-free convolution whose weight is direction and magnitude per output channel."""

    length_name = "magnitude"
    plain = nn.Conv2d


def make_conv(
    in_channels: int, out_channels: int, kernel_size: int, weight_norm: bool
) -> nn.Conv2d:
    """A bias-free convolution of the map, which itself knows stride and padding."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
    return WeightNormConv2d.of(conv) if weight_norm else conv


class MDEQConvNorm(nn.Module):
    """A convolution and its group norm, one stage of the map."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        groups: int,
        affine: bool,
        weight_norm: bool,
    ) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, kernel_size, weight_norm)
        self.norm = nn.GroupNorm(groups, out_channels, affine=affine)

    def tensors(self) -> ConvNormTensors:
        """What `map_mdeq` computes with."""
        return ConvNormTensors(conv_weight(self.conv), *norm_tensors(self.norm))


class MDEQBlock(nn.Module):
    """Residual block of one branch."""

    def __init__(self, config: MDEQConfig, branch: int) -> None:
        super().__init__()
        width, inner = config.channels[branch], config.inner_channels[branch]
        big = (config.big_kernels or ())[branch]
        groups, affine = config.num_groups, config.affine_block
        weight_norm = config.weight_norm != "none"
        self.conv1 = make_conv(width, inner, 5 if big >= 1 else 3, weight_norm)
        self.norm1 = nn.GroupNorm(groups, inner, affine=affine)
        self.conv2 = make_conv(inner, width, 5 if big >= 2 else 3, weight_norm)
        self.norm2 = nn.GroupNorm(groups, width, affine=affine)
        self.norm3 = nn.GroupNorm(groups, width, affine=affine)

    def tensors(self) -> BlockTensors:
        """What `map_mdeq` computes with."""
        return BlockTensors(
            ConvNormTensors(conv_weight(self.conv1), *norm_tensors(self.norm1)),
            ConvNormTensors(conv_weight(self.conv2), *norm_tensors(self.norm2)),
            *norm_tensors(self.norm3),
        )


class MDEQFusion(nn.Module):
    """Stages from one branch to another: strided 3x3 down, or a single 1x1 before upsampling."""

    def __init__(self, config: MDEQConfig, source: int, target: int) -> None:
        super().__init__()
        c_in, c_out = config.channels[source], config.channels[target]
        groups, affine = config.num_groups, config.affine_fuse
        weight_norm = config.weight_norm == "all"
        kernel = 3 if source < target else 1
        widths = [c_in] * max(target - source - 1, 0) + [c_out]
        self.stages = nn.ModuleList(
            MDEQConvNorm(c_in, width, kernel, groups, affine, weight_norm) for width in widths
        )

    def tensors(self) -> tuple[ConvNormTensors, ...]:
        """What `map_mdeq` computes with."""
        stages: Any = self.stages
        return tuple(stage.tensors() for stage in stages)


class MDEQTransformation(nn.Module):
    """All weights of the equilibrium map."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        indices = range(len(config.channels))
        self.branches = nn.ModuleList(
            nn.ModuleList(MDEQBlock(config, i) for _ in range(count))
            for i, count in enumerate(config.blocks_per_branch or ())
        )
        self.fuse = nn.ModuleList(
            nn.ModuleDict({str(j): MDEQFusion(config, j, i) for j in indices if j != i})
            for i in indices
        )
        self.post = nn.ModuleList(
            MDEQConvNorm(
                width,
                width,
                1,
                config.num_groups // 2,
                config.affine_post,
                config.weight_norm in ("block_post", "all"),
            )
            for width in config.channels
        )

    def tensors(self) -> MapTensors:
        """Effective weights of the map, tracked by autograd; computed once per forward."""
        indices = range(len(self.branches))
        branches: Any = self.branches
        fuse: Any = self.fuse
        post: Any = self.post
        return MapTensors(
            branches=tuple(tuple(b.tensors() for b in blocks) for blocks in branches),
            fuse=tuple(
                tuple(() if i == j else fuse[i][str(j)].tensors() for j in indices) for i in indices
            ),
            post=tuple(stage.tensors() for stage in post),
        )


class MDEQStem(nn.Module):
    """3x3 convolutions with batch norm and ReLU; the first `stem_downsamples` have stride 2."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        width, downsamples = config.channels[0], config.stem_downsamples
        count = max(2, downsamples)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(
                config.num_channels if i == 0 else width,
                width,
                3,
                stride=2 if i < downsamples else 1,
                padding=1,
                bias=False,
            )
            for i in range(count)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(count))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C_0, H / 2^d, W / 2^d)."""
        for conv, norm in zip(self.convolutions, self.norms, strict=True):
            pixel_values = F.relu(norm(conv(pixel_values)))
        return pixel_values


class MDEQInjection(nn.Module):
    """1x1 convolution, batch norm and ReLU between stem and map."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        width = config.channels[0]
        self.conv = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_0, H_0, W_0) -> the same shape."""
        return F.relu(self.norm(self.conv(x)))


class MDEQBottleneck(nn.Module):
    """Bottleneck of the head: inner norms without scale and shift, projected shortcut if needed."""

    def __init__(self, in_channels: int, inner: int) -> None:
        super().__init__()
        out = 4 * inner
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner, affine=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner, affine=False)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out, affine=False)
        self.shortcut = None
        if in_channels != out:
            self.shortcut = MDEQHeadConv(in_channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_i, H, W) -> (B, 4 h_i, H, W)."""
        p = F.relu(self.norm1(self.conv1(x)))
        p = F.relu(self.norm2(self.conv2(p)))
        p = self.norm3(self.conv3(p))
        return F.relu(p + (x if self.shortcut is None else self.shortcut(x)))


class MDEQHeadConv(nn.Module):
    """A convolution and its batch norm in the head."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H / stride, W / stride), not rectified."""
        return self.norm(self.conv(x))


class MDEQHead(nn.Module):
    """Joins the branches from fine to coarse and pools: states -> (B, final_channels)."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        widths = config.head_channels
        self.bottlenecks = nn.ModuleList(
            MDEQBottleneck(c, h) for c, h in zip(config.channels, widths, strict=True)
        )
        self.downsamples = nn.ModuleList(
            MDEQHeadConv(4 * fine, 4 * coarse, 3, stride=2)
            for fine, coarse in zip(widths[:-1], widths[1:], strict=True)
        )
        self.final = MDEQHeadConv(4 * widths[-1], config.final_channels, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """States (B, C_i, H_i, W_i), finest first -> pooled features (B, final_channels)."""
        x = self.bottlenecks[0](features[0])
        for bottleneck, downsample, z in zip(
            self.bottlenecks[1:], self.downsamples, features[1:], strict=True
        ):
            x = bottleneck(z) + F.relu(downsample(x))
        return F.relu(self.final(x)).mean(dim=(2, 3))

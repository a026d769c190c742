"""Configuration of multiscale deep equilibrium models."""

import copy
from typing import Any, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from deqzoo.equilibrium import Gradient, Solver
from deqzoo.models.base import DEQConfigMixin

from .presets_mdeq import PRESETS


@strict
class MDEQConfig(DEQConfigMixin, BackboneConfigMixin, PreTrainedConfig):
    r"""Architecture, solver and gradient of an MDEQ.

    The resolutions are called branches, finest first. The defaults are those of the CIFAR TINY.

    Args:
        num_channels: channels of a picture.
        image_size: side of the pictures the model was made for; any side divisible by
            `size_divisor` works.
        channels: channels of each branch's state.
        head_channels: inner width of the head's bottleneck of each branch.
        final_channels: width of the features that the classifier sees.
        expansion: inner width of a residual block, as a multiple of its branch's channels.
        num_groups: groups of the group norms; the one after the fusion has half as many.
        stem_downsamples: how often the stem halves the picture.
        blocks_per_branch: residual blocks of each branch; one each by default.
        big_kernels: per branch 0, 1 (first convolution 5x5) or 2 (both 5x5); 0 by default.
        injection_transform: a 1x1 convolution between stem and map; by default as in the reference,
            whenever the stem halves or there are more than two branches.
        weight_norm: which convolutions of the map are weight-normalised: "none", "block",
            "block_post" (blocks and the convolutions after the fusion), or "all" (fusion too).
        affine_block: scale and shift in the norms of the blocks.
        affine_fuse: likewise in the fusion.
        affine_post: likewise after the fusion.
        dropout: probability of dropping a channel of a block, one mask per picture and forward.
        unroll_layers: applications of the map in the shallow (unrolled) mode.
        initializer_range: standard deviation of convolutions without weight norm; None for
            PyTorch's defaults.
        solver: the equilibrium solver or its settings, as in `deqzoo.equilibrium.make_solver`; kept
            as a dict of all settings.
        gradient: the gradient or its settings, as in `deqzoo.equilibrium.make_gradient`; likewise.

    Raises:
        ValueError: settings that contradict each other, with the offending value.
    """

    model_type = "mdeq"
    keys_to_ignore_at_inference = [
        "n_steps", "residual", "converged", "hidden_states", "state", "equilibrium_map",
    ]  # fmt: skip

    num_channels: int = 3
    image_size: int = 32
    channels: list[int] | tuple[int, ...] = (24, 24)
    head_channels: list[int] | tuple[int, ...] = (8, 16)
    final_channels: int = 200
    expansion: float | int = 5
    num_groups: int = 8
    stem_downsamples: int = 0
    blocks_per_branch: list[int] | tuple[int, ...] | None = None
    big_kernels: list[int] | tuple[int, ...] | None = None
    injection_transform: bool | None = None
    weight_norm: Literal["none", "block", "block_post", "all"] = "block_post"
    affine_block: bool = True
    affine_fuse: bool = True
    affine_post: bool = True
    dropout: float | int = 0.0
    unroll_layers: int = 10
    initializer_range: float | None = 0.01
    solver: dict[str, Any] | str | Solver | None = None
    gradient: dict[str, Any] | str | Gradient | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        n = len(self.channels)
        self.channels = list(self.channels)
        self.head_channels = list(self.head_channels)
        self.blocks_per_branch = list(self.blocks_per_branch or [1] * n)
        self.big_kernels = list(self.big_kernels or [0] * n)
        if self.injection_transform is None:
            self.injection_transform = self.stem_downsamples > 0 or n > 2
        self.complete_equilibrium()
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None),
            out_indices=kwargs.pop("out_indices", None),
        )
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Names of the branches, finest first, for `out_features` of an `MDEQBackbone`."""
        return [f"branch{i}" for i in range(len(self.channels))]

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own; what a backbone returns is left out where it is the default."""
        content = super().to_dict()
        if content["out_indices"] == [len(self.channels) - 1]:
            del content["out_features"], content["out_indices"]
        return content

    @property
    def size_divisor(self) -> int:
        """A picture's height and width must be multiples of this."""
        return 2 ** (self.stem_downsamples + len(self.channels) - 1)

    @property
    def inner_channels(self) -> list[int]:
        """Width inside the residual blocks of each branch."""
        return [int(self.expansion * width) for width in self.channels]

    def validate_branches(self) -> None:
        """Every per-branch list describes the same number of branches, at least two."""
        if len(self.channels) < 2:
            raise ValueError(f"channels={self.channels} must list at least two branches")
        blocks, kernels = self.blocks_per_branch or (), self.big_kernels or ()
        for name in ("head_channels", "blocks_per_branch", "big_kernels"):
            value = getattr(self, name)
            if len(value) != len(self.channels):
                raise ValueError(
                    f"{name}={value} must have one entry per branch of channels={self.channels}"
                )
        if min(*self.channels, *self.head_channels, *blocks) < 1:
            raise ValueError(
                f"channels={self.channels}, head_channels={self.head_channels} and "
                f"blocks_per_branch={self.blocks_per_branch} must be positive"
            )
        if not set(kernels) <= {0, 1, 2}:
            raise ValueError(f"big_kernels={self.big_kernels} must hold 0, 1 or 2")

    def validate_numbers(self) -> None:
        """Group norms divide their channels; probabilities and counts are in range."""
        if self.num_groups < 2 or self.num_groups % 2:
            raise ValueError(f"num_groups={self.num_groups} must be even and positive")
        for width in (*self.channels, *self.inner_channels):
            if width % self.num_groups:
                raise ValueError(
                    f"num_groups={self.num_groups} must divide channels={self.channels} and their "
                    f"expansion {self.inner_channels}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.unroll_layers < 1 or self.final_channels < 1 or self.stem_downsamples < 0:
            raise ValueError(
                f"unroll_layers={self.unroll_layers} and final_channels={self.final_channels} must "
                f"be positive, stem_downsamples={self.stem_downsamples} not negative"
            )
        if self.image_size < 1 or self.image_size % self.size_divisor:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {self.size_divisor}, since "
                f"the picture is halved {self.stem_downsamples + len(self.channels) - 1} times"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """An official configuration by name, with any setting replaced.

        Args:
            name: one of `PRESETS`.
            overrides: settings of this class; `solver` and `gradient` change single settings, as
                in `from_pretrained`.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown MDEQ preset {name!r}; the presets are {', '.join(PRESETS)}")
        settings = copy.deepcopy(PRESETS[name])
        if "num_labels" in overrides:
            settings.pop("id2label", None)
            settings.pop("label2id", None)
        return cls(**cls.merged(settings, overrides))


__all__ = ["MDEQConfig"]

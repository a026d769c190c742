"""Weights as their modules apply them, for maps that are pure functions of tensors.

A map computes with tensors, so that what is constant in a solve is computed once. It reads the
weight of a plain module directly. Any other module is called, once per solve, on inputs that reveal
its weight: adapters, hooks, pruning, quantised layers and offloading then act, and get gradients.
Dropout in an adapter drops the same features for all samples of a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqzoo.errors import UserError

# Probes are large, so that a bias beside the weight costs it no digits; a power of two divides out
# exactly, and the answers still fit float16.
_SCALE = 256.0
_LINEARITY = 0.1  # relative; quantised activations are off by about 0.01


class _EffectiveWeight(Tensor):
    """A computed weight that hands back what is written to it, or assigned to its `data`.

    Tools merge adapters by `layer.weight.data += delta` and initialise by `nn.init.zeros_`; with a
    computed weight that would be lost. What is written to a part of it (`weight[0].zero_()`) is.
    """

    owner: WeightNorm

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        with torch._C.DisableTorchFunctionSubclass():
            if not args and isinstance(target, cls):  # of nn.init, which would come back to here
                kwargs = {**kwargs, "tensor": target.as_subclass(Tensor)}
            result = func(*args, **kwargs)
            if isinstance(target, cls) and _writes(func):
                is_recorded = torch.is_grad_enabled() and target.requires_grad
                if not is_recorded:
                    target.owner.assign(target.detach().as_subclass(Tensor))
        return result

    @property
    def data(self) -> Tensor:
        data = self.detach().as_subclass(_EffectiveWeight)
        data.owner = self.owner
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.owner.assign(value)


def _writes(func: Any) -> bool:
    """Whether a function of torch writes to its first argument."""
    name = getattr(func, "__name__", "")
    if name in ("requires_grad_", "share_memory_"):
        return False
    if name.startswith("__"):
        return name == "__setitem__" or name in _IN_PLACE
    return name.endswith("_")


_IN_PLACE = tuple(f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "pow", "mod"))


class WeightNorm(nn.Module):
    """Weight normalisation (Salimans & Kingma 2016), beside `nn.Linear` or `nn.Conv2d`.

    weight[o] = direction[o] * length[o] / ||direction[o]||. The names of the parameters avoid
    weight_g and weight_v, which loaders of transformers rename.
    """

    length_name: str
    plain: type[nn.Linear] | type[nn.Conv2d]
    direction: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(layer)(...)`, by which adapters make layers of their own, is a plain one."""
        return cls.plain(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def of(cls, layer: Any) -> Self:
        """Normalise a plain layer from now on; its weight stays."""
        weight = layer._parameters.pop("weight")
        layer.__class__ = cls
        layer.direction = weight
        setattr(layer, cls.length_name, nn.Parameter(row_norms(weight.detach())))
        return layer

    def fold(self) -> None:
        """Become a plain layer with the same weight."""
        layer: Any = self
        weight = nn.Parameter(self.effective_weight().detach(), self.direction.requires_grad)
        del layer.direction, layer._parameters[self.length_name]
        layer.folded_from = type(self)
        layer.__class__ = self.plain
        layer.weight = weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As PyTorch's; another `weight` ends the normalisation.

        Raises:
            UserError: a tool, such as pruning, registers the computed weight as a parameter.
        """
        if param is not None and not isinstance(param, nn.Parameter):
            raise UserError(
                "the weight of this layer is computed by weight normalisation and no parameter; "
                "call fold_weight_norm() of the model first"
            )
        if name == "weight":
            self.fold()
        nn.Module.register_parameter(self, name, param)

    @property
    def weight(self) -> Tensor:
        """The effective weight, computed; it and `weight.data` can be assigned to."""
        weight = self.effective_weight()
        if torch.compiler.is_compiling():  # which cannot look into a subclass's functions
            return weight
        weight = weight.as_subclass(_EffectiveWeight)
        weight.owner = self
        return weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.assign(value)

    def effective_weight(self) -> Tensor:
        """The weight, shaped like the direction; its norms are taken in float32 or better."""
        direction = self.direction
        if direction.dtype in (torch.float16, torch.bfloat16):
            direction = direction.float()
        length = getattr(self, self.length_name).to(direction.dtype)
        return (direction * (length / row_norms(direction))).to(self.direction.dtype)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Take over an effective weight; a row of zeros keeps its direction, at length 0."""
        direction, lengths = normalised_parts(weight.to(self.direction), self.direction)
        self.direction.copy_(direction)
        getattr(self, self.length_name).copy_(lengths)


def normalised_parts(weight: Tensor, otherwise: Tensor | float) -> tuple[Tensor, Tensor]:
    """Direction and lengths whose effective weight is the given one.

    A row of zeros has length 0 and the direction `otherwise`, since none of its own can be normed.
    """
    lengths = row_norms(weight)
    return torch.where(lengths > 0, weight, otherwise), lengths


def row_norms(weight: Tensor) -> Tensor:
    """Euclidean norm over all axes but the first: (out, ...) -> (out, 1, ...)."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


def linear_tensors(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a linear layer, in the dtype in which maps compute.

    Raises:
        UserError: hooks or wrappers make the layer something else than a linear map.
    """
    weight = _plain_weight(module, nn.Linear)
    if weight is not None:
        return in_compute_dtype(weight), module.bias
    width = getattr(module, "in_features", None) or module.weight.shape[1]
    probes = _zeros(module, width + 1, width)
    probes[:width].fill_diagonal_(_SCALE)
    columns, constant = module(probes).split([width, 1])
    weight = (columns - constant).T / _SCALE
    bias = None if getattr(module, "bias", None) is None else constant[0]
    _check(module, lambda x: F.linear(x, weight, bias), probes[:1].cos(), constant, bias is None)
    return in_compute_dtype(weight), bias


def conv_weight(module: Any) -> Tensor:
    """Weight (out, in, k, k) of a convolution without bias, in the dtype in which maps compute.

    Raises:
        UserError: hooks or wrappers make the layer something else than a convolution.
    """
    weight = _plain_weight(module, nn.Conv2d)
    if weight is not None:
        return in_compute_dtype(weight)
    _, width, kernel, _ = module.weight.shape
    probes = _zeros(module, width + 1, width, 2 * kernel - 1, 2 * kernel - 1)
    probes[:width, :, kernel - 1, kernel - 1].fill_diagonal_(_SCALE)
    answers, constant = module(probes).split([width, 1])
    weight = answers.transpose(0, 1).flip(2, 3) / _SCALE
    _check(module, lambda x: F.conv2d(x, weight), probes[:1].cos(), constant, True)
    return in_compute_dtype(weight)


def norm_tensors(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of a layer or group norm, (features,) each, None where it has none."""
    if module.weight is None:
        return None, None
    kind = nn.GroupNorm if isinstance(module, nn.GroupNorm) else nn.LayerNorm
    if _plain_weight(module, kind) is not None:
        return module.weight, module.bias
    width = module.weight.shape[0]
    probe = _zeros(module, 2)
    probe[0], probe[1] = _SCALE, -_SCALE  # normalised to 1 and -1 in every group
    if hasattr(module, "num_groups"):
        up, down = module(probe.expand(1, width, 2))[0].unbind(1)
    else:
        up, down = module(torch.stack([probe, -probe]).repeat(1, width // 2))
        signs = probe.repeat(width // 2) / _SCALE
        return (up - down) / 2 * signs, (up + down) / 2
    return (up - down) / 2, (up + down) / 2


def in_compute_dtype(weight: Tensor) -> Tensor:
    """A weight in the dtype in which autocast would compute.

    Cast here because autocast's own cache knows parameters only: a derived tensor would be cast
    again by every evaluation of a map.
    """
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return weight.to(torch.get_autocast_dtype(device))
    return weight


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of nested tuples; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree)
    values = [map_tensors(function, value) for value in tree]
    return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """A map under torch.compile: one graph per shape and per set of tracked tensors.

    Several backward passes use one graph, which donated buffers forbid, and a training run meets
    more variants (shape, gradient mode, dropout) than torch's default limit, hence two of the
    global settings. The third: kernels that reduce along both axes at once leave gradients that
    are parts of a joint tensor unwritten on CUDA (torch 2.10 on, pytorch/pytorch#193061). A trained
    DEQ-Transformer's gradient came out orthogonal to the right one, at the right loss. The fourth,
    on CUDA: fused kernels round where the plain map does, so that backward sees forward's values.
    """
    import torch._dynamo.config  # a second of work, needed by this function only
    import torch._functorch.config
    import torch._inductor.config

    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    torch._functorch.config.donated_buffer = False
    triton: Any = torch._inductor.config.triton
    if hasattr(triton, "mix_order_reduction"):
        triton.mix_order_reduction = False
    torch._inductor.config.emulate_precision_casts = torch.cuda.is_available()
    return torch.compile(step, dynamic=False, fullgraph=True)


def _plain_weight(module: Any, kind: type[nn.Module]) -> Tensor | None:
    """The weight of a layer whose call is torch's own, without hooks or wrappers; else None."""
    plain = type(module).forward is kind.forward and "forward" not in vars(module)
    if not plain or module._forward_hooks or module._forward_pre_hooks:
        return None
    if module._backward_hooks or module._backward_pre_hooks:
        return None
    weight = module.effective_weight() if isinstance(module, WeightNorm) else module.weight
    # Under torch.export weights have another class.
    has_plain_class = torch.compiler.is_exporting() or type(weight) in (Tensor, nn.Parameter)
    return weight if has_plain_class else None


def _zeros(module: nn.Module, *shape: int) -> Tensor:
    """Zeros where a layer computes, in its dtype."""
    own: Any = next((p for p in module.parameters() if p.is_floating_point()), None)
    if own is None:
        return torch.zeros(shape)
    # An offloaded layer has its weights on the meta device and fetches its inputs itself.
    device = "cpu" if own.is_meta and "forward" in vars(module) else own.device
    return torch.zeros(shape, dtype=own.dtype, device=device)


def _check(
    module: nn.Module,
    linear_map: Callable[[Tensor], Tensor],
    x: Tensor,
    constant: Tensor,
    without_bias: bool,
) -> None:
    """Refuse a layer that adds a bias where the map has none, or (in evaluation) is not linear."""
    if constant.is_meta or torch.compiler.is_compiling():
        return
    with torch.no_grad():
        is_wrong = without_bias and bool(constant.any())
        if not is_wrong and not module.training:
            answer, reference = module(x), linear_map(x.to(constant.dtype))
            is_wrong = bool((answer - reference).norm() > _LINEARITY * reference.norm())
    if is_wrong:
        raise UserError(
            f"{type(module).__name__} belongs to the equilibrium map, whose weights are computed "
            "once per solve: what hooks or wrappers do there has to be linear, without a bias of "
            "its own"
        )

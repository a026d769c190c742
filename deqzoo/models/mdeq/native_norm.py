"""Implementations of the map's group norm: PyTorch's, one for compilers, one built for the CPU.

With a few channels per group PyTorch's kernel takes about half of an MDEQ step on the CPU. The
native one is compiled at first use (a C++ compiler and ninja are needed; half a minute, then
cached by torch) and fuses the rectifier before or after the norm. It has a first derivative only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deqzoo.errors import one_line
from deqzoo.files import replace_text

logger = logging.getLogger(__name__)

NORM_EPS = 1e-5
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
_FINISHED = "finished"
"""A file beside a library that was compiled to its end: a killed linker leaves part of one."""
_PAUSE = 10.0

_extension_module: ModuleType | None = None
_last_look = -math.inf


def group_norm(
    x: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    relu_before: bool = False,
    relu_after: bool = False,
) -> Tensor:
    """PyTorch's group norm of (B, C, H, W), a rectifier before or after it; scale, shift (C,)."""
    x = F.group_norm(F.relu(x) if relu_before else x, groups, scale, shift, NORM_EPS)
    return F.relu(x) if relu_after else x


def plain_group_norm(
    x: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    relu_before: bool = False,
    relu_after: bool = False,
) -> Tensor:
    """`group_norm` written as ordinary operations, for a compiler.

    On GPUs PyTorch's kernel copies channels-last pictures to the other layout and answers in it,
    and autocast runs it in float32. Here sums per channel are taken in float32 and each element is
    multiplied and added to once; result in dtype and layout of x. A compiler makes two passes
    over x of it.
    """
    batch, channels = x.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    if relu_before:
        v = F.relu(v)
    n = (channels // groups) * x.shape[2] * x.shape[3]
    mean = v.sum((2, 3)).reshape(batch, groups, -1).sum(2) / n
    square = v.square().sum((2, 3)).reshape(batch, groups, -1).sum(2) / n
    rstd = torch.rsqrt((square - mean.square()).clamp_min(0) + NORM_EPS)
    mean, rstd = (
        t.unsqueeze(2).expand(batch, groups, channels // groups).reshape(batch, channels)
        for t in (mean, rstd)
    )
    gain = rstd if scale is None else rstd * scale
    offset = -mean * gain if shift is None else shift - mean * gain
    y = v * gain[:, :, None, None] + offset[:, :, None, None]
    return (F.relu(y) if relu_after else y).to(x.dtype)


def cast_group_norm(
    x: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    relu_before: bool = False,
    relu_after: bool = False,
) -> Tensor:
    """`group_norm` with scale and shift in the dtype of x: CUDA's kernel takes no mixed ones."""
    scale, shift = (None if t is None else t.to(x.dtype) for t in (scale, shift))
    return group_norm(x, groups, scale, shift, relu_before, relu_after)


def native_group_norm(
    x: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    relu_before: bool = False,
    relu_after: bool = False,
) -> Tensor:
    """`group_norm` by the compiled kernel where it applies: affine, float32 or bfloat16, CPU.

    Statistics are taken in float32; the result has the dtype of x and channels-last layout.
    """
    applies = (
        scale is not None
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and scale.dtype == torch.float32
    )
    if not applies:
        return group_norm(x, groups, scale, shift, relu_before, relu_after)
    return _GroupNorm.apply(x, scale, shift, groups, relu_before, relu_after)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, before: bool, after: bool
    ) -> Tensor:
        y, mean, rstd = _extension().forward(x, scale, shift, groups, NORM_EPS, before, after)
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        ctx.settings = groups, before, after
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, rstd = ctx.saved_tensors
        groups, before, after = ctx.settings
        dx, dscale, dshift = _extension().backward(
            dy.to(x.dtype), x, scale, shift, mean, rstd, groups, before, after
        )
        _, wants_scale, wants_shift, *_ = ctx.needs_input_grad
        return (
            dx,
            dscale.sum(0) if wants_scale else None,
            dshift.sum(0) if wants_shift else None,
            None,
            None,
            None,
        )


def _extension() -> ModuleType:
    """The kernel, compiled where it has not been; waits for another process that compiles it."""
    return _extension_module or _build(wait=True)


def _build(wait: bool) -> ModuleType:
    """Compile the kernel, or find that it has been, and load it.

    Raises:
        BlockingIOError: another process compiles it, and `wait` is False.
        ImportError, OSError, RuntimeError: it cannot be compiled here.
    """
    global _extension_module
    from torch.utils.cpp_extension import load

    library = _library()
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_builder(folder, wait):
        source = folder / "group_norm.cpp"  # a copy, so that all checkouts build the same
        if not source.is_file() or source.read_text(encoding="utf-8") != _code():
            replace_text(source, _code())
        _extension_module = load(
            library.stem,
            [str(source)],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
        )
        (folder / _FINISHED).touch()
    return _extension_module


def _code() -> str:
    return (Path(__file__).parent / "native" / "group_norm.cpp").read_text(encoding="utf-8")


def _library() -> Path:
    """Where the build for this environment and processor is or goes: in torch's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    name = f"deqzoo_group_norm_{_build_key(_code())}"
    return root / name / f"{name}.so"


def native_norm_ready() -> bool:
    """Whether the kernel can be used at once: it is loaded, or was compiled on this machine before.

    Nothing is compiled and nothing waits; the file system is read once in ten seconds at most.
    """
    global _extension_module, _last_look
    if _extension_module is not None:
        return True
    now = time.monotonic()
    if now < _last_look + _PAUSE:
        return False
    _last_look = now
    try:
        library = _library()
        if (library.parent / _FINISHED).is_file():
            spec = importlib.util.spec_from_file_location(library.stem, library)
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                _extension_module = module
    except (ImportError, OSError, RuntimeError):  # no home, a cache of others, a damaged file
        return False
    return _extension_module is not None


def _build_key(code: str) -> str:
    """What a build depends on, as part of a name: source, flags, environment and processor.

    Environments that share a cache would else build over each other's result for ever, and a home
    folder that machines share would hold instructions that some of them do not have.
    """
    parts = [code, *_FLAGS, torch.__version__, torch.__file__, sys.version, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` goes by: the model and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    keys = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    facts = (line.partition(":") for line in lines)
    return "\n".join(sorted({f"{k.strip()}:{v}" for k, _, v in facts if k.strip() in keys}))


@contextlib.contextmanager
def _sole_builder(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the folder in which torch builds.

    torch's own lock is the mere presence of a file: a process killed while it compiles leaves it
    behind, and all later ones wait for ever. This lock ends with its holder, so that whoever has
    it may remove the other.

    Raises:
        BlockingIOError: another process has it, and `wait` is False.
        OSError: the folder cannot be written to, or its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # no Unix: torch's own lock has to do
        yield
        return
    with (folder / "deqzoo.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            logger.info("another process compiles group norm in %s; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def native_norm_available(wait: bool = True) -> bool:
    """Build the kernel; False, with one line in the log, where that is not possible.

    Args:
        wait: for another process that compiles it; else False is said at once.
    """
    try:
        if not native_norm_ready():
            _build(wait)
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning(
            "group norm is not compiled (%s); PyTorch's own is used", one_line(error, 160)
        )
        return False
    return True

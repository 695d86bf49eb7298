"""What the ops of training share on a GPU: when their kernels may run, casts, layouts, launches.

    refusal(tensors)         why the kernels cannot take these tensors, or None
    decline(x, ...)          why the automatic choice passes over them, or None
    cast(tensors)            what autocast makes of a convolution's operands
    nhwc(x)                  x as rows of pixels
    put(x, launches)         onto the stream of x's device
    recorded()               the launches of what is called inside, on tensors without memory

The candidates are of the family "gpu": "triton" has kernels of its own (kernels/_triton), "library" PyTorch's
convolution with what it keeps chosen by us. On the CPU they run in Triton's interpreter, for tests, when they
are asked for by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling as is_compiling

from . import _native

FAMILY = "gpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_GPU = (8, 0)  # compute capability: shared memory for the tiles, bfloat16
NUMBERS = {"none": 0, "relu": 1, "relu6": 2}  # of activations, as the engine counts them
SWITCH = "FB_GPU_PLANS"

_recording: list[Any] | None = None


def switched_on() -> bool:
    """What runs by itself on a GPU does so only with FB_GPU_PLANS=1, until it has been proven on one."""
    return os.environ.get(SWITCH) == "1"


@cache
def device_refusal(device: int) -> str | None:
    """Why there are no kernels for this GPU, as a sentence."""
    if find_spec("triton") is None:
        return "Triton is not installed, and the kernels for GPUs are written in it"
    if torch.version.hip is not None:
        return "the kernels for GPUs are for NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"compute capability {capability}, the kernels for GPUs need {OLDEST_GPU} or more"
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel for GPUs can take these tensors, or None."""
    for t in (x, *others):
        if t is None:
            continue
        if type(t) not in (Tensor, torch.nn.Parameter):
            return f"tensor subclass {type(t).__name__}: the GPU's kernels handle plain tensors"
        if t.dtype not in DTYPES:
            return f"{t.dtype}: the GPU's kernels handle float32, float16 and bfloat16"
        if t.layout is not torch.strided:
            return f"layout {t.layout}: the GPU's kernels handle torch.strided"
        if t.device != x.device:
            return f"tensors on {x.device} and {t.device}: the GPU's kernels handle one device"
    if x.is_cuda:
        if (reason := device_refusal(x.device.index)) is not None:
            return reason
    elif not (x.is_cpu and interpreting()) and not (x.is_meta and _recording is not None):
        return f"device {x.device}: the GPU's kernels handle cuda, and cpu with TRITON_INTERPRET=1"
    if is_compiling():
        return "torch.compile is tracing: it makes kernels of the formula"
    if _native.transforming():
        return "torch.func or forward-mode differentiation is on: the GPU's kernels have no rule for them"
    return None


def decline(x: Tensor, *_: Any) -> str | None:
    """Why the automatic choice passes over these kernels, which could run."""
    if not x.is_cuda:
        return "Triton's interpreter is for tests"
    if not switched_on():
        return f"the kernels for training have never run on a GPU yet; {SWITCH}=1 switches them on"
    return None


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast gives to products on the device of x; None without autocast."""
    kind = "cuda" if x.is_meta else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a product in the type that autocast asks for; as they are without autocast."""
    dtype = autocast_type(x)
    return tuple(t if t is None or dtype is None else t.to(dtype) for t in (x, *others))


def nhwc(x: Tensor) -> Tensor:
    """x [N, C, H, W] so that pixels lie at one distance, channels side by side; a copy where it does not."""
    from ._triton.launch import is_nhwc

    return x if is_nhwc(x) else x.contiguous(memory_format=torch.channels_last)


def empty_rows(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[N, channels, height, width], channels last, of x's type and device, not initialised."""
    sizes = x.shape[0], channels, height, width
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def like(x: Tensor) -> Tensor:
    """empty_rows of the sizes of x."""
    return empty_rows(x, *x.shape[1:])


def in_layout_of(y: Tensor, *tensors: Tensor) -> Tensor:
    """y, which lies as NHWC, in the memory format that PyTorch gives results of these tensors."""
    return y.contiguous(memory_format=_native.memory_format(*tensors))


def precision() -> str:
    """Of float32 products, as PyTorch's switch for convolutions stands."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def put(x: Tensor, *launches: Callable[[], None]) -> None:
    """Launch on the device of x, one after the other on its current stream."""
    if _recording is not None:
        _recording.extend(launches)
        return
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for launch in launches:
            launch()


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """The launches of what is called inside; none of them happens, and tensors may be on "meta"."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before

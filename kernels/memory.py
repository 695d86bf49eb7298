"""Memory of large results: feature maps and gradients that ops return on the CPU.

malloc maps and clears every large block afresh, which takes longer than many an op that fills it. So results
of 256 KiB and more lie in memory of their own: when a tensor is dropped its block serves the next one. The
process keeps as much as it needed at the fullest moment, until `release`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _ext, _native

__all__ = ["Usage", "empty_map", "release", "usage"]


class Usage(NamedTuple):
    """Bytes in tensors that exist now; bytes that the process keeps for such tensors, in use or not."""

    live: int
    held: int


@_native.register_fake("empty_map")
def _fake_empty_map(x, channels):
    size = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def empty_map(x: Tensor, channels: int) -> Tensor:
    """[N, channels, H, W] for a map x [N, C, H, W], of its type, channels last, not initialised; in memory
    that is kept for float32, bfloat16 and float16 on the CPU, else in PyTorch's own."""
    if not x.is_cpu or x.dtype not in _native.MAPS:
        return _fake_empty_map(x, channels)
    return torch.ops.fast_backbones.empty_map(x, channels)


def usage() -> Usage:
    """What large results take. Zeros without the compiled library, and where malloc serves (not Linux)."""
    module = _ext.native()
    return Usage(0, 0) if module is None else Usage(*module.map_memory())


def release() -> int:
    """Give what no tensor uses back to the system; the number of bytes. Tensors are not touched."""
    module = _ext.native()
    return 0 if module is None else module.release_map_memory()

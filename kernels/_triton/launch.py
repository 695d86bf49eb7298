"""A kernel launch as plain data, to be run, repeated, or compiled for a GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import triton
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Launch:
    """kernel[grid](**arguments, **constants): tensors, integers and None; what it is compiled for."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | None]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """Of Triton's compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def __call__(self) -> None:
        """Put it on the current stream of the tensors' device."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def compile(self) -> Any:
        """What the call would compile first, for the current GPU."""
        return self.kernel.warmup(**self.arguments, **self.constants, **self.options, grid=self.grid)


def compile_all(launches: Iterable[Any]) -> None:
    """What calls would compile one after the other, each once and on all cores. Only Triton's own launches,
    and nothing in the interpreter. What does not compile says so when it is called."""
    own = [each for each in launches if isinstance(each, Launch) and 0 not in each.grid]
    distinct = {(each.name, each.kernel, str(each.constants), *specialization(each)): each for each in own}
    if not own or triton.knobs.runtime.interpret:
        return
    driver = triton.runtime.driver.active

    def prepare(launch: Launch) -> None:
        made = launch.compile()
        driver.launcher_cls(made.src, made.metadata)  # Triton 3.6 compiles it, too, as C

    gpu = (driver.get_current_device(),)
    cores = min(len(distinct), len(os.sched_getaffinity(0)))
    with warnings.catch_warnings():  # Triton changes filters as it compiles, and threads would mix them up
        pool = ThreadPoolExecutor(cores, "triton", driver.set_current_device, gpu)
        try:
            wait([pool.submit(prepare, launch) for launch in distinct.values()])
        finally:
            pool.shutdown(cancel_futures=True)


class Pretended:
    """What Triton's compiler asks of a GPU's driver. Each capability is a device of its own, so that Triton
    keeps them apart."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.device = capability
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        assert device == self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        """What puts a kernel on a stream: there is none."""


def pretend(capability: int) -> None:
    """From now on Triton in this process compiles for such a GPU, which need not be there: 80, 90, 100."""
    triton.runtime.driver.set_active(Pretended(capability))


def compile_ahead(launch: Launch, capability: int) -> Any:
    """What a call would compile on such a GPU: PTX and SASS in `asm`, resources in `metadata`. It lies in
    Triton's cache from then on. The process pretends to have that GPU."""
    pretend(capability)
    return launch.compile()


def specialization(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles other code for, besides constants: options, types, multiples of 16, ones and
    absences."""
    found: list[Any] = [launch.num_warps, launch.num_stages]
    for value in launch.arguments.values():
        if isinstance(value, Tensor):
            found.append((value.dtype, value.storage_offset() * value.element_size() % 16 == 0))
        elif value is None or value == 1:
            found.append(value)
        else:
            found.append((value < 2**31, value % 16 == 0))
    return tuple(found)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of local memory that it keeps on its stack."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def geometry(stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    """The arguments of a kernel that moves a window."""
    pairs = {"stride": stride, "pad": padding, "dilation": dilation}
    return {f"{name}_{axis}": value for name, pair in pairs.items() for axis, value in zip("hw", pair)}


def pixel_stride(x: Tensor | None) -> int:
    """Elements from pixel to pixel of a map that lies as NHWC, or from row to row of [N, C]; 0 of None."""
    if x is None:
        return 0
    n, c, *size = x.shape
    if not size:
        return x.stride(0) if n > 1 else c
    h, w = size
    return x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c


def is_nhwc(x: Tensor) -> bool:
    """Whether pixels follow each other at one distance, rows and images without gaps, channels side by
    side."""
    if x.dim() != 4:
        return x.dim() == 2 and (x.shape[1] == 1 or x.stride(1) == 1)
    n, c, h, w = x.shape
    step = pixel_stride(x)
    expected = ((c, 1), (w, step), (h, w * step), (n, h * w * step))
    return all(
        size == 1 or stride == want
        for (size, want), stride in zip(expected, (x.stride(1), x.stride(3), x.stride(2), x.stride(0)))
    )


def unit(*values: int) -> int:
    """The largest of 1, 2, 4, 8, 16 that divides all of them.

    Triton sees of an argument whether it is a multiple of 16, and nothing less: 728 channels would be read
    one by one. So channel counts and strides are handed over in units, and the kernel multiplies by a
    constant.
    """
    return min(16, *(value & -value if value else 16 for value in values))


def blocks(count: int, block: int) -> int:
    return -(-count // block)


def power_of_two(count: int, least: int = 16, most: int = 1 << 30) -> int:
    """The next power of two, within bounds."""
    return min(most, max(least, 1 << (count - 1).bit_length()))


# Pixels, filters: what a product may be cut into. wgmma and tcgen05 take 64 rows or more. With 128x256 and
# 256x128 a 1x1 spills up to 400 bytes.
PRODUCT_TILES = ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 64))


def product_tiles(
    n: int, block_k: int, sizes: tuple[tuple[int, int], ...], stages: int
) -> list[dict[str, int]]:
    """Tiles of these sizes that have no more than half of their filters to spare; large ones on 8 warps."""
    widest = power_of_two(n)
    return [
        {
            "BLOCK_M": m, "BLOCK_N": width, "BLOCK_K": block_k,
            "num_warps": 8 if m * width >= 128 * 128 else 4,
            "num_stages": stages + 1 if m * width <= 64 * 64 else stages,
        }
        for m, width in sizes
        if width <= widest
    ]  # fmt: skip

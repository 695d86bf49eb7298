"""The CUDA kernels on the CPU: csrc/cuda/*.cu compiled by g++ against tests/native/simt, behind ctypes.

`call(launch)` runs what kernels/_cuda would put on a stream, on CPU tensors.
"""

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def library():
    """Compiled once a process; half a minute of one core."""
    folder = Path(mkdtemp(prefix="simt"))
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    include = ["-I", ROOT / "tests" / "native" / "simt", "-I", ROOT / "csrc"]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "tests" / "native" / "cuda_kernels.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen(["g++", *flags, *include, "-x", "c++", "-c", source, "-o", made])
        for source, made in zip(sources, objects)
    ]
    codes = [job.wait() for job in jobs]
    assert codes == [0] * len(codes)
    made = folder / "libsimt.so"
    subprocess.run(["g++", "-shared", *objects, "-o", made], check=True)
    found = ctypes.CDLL(made)
    for name in ("depthwise_conv2d", "grouped_conv2d", "max_pool2d", "global_avg_pool", "mistake"):
        getattr(found, name).restype = ctypes.c_char_p
    return found


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def sizes(*values):
    return (ctypes.c_int64 * len(values))(*values)


def check(problem):
    assert problem is None, problem.decode()


def pixel_stride(x):
    n, c, h, w = x.shape
    return x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c


def call(launch, backwards=False):
    """Run it here and now; threads of a block in falling order if asked."""
    x, weight, y, scale, bias, window, stride, padding, dilation, own, activation = launch.arguments
    (n, c, h, w), (_, k, p, q) = x.shape, y.shape
    shape = sizes(
        n, h, w, c, p, q, k, *window, *stride, *padding, *dilation, pixel_stride(x), pixel_stride(y)
    )
    dtype, operands = DTYPES[x.dtype], (pointer(x), pointer(weight), pointer(y), shape)
    end = (pointer(scale), pointer(bias), activation)
    library().backwards(int(backwards))
    if launch.name == "depthwise_conv2d":
        check(library().depthwise_conv2d(dtype, *operands, own, *end))
    else:
        check(library().grouped_conv2d(dtype, own, *operands, *end))

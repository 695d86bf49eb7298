"""Where Triton kernels are tested: on a GPU, or else on the CPU in Triton's interpreter. Imported before the
kernels.

The interpreter keeps bfloat16 as bits. In Triton 3.6 to 3.9 it cuts them off where a GPU rounds to nearest
even, and its matrix product multiplies the bits as integers. Both are mended here, so that the bits agree
with a GPU's.
"""

import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # Triton's own functions are made for the interpreter or not when it is imported first
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "conftest.py comes first"
    os.environ["TRITON_INTERPRET"] = "1"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def exact_products():
    """float32 convolutions and matrix products in float32 on a GPU, too, where TF32 is PyTorch's default."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, nearest).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mend_interpreter() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self, a, b, *rest):
        wide = [
            TensorHandle(widened(t.data), tl.float32) if t.dtype.scalar is tl.bfloat16 else t for t in (a, b)
        ]
        return dot(self, *wide, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


if DEVICE == "cpu" and find_spec("triton") is not None:
    mend_interpreter()

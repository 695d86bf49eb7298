"""Kernels that read and write channel slices of wider buffers, as a plan places them for concatenation.

x, residual and y lie in buffers whose pixels are wider than their channels. What lies between must not be
read (it is NaN) and must not be written.
"""

import pytest
import torch
from helpers import assert_bit_equal, assert_equal, integers, needs_native, threads
from kernel_cases import CASES, KINDS, has_parameters, native_candidates, operands, parameters, prepared

from fast_backbones.kernels import _ext

MARK = 12345.0  # what the memory around y holds


class Slice:
    """Channels `before` to `before + c` of an NHWC buffer, with spare pixels in front and behind."""

    def __init__(self, n, c, h, w, before, after, fill):
        self.ld = before + c + after
        self.spare = 2 * self.ld
        self.memory = torch.full((2 * self.spare + n * h * w * self.ld,), fill)
        inner = self.memory[self.spare : self.spare + n * h * w * self.ld].view(n, h, w, self.ld)
        self.values = inner[..., before : before + c].permute(0, 3, 1, 2)
        self.address = self.values.data_ptr()

    def untouched(self) -> torch.Tensor:
        """The memory outside the slice."""
        rest = self.memory.clone()
        mask = torch.zeros_like(rest, dtype=torch.bool)
        mask.as_strided(self.values.shape, self.values.stride(), self.values.storage_offset()).fill_(True)
        return rest[~mask]


def filled(tensor, before, after) -> Slice:
    place = Slice(*tensor.shape, before, after, float("nan"))
    place.values.copy_(tensor)
    return place


@needs_native
@pytest.mark.parametrize("case", [c for c in CASES if has_parameters(c)], ids=lambda case: case.id)
def test_slices(case):
    module = _ext.native()
    expected = case.exact(case.inputs()).float()
    args = prepared(case)
    params = parameters(case, args)
    weight, bias, residual = operands(case, args)
    x = filled(args[0], 3, 2)
    for backend in native_candidates(case.op):
        if not case.accepted_by(backend):
            continue
        kind = KINDS.get(backend, case.op)
        y = Slice(*expected.shape, 5, 9, MARK)
        spec = params | {"ldx": x.ld, "ldy": y.ld}
        pointers = {"x": x.address, "y": y.address}
        if weight is not None:
            packed = torch.empty(module.packed_floats(kind, spec))
            module.pack_weight(kind, spec, weight.data_ptr(), packed.data_ptr())
            pointers["weight"] = packed.data_ptr()
        if bias is not None:
            pointers["bias"] = bias.data_ptr()
        if residual is not None:
            added = filled(residual, 1, 6)
            spec["ldr"] = added.ld
            pointers["residual"] = added.address
        module.run_op(kind, spec, pointers, threads=2)
        assert_equal(y.values, expected, backend)
        assert (y.untouched() == MARK).all(), f"{backend} writes outside its slice"


@needs_native
@pytest.mark.parametrize("shape", [(2, 19, 5, 7), (1, 64, 14, 14), (3, 1, 1, 1), (1, 3, 33, 31)], ids=str)
def test_layout_copies_and_average_of_a_slice(shape):
    module = _ext.native()
    x = integers(shape, 1)
    n, c, h, w = shape
    params = {"n": n, "c": c, "h": h, "w": w, "k": c}
    source = filled(x, 3, 2)
    for count in (1, 2, 3):
        with threads(count):
            planar = torch.full((x.numel() + 16,), MARK)
            pointers = {"x": source.address, "y": planar.data_ptr()}
            module.run_op("to_nchw", params | {"ldx": source.ld}, pointers, threads=0)
            assert_bit_equal(planar[:-16].view(shape), x, "to_nchw")
            assert (planar[-16:] == MARK).all()
            target = Slice(*shape, 4, 1, MARK)
            pointers = {"x": planar.data_ptr(), "y": target.address}
            module.run_op("to_nhwc", params | {"ldy": target.ld}, pointers, threads=0)
            assert_bit_equal(target.values, x, "to_nhwc")
            assert (target.untouched() == MARK).all()
            mean = torch.full((n * c + 16,), MARK)
            pointers = {"x": source.address, "y": mean.data_ptr()}
            module.run_op("global_avg_pool", params | {"ldx": source.ld}, pointers, threads=0)
            assert_bit_equal(mean[:-16].view(n, c), x.double().mean((2, 3)).float(), "global_avg_pool")
            assert (mean[-16:] == MARK).all()

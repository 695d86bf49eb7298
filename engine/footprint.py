"""Whether a kernel stays inside the memory that it is given: for plans that come from files.

A plan of a model is made from what PyTorch says about it. A file can say anything, and kernels take addresses
at their word. So every call is measured before it is made: the bytes that it reads and writes, by its
parameters, against the memory that is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .costs import PRODUCTS
from .plan import ARENA, FLOAT, INPUT, Plan, Value
from .weights import filter_numbers, packing

FILTERING = (*PRODUCTS, "squared_distances")  # with as many output channels as filters
POOLS = ("max_pool2d", "avg_pool2d")
LARGEST = 1 << 31  # of a size, as in the library
MOST_NUMBERS = 1 << 40  # of a weight: below it the library's own products fit
ALIGNED = 64

Params = Mapping[str, Any]


class OutOfBounds(ValueError):
    """A step would read or write what it was not given."""


def output_size(kernel: str, p: Params) -> tuple[int, int]:
    """Pixels down and across of what the kernel writes."""
    if kernel in ("global_avg_pool", "linear", "squared_distances"):
        return 1, 1
    return _along(kernel, p, "h", "r", "bottom"), _along(kernel, p, "w", "s", "right")


def _along(kernel: str, p: Params, axis: str, taps: str, behind: str) -> int:
    if p.get(f"out_{axis}", 0) > 0:
        return p[f"out_{axis}"]
    size, window, stride = p[axis], p.get(taps, 1), p.get(f"stride_{axis}", 1)
    before = p.get(f"pad_{axis}", 0)
    after = p.get(f"pad_{behind}", -1)
    padded = before + size + (before if after < 0 else after)
    if kernel not in POOLS:
        return (padded - p.get(f"dilation_{axis}", 1) * (window - 1) - 1) // stride + 1
    upwards = bool(p.get("ceil_mode"))
    out = (padded - window + (stride - 1 if upwards else 0)) // stride + 1
    return out - 1 if upwards and (out - 1) * stride >= before + size else out


def memory_of(plan: Plan) -> dict[int, int]:
    """Bytes behind each slot of a native plan."""
    found = {ARENA: plan.arena_bytes}
    for value in plan.values:
        if value.home == "input" or value.is_external:
            found[plan.places[value.id].slot] = plan.batch * value.pixels * value.channels * FLOAT
    assert INPUT in found
    return found


def check_sizes(kernel: str, params: Params, x: Value, y: Value) -> None:
    """Raises OutOfBounds where a map is not what the kernel takes it for: it reads and writes all of it."""
    height, width = output_size(kernel, params)
    filters = params["k"] if kernel in FILTERING else params["c"]
    for value, pixels, channels in (
        (x, params["h"] * params["w"], params["c"]),
        (y, height * width, filters),
    ):
        if (value.pixels, value.channels) != (pixels, channels):
            has = f"{value.pixels} pixels of {value.channels} channels"
            raise OutOfBounds(f"{kernel} takes {has} for {pixels} of {channels}")


def check_call(
    kernel: str,
    params: Params,
    operands: Mapping[str, tuple[int, int]],
    constants: Mapping[str, Tensor],
    memory: Mapping[int, int],
    native: Any,
) -> None:
    """Raises OutOfBounds. Parameters with batch and strides, operands and constants as Plan.add gets them."""
    if any(type(value) is int and abs(value) > LARGEST for value in params.values()):
        raise OutOfBounds(f"{kernel} has a parameter above {LARGEST}")
    if refusal := native.refusal(kernel, dict(params)):
        raise OutOfBounds(f"{kernel}: {refusal}")
    n, c, k = params["n"], params["c"], params.get("k", params["c"])
    k = k if kernel in FILTERING else c
    pixels = n * params["h"] * params["w"]
    height, width = output_size(kernel, params)
    written = n * height * width
    if kernel in ("to_nhwc", "to_nchw") or params.get("nchw_in"):
        planar_in, planar_out = kernel != "to_nchw", kernel == "to_nchw"
    else:
        planar_in = planar_out = False
    strides = {role: params.get(name, wide) for role, name, wide in (
        ("x", "ldx", c), ("y", "ldy", k), ("residual", "ldr", k), ("gate", "ldg", k))}  # fmt: skip
    reach = {
        "x": pixels * c if planar_in else _reach(pixels, strides["x"], c),
        "y": written * k if planar_out else _reach(written, strides["y"], k),
        "residual": _reach(written, strides["residual"], k),
        "gate": _reach(n, strides["gate"], k),
    }
    for role, (slot, offset) in operands.items():
        bytes_there = memory.get(slot, 0)
        if offset < 0 or offset % FLOAT or offset + reach[role] * FLOAT > bytes_there:
            reached = f"bytes {offset} to {offset + reach[role] * FLOAT}"
            raise OutOfBounds(f"{kernel} would use {reached} of {bytes_there} for {role}")
    missing = {"x", "y"} - operands.keys()
    if missing or (params.get("gated") and "gate" not in operands):
        raise OutOfBounds(f"{kernel} has no {', '.join(missing) or 'gate'}")
    _check_constants(kernel, params, constants, c, k, native)


def _reach(pixels: int, stride: int, channels: int) -> int:
    if stride < channels:
        raise OutOfBounds(f"pixels of {channels} channels lie {stride} apart")
    return (pixels - 1) * stride + channels if pixels > 0 else 0


def _check_constants(
    kernel: str, params: Params, constants: Mapping[str, Tensor], c: int, k: int, native: Any
) -> None:
    expected = {"bias": k, "scale": k, "pre_scale": c, "pre_shift": c, "depth_bias": c, "depth_scale": c}
    if kernel in FILTERING:
        expected["weight"] = _packed_floats("weight", kernel, params, native)
    else:
        expected["weight"] = c
    if kernel == "separable_conv2d":
        expected["depth_weight"] = _packed_floats("depth", kernel, params, native)
    needed = {"weight"} if kernel in FILTERING else set()
    needed |= {"depth_weight"} if kernel == "separable_conv2d" else set()
    needed |= {"pre_scale", "pre_shift"} if params.get("pre") else set()
    if missing := needed - constants.keys():
        raise OutOfBounds(f"{kernel} has no {', '.join(sorted(missing))}")
    for name, tensor in constants.items():
        if tensor.numel() < expected[name] or not tensor.is_contiguous():
            raise OutOfBounds(f"{kernel} has {tensor.numel()} numbers for {name}, expected {expected[name]}")
        if "weight" in name and tensor.data_ptr() % ALIGNED and expected[name] > k:
            raise OutOfBounds(f"{kernel} has a {name} that is not aligned")


def _packed_floats(part: str, kernel: str, params: Params, native: Any) -> int:
    kind, spec = packing(part, kernel, params)
    assert kind is not None
    if filter_numbers(kind, spec) > MOST_NUMBERS:
        raise OutOfBounds(f"{kernel} has more than {MOST_NUMBERS} weights")
    return native.packed_floats(kind, spec)

"""Whether numbers are right, as sentences, "" where they are: for tests and `fast-backbones selftest`."""

from __future__ import annotations

import torch
from torch import Tensor


def same_kind(actual: Tensor, expected: Tensor) -> str:
    """Of the same type and sizes."""
    if actual.dtype != expected.dtype:
        return f"dtype {actual.dtype}, expected {expected.dtype}"
    if actual.shape != expected.shape:
        return f"sizes {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return ""


def where(wrong: Tensor, actual: Tensor, expected: Tensor) -> str:
    """How many elements are wrong, and the first of them."""
    index = tuple(int(i) for i in wrong.nonzero()[0])
    found, wanted = actual[index].item(), expected[index].item()
    count = int(wrong.sum())
    return f"{count} of {wrong.numel()} elements differ, first at {index}: got {found!r}, expected {wanted!r}"


def equal(actual: Tensor, expected: Tensor) -> str:
    """Every value equal, NaN where NaN. The sign of a zero is free: an empty sum may be either."""
    unlike = same_kind(actual, expected)
    if unlike:
        return unlike
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    return where(wrong, actual, expected) if wrong.any() else ""


def bit_equal(actual: Tensor, expected: Tensor) -> str:
    """The same bits, signs of zeros and payloads of NaN included. For float32."""
    unlike = same_kind(actual, expected)
    if unlike:
        return unlike
    wrong = actual.contiguous().view(torch.int32) != expected.contiguous().view(torch.int32)
    return where(wrong, actual, expected) if wrong.any() else ""


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Maximum and rms of the error, relative to the rms of the exact values."""
    exact = exact.double()
    scale = exact.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    error = (actual.double() - exact) / scale
    return error.abs().max().item(), error.square().mean().sqrt().item()


def within_twice(fast: Tensor, plain: Tensor, exact: Tensor) -> str:
    """The 2x rule: error of `fast` at most twice that of `plain`, PyTorch's own run in the same precision.

    Maximum and rms, relative to the rms of `exact` (float64), plus two units in the last place of the largest
    output and half a unit of the typical one, without which a plain result that happens to be exact would
    allow no rounding at all. The maximum over few elements is noise: hand in some thousands, from several
    seeds if need be.
    """
    if exact.dtype != torch.float64:
        return f"exact is {exact.dtype}, expected float64"
    unlike = same_kind(fast, plain)
    if unlike:
        return unlike
    if fast.isnan().any():
        return "NaN in the result"
    eps = torch.finfo(fast.dtype).eps
    peak = exact.abs().max() / exact.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    floors = (2 * eps * peak.item(), eps / 2)
    for name, ours, theirs, floor in zip(("max", "rms"), errors(fast, exact), errors(plain, exact), floors):
        allowed = 2 * theirs + floor
        if not ours <= allowed:
            return f"{name} error {ours:.3g}, PyTorch {theirs:.3g}, allowed {allowed:.3g}"
    return ""

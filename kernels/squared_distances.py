"""Distances of rows to centres: radial basis functions (LeCun et al. 1998, Proc. IEEE: LeNet-5's output)."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _native
from ._function import Function


def squared_distances_ref(x: Tensor, centers: Tensor) -> Tensor:
    """The formula in plain PyTorch: all differences, squared and summed. Any dtype, any device."""
    return _formula(x, centers)


def _formula(x, centers) -> Tensor:
    return (x.unsqueeze(1) - centers).square().sum(2)


def _prepare(x, centers) -> tuple:
    op = "squared_distances"
    _checks.tensor(op, "x", x)
    _checks.tensor(op, "centers", centers)
    _checks.same_kind(op, x, False, centers=centers)
    if centers.dim() != 2 or centers.numel() == 0:
        raise RuntimeError(
            f"{op}: centers has sizes {_checks.sizes(centers)}, expected [K, C], neither of them 0"
        )
    if x.dim() != 2 or x.shape[1] != centers.shape[1]:
        expected = f"[N, {centers.shape[1]}] for centers {_checks.sizes(centers)}"
        raise RuntimeError(f"{op}: x has sizes {_checks.sizes(x)}, expected {expected}")
    return x, centers


class _NativeSquaredDistances(Function):
    """Native forward with the derivative of the formula."""

    @staticmethod
    def forward(x, centers):
        return torch.ops.fast_backbones.squared_distances(x, centers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, centers = ctx.saved_tensors
        needs_x, needs_centers = ctx.needs_input_grad
        each = grad.unsqueeze(2) * (2 * (x.unsqueeze(1) - centers))
        return each.sum(1) if needs_x else None, each.neg().sum(0) if needs_centers else None


def _refuse(x, centers) -> str | None:
    return _native.refusal(x, centers)


def _run(x, centers) -> Tensor:
    if _native.needs_grad(x, centers):
        return _NativeSquaredDistances.apply(x, centers)
    return torch.ops.fast_backbones.squared_distances(x, centers)


@_native.register_fake("squared_distances")
def _fake(x, centers):
    _checks.same_kind("squared_distances", x, False, centers=centers)
    return torch.empty((x.shape[0], centers.shape[0]), dtype=x.dtype, device=x.device)


_OP = _dispatch.register(
    "squared_distances",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def squared_distances(x: Tensor, centers: Tensor, *, backend: str | None = None) -> Tensor:
    """The squared distance of every row to every centre.

    y[n, k] = sum_c (x[n, c] - centers[k, c])^2

    Args:
        x: [N, C], any dtype. centers: [K, C], same dtype and device.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: [N, K], contiguous.
    Raises: RuntimeError for sizes, dtypes or devices that do not fit together, or when a backend asked for by
        name refuses; TypeError for what is not a tensor; ValueError for an unknown backend.

    Fast path: float32 on the CPU, in float64 and rounded once; PyTorch's formula makes a tensor [N, K, C].
    Derivatives come from the formula.
    """
    if has_torch_function_variadic(x, centers):
        return handle_torch_function(squared_distances, (x, centers), x, centers, backend=backend)
    return _dispatch.run(_OP, _prepare(x, centers), backend)

"""The classifier: a matrix product with bias and activation in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _native
from ._function import Function


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """The formula in plain PyTorch: F.linear, then the activation. Any dtype, any device."""
    return _formula(x, weight, bias, activation)


def _formula(x, weight, bias, activation) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.relu(y) if activation == "relu" else y


def _prepare(x, weight, bias=None, *, activation="none") -> tuple:
    op = "linear"
    _checks.tensor(op, "x", x)
    _checks.tensor(op, "weight", weight)
    _checks.same_kind(op, x, True, weight=weight, bias=bias)
    _checks.activation(op, activation)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise RuntimeError(
            f"{op}: weight has sizes {_checks.sizes(weight)}, expected [K, C], neither of them 0"
        )
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        expected = f"[..., {weight.shape[1]}] for weight {_checks.sizes(weight)}"
        raise RuntimeError(f"{op}: x has sizes {_checks.sizes(x)}, expected {expected}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise RuntimeError(f"{op}: bias has sizes {_checks.sizes(bias)}, expected [{weight.shape[0]}]")
    return x, weight, bias, activation


class _NativeLinear(Function):
    """Native forward with the derivative of the formula; x is [N, C] here."""

    @staticmethod
    def forward(x, weight, bias, activation):
        return torch.ops.fast_backbones.linear(x, weight, bias, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, activation = inputs
        ctx.save_for_backward(x, weight, output if activation == "relu" else None)

    @staticmethod
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            grad @ weight if needs_x else None,
            grad.t() @ x if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            None,
        )


def _refuse(x, weight, bias, activation) -> str | None:
    return _native.refusal(x, weight, bias, cast_by_autocast=True)


def _run(x, weight, bias, activation) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if _native.needs_grad(x, weight, bias):
        y = _NativeLinear.apply(rows, weight, bias, activation)
    else:
        y = torch.ops.fast_backbones.linear(rows, weight, bias, activation)
    return y if x.dim() == 2 else y.reshape(x.shape[:-1] + (weight.shape[0],))


@_native.register_fake("linear")
def _fake(x, weight, bias, activation):
    _checks.same_kind("linear", x, False, weight=weight, bias=bias)
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


_OP = _dispatch.register(
    "linear",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Multiply by the transposed weight, add the bias, apply the activation, in one pass.

    y[..., k] = act( sum_c x[..., c] * weight[k, c] + bias[k] )

    Args:
        x: [..., C], any floating dtype. weight: [K, C]. bias: [K] or None; same dtype and device as x.
        activation: "none" or "relu".
        backend: None (the current one), "auto", "native" or "reference".
    Returns: [..., K], contiguous.
    Raises: RuntimeError for sizes, dtypes or devices that do not fit together, or when a backend asked for by
        name refuses; ValueError for an unknown activation or backend; TypeError for what is not a tensor.

    Fast path: float32 on the CPU. Products are added in blocks of at most 128. Derivatives come from the
    formula.
    """
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(
            linear, (x, weight, bias), x, weight, bias, activation=activation, backend=backend
        )
    return _dispatch.run(_OP, _prepare(x, weight, bias, activation=activation), backend)

"""1x1 convolution: a matrix product over the channels of every pixel, with its epilogue in the same pass."""

from collections.abc import Sequence

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _conv, _dispatch


def pointwise_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The formula in plain PyTorch: F.conv2d, the residual, the activation. Any dtype, any device."""
    return _conv.formula(x, weight, bias, residual, stride, 0, 1, 1, activation)


def _prepare(x, weight, bias=None, *, stride=1, residual=None, activation="none") -> tuple:
    _checks.tensor("pointwise_conv2d", "weight", weight)
    if weight.dim() != 4 or weight.shape[2:] != (1, 1):
        raise RuntimeError(
            f"pointwise_conv2d: weight has sizes {_checks.sizes(weight)}, expected [K, C, 1, 1]"
        )
    stride = _checks.pair("pointwise_conv2d", "stride", stride, 1)
    return _conv.check("pointwise_conv2d", x, weight, bias, residual, stride, (0, 0), (1, 1), 1, activation)


_OP = _dispatch.register(
    "pointwise_conv2d",
    _prepare,
    _conv.native("direct", "conv2d", _conv.refuse_nothing),
    _dispatch.reference(_conv.formula),
)


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Mix the channels of every pixel, add the bias and the residual, apply the activation, in one pass.

    y[n, k, p, q] = act( sum_c x[n, c, p*stride, q*stride] * weight[k, c] + bias[k] + residual[n, k, p, q] )

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout. The output is channels_last when x or
            weight is, else contiguous.
        weight: [K, C, 1, 1], same dtype and device as x. bias: [K] or None.
        stride: an integer or two. residual: [N, K, P, Q] or None. activation: "none" or "relu".
        backend: None (the current one), "auto", "native", "direct" or "reference".
    Returns: [N, K, P, Q], P = (H - 1) // stride + 1.
    Raises: as `conv2d`.

    Fast path: float32 on the CPU, any sizes. Products are added in blocks of at most 128. Gradients as
    of `conv2d`.
    """
    if has_torch_function_variadic(x, weight, bias, residual):
        return handle_torch_function(
            pointwise_conv2d,
            (x, weight, bias, residual),
            x,
            weight,
            bias,
            stride=stride,
            residual=residual,
            activation=activation,
            backend=backend,
        )
    args = _prepare(x, weight, bias, stride=stride, residual=residual, activation=activation)
    y = _dispatch.run(_OP, args, backend)
    return y.squeeze(0) if x.dim() == 3 else y

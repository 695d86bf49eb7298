"""Grouped convolution: each group of channels has its own filters (Xie et al., ResNeXt, arXiv 1611.05431)."""

from collections.abc import Sequence

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _conv, _dispatch, _gpu_conv


def grouped_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    groups: int,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The formula in plain PyTorch: F.conv2d, the residual, the activation. Any dtype, any device."""
    return _conv.formula(x, weight, bias, residual, stride, padding, 1, groups, activation)


def _prepare(x, weight, bias=None, *, stride=1, padding=1, groups, residual=None, activation="none") -> tuple:
    stride = _checks.pair("grouped_conv2d", "stride", stride, 1)
    padding = _checks.pair("grouped_conv2d", "padding", padding, 0)
    return _conv.check(
        "grouped_conv2d", x, weight, bias, residual, stride, padding, (1, 1), groups, activation
    )


_OP = _dispatch.register(
    "grouped_conv2d",
    _prepare,
    _conv.native("rows", "grouped_conv2d", _conv.refuse_grouped),
    _conv.native("direct", "conv2d", _conv.refuse_nothing),
    _gpu_conv.TRITON_GROUPED,
    _gpu_conv.LIBRARY,
    _dispatch.reference(_conv.formula),
)


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    groups: int,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve each group of channels with its own filters, add bias and residual, activate, in one pass.

    y[n, k, p, q] = act( sum_crs x[n, g(k)*C/G + c, p*stride + r - padding, q*stride + s - padding]
                                 * weight[k, c, r, s]  + bias[k] + residual[n, k, p, q] ),   g(k) = k // (K/G)

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout. The output is channels_last when x or
            weight is, else contiguous.
        weight: [K, C/G, R, S], same dtype and device as x. bias: [K] or None.
        stride, padding: an integer or two. groups: G, divides C and K.
        residual: [N, K, P, Q] or None. activation: "none" or "relu".
        backend: None (the current one), "auto", "native", "rows", "direct", "gpu", "triton", "library" or
            "reference".
    Returns: [N, K, P, Q], P = (H + 2*padding - R) // stride + 1.
    Raises: as `conv2d`.

    Fast path: float32 on the CPU. "rows" takes 3x3 with 4, 8, 16 or 32 output channels per group from as
    many (ResNeXt) or half as many (SENet-154), padding 0 or 1, stride 1 or 2; "direct" takes anything, group
    by group. 3x3 with 4 to 32 channels per group has native gradients; others, and second derivatives, come
    from the formula. On a GPU as `conv2d`.
    """
    if has_torch_function_variadic(x, weight, bias, residual):
        return handle_torch_function(
            grouped_conv2d,
            (x, weight, bias, residual),
            x,
            weight,
            bias,
            stride=stride,
            padding=padding,
            groups=groups,
            residual=residual,
            activation=activation,
            backend=backend,
        )
    args = _prepare(
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        groups=groups,
        residual=residual,
        activation=activation,
    )
    y = _dispatch.run(_OP, args, backend)
    return y.squeeze(0) if x.dim() == 3 else y

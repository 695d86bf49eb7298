"""Convolution of any kernel, stride, padding, dilation and groups, with its epilogue in the same pass."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _conv, _dispatch, _gpu_conv


def conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The formula in plain PyTorch: F.conv2d, the residual, the activation. Any dtype, any device."""
    return _conv.formula(x, weight, bias, residual, stride, padding, dilation, groups, activation)


def _prepare(
    x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1, residual=None, activation="none"
) -> tuple:
    stride = _checks.pair("conv2d", "stride", stride, 1)
    dilation = _checks.pair("conv2d", "dilation", dilation, 1)
    if isinstance(padding, str):
        x, padding = _named_padding(x, weight, stride, padding, dilation)
    else:
        padding = _checks.pair("conv2d", "padding", padding, 0)
    return _conv.check("conv2d", x, weight, bias, residual, stride, padding, dilation, groups, activation)


def _named_padding(x, weight, stride, padding, dilation) -> tuple[Tensor, tuple[int, int]]:
    """Torch's "valid" and "same"; an odd total puts the extra row or column behind: x is padded first."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"conv2d: padding is {padding!r}, expected integers, 'valid' or 'same'")
    if weight.dim() != 4:  # the check that follows says so
        return x, (0, 0)
    if stride != (1, 1):
        raise RuntimeError(f"conv2d: padding is 'same' and stride {stride}, expected stride 1")
    rows, columns = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    if rows % 2 or columns % 2:
        x = F.pad(x, (0, columns % 2, 0, rows % 2))
    return x, (rows // 2, columns // 2)


_OP = _dispatch.register(
    "conv2d",
    _prepare,
    *(_conv.native(name, kernel, refuse, decline=decline) for name, kernel, refuse, decline in _conv.NATIVE),
    _gpu_conv.TRITON_GROUPED,
    _gpu_conv.LIBRARY,
    _dispatch.reference(_conv.formula),
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve, add the bias and the residual, apply the activation, in one pass over the output.

    y[n, k, p, q] = act( sum_crs x[n, c, p*stride + r*dilation - padding, q*stride + s*dilation - padding]
                                 * weight[k, c, r, s]  + bias[k] + residual[n, k, p, q] )

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout. The output is channels_last when x or
            weight is, else contiguous.
        weight: [K, C/groups, R, S], same dtype and device as x.
        bias: [K] or None. Batch norm is expected to be folded in already.
        stride, dilation: an integer or two. padding: an integer or two, "valid" or "same".
        residual: [N, K, P, Q] or None, added before the activation.
        activation: "none" or "relu".
        backend: None (the current one), "auto", "native", "gpu", "reference", or one of "grouped",
            "winograd", "direct", "triton", "library".
    Returns: [N, K, P, Q], P = (H + 2*padding - dilation*(R - 1) - 1) // stride + 1.
    Raises: RuntimeError for sizes, dtypes or devices that do not fit together, or when a backend asked for by
        name refuses; ValueError for an unknown activation, padding or backend; TypeError for what is not a
        tensor or an integer.

    Fast path: float32 on the CPU. 3x3 of stride 1 takes Winograd's algorithm (Lavin and Gray, arXiv
    1509.09308) from 16 channels on: F(4x4, 3x3) at a complex point where the image has 40 tiles of 4x4
    outputs, F(2x2, 3x3) below; 5x5 takes F(2x2, 5x5), 1x7 and 7x1 F(4, 7) in one dimension. 3x3 with 4, 8, 16
    or 32 output channels a group, from as many or half as many, takes its own kernel, the rest register tiles
    straight from the image. Products are added in blocks of at most 128, so the order of summation differs
    from PyTorch's. With Winograd an infinite or NaN pixel spoils the whole output tiles that touch it, where
    the formula spoils single pixels. Gradients come from native kernels: of the filters from 16 channels on,
    of x at stride 1, of groups of 4 to 32 channels; others, and second derivatives, from the formula. Forward
    mode and torch.func take the reference. On a GPU (with FB_GPU_PLANS=1), float32, float16 and bfloat16,
    "triton" takes groups of 3x3 with 2 to 64 channels, forward and both gradients; "library" is PyTorch's
    convolution, for training, and keeps batch norm's input in the place of its own.
    """
    if has_torch_function_variadic(x, weight, bias, residual):
        return handle_torch_function(
            conv2d,
            (x, weight, bias, residual),
            x,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
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
        dilation=dilation,
        groups=groups,
        residual=residual,
        activation=activation,
    )
    y = _dispatch.run(_OP, args, backend)
    return y.squeeze(0) if x.dim() == 3 else y

"""The first convolution of a network: few channels, a large kernel, an image as it comes from the loader."""

from collections.abc import Sequence

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _conv, _dispatch


def stem_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 3,
    activation: str = "none",
) -> Tensor:
    """The formula in plain PyTorch: F.conv2d, then the activation. Any dtype, any device."""
    return _conv.formula(x, weight, bias, None, stride, padding, 1, 1, activation)


def _prepare(x, weight, bias=None, *, stride=2, padding=3, activation="none") -> tuple:
    stride = _checks.pair("stem_conv2d", "stride", stride, 1)
    padding = _checks.pair("stem_conv2d", "padding", padding, 0)
    return _conv.check("stem_conv2d", x, weight, bias, None, stride, padding, (1, 1), 1, activation)


_OP = _dispatch.register(
    "stem_conv2d",
    _prepare,
    _conv.native("direct", "conv2d", _conv.refuse_nothing),
    _dispatch.reference(_conv.formula),
)


def stem_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 3,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve an image, planar or channels_last, add the bias and apply the activation in one pass.

    y[n, k, p, q] = act( sum_crs x[n, c, p*stride + r - padding, q*stride + s - padding] * weight[k, c, r, s]
                         + bias[k] )

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout. The output is channels_last when x or
            weight is, else contiguous.
        weight: [K, C, R, S], same dtype and device as x; 7x7 with stride 2 and padding 3 in the ResNets.
        bias: [K] or None.
        stride, padding: an integer or two. activation: "none" or "relu".
        backend: None (the current one), "auto", "native", "direct" or "reference".
    Returns: [N, K, P, Q], P = (H + 2*padding - R) // stride + 1.
    Raises: as `conv2d`.

    Fast path: float32 on the CPU; a contiguous image of up to 4 channels is read as it lies. Gradients as of
    `conv2d`.
    """
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(
            stem_conv2d,
            (x, weight, bias),
            x,
            weight,
            bias,
            stride=stride,
            padding=padding,
            activation=activation,
            backend=backend,
        )
    args = _prepare(x, weight, bias, stride=stride, padding=padding, activation=activation)
    y = _dispatch.run(_OP, args, backend)
    return y.squeeze(0) if x.dim() == 3 else y

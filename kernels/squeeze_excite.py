"""Channel gates from the means of channels (Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _native


def squeeze_excite_ref(x, weight1, bias1, weight2, bias2) -> Tensor:
    """The formula in plain PyTorch. Any floating dtype, any device."""
    return _formula(x, weight1.flatten(1), bias1, weight2.flatten(1), bias2)


def _gate(x, weight1, bias1, weight2, bias2) -> tuple[Tensor, Tensor, Tensor]:
    """Means, hidden layer and gate."""
    means = x.mean((-2, -1))
    hidden = F.relu(F.linear(means, weight1, bias1))
    return means, hidden, torch.sigmoid(F.linear(hidden, weight2, bias2))


def _formula(x, weight1, bias1, weight2, bias2) -> Tensor:
    return x * _gate(x, weight1, bias1, weight2, bias2)[2][..., None, None]


def _prepare(x, weight1, bias1, weight2, bias2) -> tuple:
    op = "squeeze_excite"
    for name, t in (("x", x), ("weight1", weight1), ("weight2", weight2)):
        _checks.tensor(op, name, t)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    _checks.image(op, x)
    _checks.same_kind(op, x, True, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    channels = x.shape[1]
    weight1 = _matrix("weight1", weight1, None, channels)
    weight2 = _matrix("weight2", weight2, channels, weight1.shape[0])
    for name, t, size in (("bias1", bias1, weight1.shape[0]), ("bias2", bias2, channels)):
        if t is not None and t.shape != (size,):
            raise RuntimeError(f"{op}: {name} has sizes {_checks.sizes(t)}, expected [{size}]")
    return x, weight1, bias1, weight2, bias2


def _matrix(name: str, weight: Tensor, outputs: int | None, inputs: int) -> Tensor:
    """[outputs, inputs] from that or from a 1x1 filter."""
    flat = weight.dim() == 2 or (weight.dim() == 4 and weight.shape[2:] == (1, 1))
    if not flat or weight.shape[1] != inputs or weight.shape[0] != (outputs or weight.shape[0] or None):
        expected = f"[{outputs or 'R'}, {inputs}] or [{outputs or 'R'}, {inputs}, 1, 1]"
        raise RuntimeError(f"squeeze_excite: {name} has sizes {_checks.sizes(weight)}, expected {expected}")
    return weight.flatten(1)


class _NativeSqueezeExcite(torch.autograd.Function):
    """Native forward with the derivative of the formula; means, hidden layer and gate are computed again."""

    @staticmethod
    def forward(x, weight1, bias1, weight2, bias2):
        return torch.ops.fast_backbones.squeeze_excite(x, weight1, bias1, weight2, bias2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight1, bias1, weight2, bias2 = ctx.saved_tensors
        needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = ctx.needs_input_grad
        means, hidden, gate = _gate(x, weight1, bias1, weight2, bias2)
        grad2 = (grad * x).sum((2, 3)) * gate * (1 - gate)
        grad1 = torch.ops.aten.threshold_backward(grad2 @ weight2, hidden, 0)
        grad_x = None
        if needs_x:
            share = (grad1 @ weight1) / (x.shape[2] * x.shape[3])
            grad_x = grad * gate[:, :, None, None] + share[:, :, None, None]
        return (
            grad_x,
            grad1.t() @ means if needs_weight1 else None,
            grad1.sum(0) if needs_bias1 else None,
            grad2.t() @ hidden if needs_weight2 else None,
            grad2.sum(0) if needs_bias2 else None,
        )


def _refuse(x, weight1, bias1, weight2, bias2) -> str | None:
    return _native.refusal(x, weight1, bias1, weight2, bias2, cast_by_autocast=True)


def _run(x, weight1, bias1, weight2, bias2) -> Tensor:
    if _native.needs_grad(x, weight1, bias1, weight2, bias2):
        return _NativeSqueezeExcite.apply(x, weight1, bias1, weight2, bias2)
    return torch.ops.fast_backbones.squeeze_excite(x, weight1, bias1, weight2, bias2)


@_native.register_fake("squeeze_excite")
def _fake(x, weight1, bias1, weight2, bias2):
    _checks.same_kind("squeeze_excite", x, False, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_native.memory_format(x))


_OP = _dispatch.register(
    "squeeze_excite",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiply every channel by a gate between 0 and 1 that two small layers make of the channels' means.

    y[n, c, h, w] = x[n, c, h, w] * sigmoid(weight2 relu(weight1 mean_hw(x[n]) + bias1) + bias2)[c]

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout; the output keeps its layout.
        weight1: [R, C], weight2: [C, R]; 1x1 filters [R, C, 1, 1] and [C, R, 1, 1] are taken as well.
        bias1: [R] or None. bias2: [C] or None. All of the dtype and on the device of x.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: the sizes of x.
    Raises: RuntimeError for sizes, dtypes or devices that do not fit together, or when a backend asked for by
        name refuses; ValueError for an unknown backend; TypeError for what is not a tensor.

    Fast path: float32 on the CPU. Derivatives come from the formula.
    """
    if has_torch_function_variadic(x, weight1, bias1, weight2, bias2):
        tensors = (x, weight1, bias1, weight2, bias2)
        return handle_torch_function(squeeze_excite, tensors, *tensors, backend=backend)
    y = _dispatch.run(_OP, _prepare(x, weight1, bias1, weight2, bias2), backend)
    return y.squeeze(0) if x.dim() == 3 else y

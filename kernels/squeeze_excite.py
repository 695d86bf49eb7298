"""Channel gates from the means of channels (Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507),
with the addition and activation behind them, forward and backward in two passes each."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _gpu_squeeze_excite, _gpu_training, _native, _recompute
from ._activation import NAMES, activated, unpacked
from ._function import Function

GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": F.relu}


def squeeze_excite_ref(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    gate: str = "sigmoid",
) -> Tensor:
    """The formula in plain PyTorch. Any floating dtype, any device."""
    layers = weight1.flatten(1), bias1, weight2.flatten(1), bias2
    return _formula(x, *layers, residual, activation, gate)


def _gate(x, weight1, bias1, weight2, bias2, gate="sigmoid") -> tuple[Tensor, Tensor, Tensor]:
    """Means, hidden layer and gate."""
    means = x.mean((-2, -1))
    hidden = F.relu(F.linear(means, weight1, bias1))
    return means, hidden, GATES[gate](F.linear(hidden, weight2, bias2))


def _formula(x, weight1, bias1, weight2, bias2, residual, activation, gate) -> Tensor:
    y = x * _gate(x, weight1, bias1, weight2, bias2, gate)[2][..., None, None]
    return activated(y if residual is None else y + residual, activation)


def _prepare(x, weight1, bias1, weight2, bias2, *, residual=None, activation="none", gate="sigmoid") -> tuple:
    op = "squeeze_excite"
    _checks.activation(op, activation, "activation", NAMES)
    _checks.activation(op, gate, "gate", tuple(GATES))
    for name, t in (("x", x), ("weight1", weight1), ("weight2", weight2)):
        _checks.tensor(op, name, t)
    _checks.same_kind(
        op, x, True, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, residual=residual
    )
    if residual is not None and residual.shape != x.shape:
        got = _checks.sizes(residual)
        raise RuntimeError(f"{op}: residual has sizes {got}, expected those of x, {_checks.sizes(x)}")
    if x.dim() == 3:
        x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    _checks.image(op, x)
    channels = x.shape[1]
    weight1 = _matrix("weight1", weight1, None, channels)
    weight2 = _matrix("weight2", weight2, channels, weight1.shape[0])
    for name, t, size in (("bias1", bias1, weight1.shape[0]), ("bias2", bias2, channels)):
        if t is not None and t.shape != (size,):
            raise RuntimeError(f"{op}: {name} has sizes {_checks.sizes(t)}, expected [{size}]")
    return x, weight1, bias1, weight2, bias2, residual, activation, gate


def _matrix(name: str, weight: Tensor, outputs: int | None, inputs: int) -> Tensor:
    """[outputs, inputs] from that or from a 1x1 filter."""
    flat = weight.dim() == 2 or (weight.dim() == 4 and weight.shape[2:] == (1, 1))
    if not flat or weight.shape[1] != inputs or weight.shape[0] != (outputs or weight.shape[0] or None):
        expected = f"[{outputs or 'R'}, {inputs}] or [{outputs or 'R'}, {inputs}, 1, 1]"
        raise RuntimeError(f"squeeze_excite: {name} has sizes {_checks.sizes(weight)}, expected {expected}")
    return weight.flatten(1)


class _NativeSqueezeExcite(Function):
    """y, means, hidden layer, gate, and a bit for each element that the activation passed. Keeps the layers
    and those, and x or what x is computed from, but not y."""

    @staticmethod
    def forward(x, weight1, bias1, weight2, bias2, residual, activation):
        op = torch.ops.fast_backbones.squeeze_excite
        return op(x, weight1, bias1, weight2, bias2, residual, activation, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *layers, _, ctx.activation = inputs
        kept, ctx.how = _recompute.keep(x)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*layers, *output[1:], *kept)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 7
        weight1, bias1, weight2, bias2, means, hidden, gate, mask, *kept = ctx.saved_tensors
        x = _recompute.restore(kept, ctx.how)
        mask = None if ctx.activation == "none" else mask
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled() or grad.numel() == 0:  # somebody wants derivatives of this
            passed = None if mask is None else unpacked(mask, x)
            found = _gradient_formula(grad, x, passed, weight1, bias1, weight2, bias2)
        elif mask is None and not any(needs[:5]):
            found = (*(None,) * 5, grad)
        else:
            plain = mask is None  # dresidual is grad itself
            backward = torch.ops.fast_backbones.squeeze_excite_backward
            kept = weight1, weight2, means, hidden, gate
            found = backward(grad, x, mask, *kept, *needs[:5], needs[5] and not plain)
            found = (*found[:5], grad if plain else found[5])
        return *(gradient if needed else None for gradient, needed in zip(found, needs)), None


class _GpuSqueezeExcite(Function):
    """The same by the kernels for GPUs; the mask is empty without a residual."""

    @staticmethod
    def forward(x, weight1, bias1, weight2, bias2, residual, activation):
        return _gpu_squeeze_excite.forward(x, weight1, bias1, weight2, bias2, residual, activation, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *layers, _, ctx.activation = inputs
        kept, ctx.how = _recompute.keep(x)
        ctx.has_mask = output[-1].numel() > 0
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*layers, *output[1:], *kept)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 7
        weight1, bias1, weight2, bias2, means, hidden, gate, mask, *kept = ctx.saved_tensors
        x = _recompute.restore(kept, ctx.how)
        mask = mask if ctx.has_mask else None
        small, needs = (weight1, bias1, weight2, bias2), ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            passed = _gpu_squeeze_excite.passed(mask, x, gate, ctx.activation)
            found = _gradient_formula(grad.float(), x.float(), passed, *_gpu_squeeze_excite.wide(*small))
            kinds = (x, *small, grad)
            found = tuple(t if kind is None else t.to(kind.dtype) for t, kind in zip(found, kinds))
        else:
            how = ctx.activation, needs
            found = _gpu_squeeze_excite.backward(grad, x, mask, small, means, hidden, gate, *how)
        return *(gradient if needed else None for gradient, needed in zip(found, needs)), None


def _gradient_formula(grad, x, passed, weight1, bias1, weight2, bias2) -> tuple[Tensor, ...]:
    """Of x, the layers and residual, in operations that autograd knows; computed in float32. passed: where
    the activation did, None without one."""
    dtype = x.dtype
    grad, x = grad.float(), x.float()
    means, hidden, gate = _gate(x, weight1, bias1, weight2, bias2)
    if passed is not None:
        grad = grad.masked_fill(~passed, 0.0)
    grad2 = (grad * x).sum((2, 3)) * gate * (1 - gate)
    grad1 = torch.ops.aten.threshold_backward(grad2 @ weight2, hidden, 0)
    share = (grad1 @ weight1) / (x.shape[2] * x.shape[3])
    dx = grad * gate[:, :, None, None] + share[:, :, None, None]
    return dx.to(dtype), grad1.t() @ means, grad1.sum(0), grad2.t() @ hidden, grad2.sum(0), grad.to(dtype)


def _refuse(x, weight1, bias1, weight2, bias2, residual, activation, gate) -> str | None:
    if gate != "sigmoid":
        return f"gate {gate}: native handles sigmoid"
    if torch.is_autocast_enabled("cpu") and x.dtype is not torch.get_autocast_dtype("cpu"):
        return f"autocast is on: native handles x of its type, {torch.get_autocast_dtype('cpu')}"
    return _native.map_refusal(x, residual, weight1, bias1, weight2, bias2)


def _run(x, weight1, bias1, weight2, bias2, residual, activation, gate) -> Tensor:
    tensors = x, *_native.wide(weight1, bias1, weight2, bias2), _native.apart(residual, x)
    if _native.needs_grad(*tensors):
        return _NativeSqueezeExcite.apply(*tensors, activation)[0]
    return torch.ops.fast_backbones.squeeze_excite(*tensors, activation, False)[0]


def _run_on_gpu(x, weight1, bias1, weight2, bias2, residual, activation, gate) -> Tensor:
    tensors = x, weight1, bias1, weight2, bias2, residual
    if _native.needs_grad(*tensors):
        return _GpuSqueezeExcite.apply(*tensors, activation)[0]
    return _gpu_squeeze_excite.forward(*tensors, activation, False)[0]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_native.memory_format(x))


@_native.register_fake("squeeze_excite")
def _fake(x, weight1, bias1, weight2, bias2, residual=None, activation="none", needs_mask=False):
    _checks.same_kind("squeeze_excite", x, False, residual=residual)
    _checks.same_kind("squeeze_excite", weight1, False, bias1=bias1, weight2=weight2, bias2=bias2)
    n, c, h, w = x.shape
    rows = n * h * w if needs_mask and activation != "none" else 0
    mask = x.new_empty((rows, (c + 15) // 16 * 2), dtype=torch.uint8)
    r = weight1.shape[0]
    return _like(x), *(x.new_empty(n, size, dtype=torch.float32) for size in (c, r, c)), mask


@_native.register_fake("squeeze_excite_backward")
def _fake_backward(grad, x, mask, weight1, weight2, means, hidden, gate, *needs):
    r, c = weight1.shape
    sizes = None, (r, c), (r,), (c, r), (c,), None  # None: those of x
    return tuple(
        weight1.new_empty(0) if not needed else _like(x) if size is None else weight1.new_empty(size)
        for size, needed in zip(sizes, needs)
    )


_OP = _dispatch.register(
    "squeeze_excite",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.Candidate(
        "triton", _gpu_training.FAMILY, _gpu_squeeze_excite.refuse, _run_on_gpu, _gpu_training.decline
    ),
    _dispatch.reference(_formula),
)


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    gate: str = "sigmoid",
    backend: str | None = None,
) -> Tensor:
    """Multiply every channel by a gate that two small layers make of the channels' means, add the shortcut,
    apply the activation.

    y[n, c, h, w] = act(x[n, c, h, w] * s[n, c] + residual[n, c, h, w])
    s[n] = sigmoid(weight2 relu(weight1 mean_hw(x[n]) + bias1) + bias2)

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout; the output keeps its layout.
        weight1: [R, C], weight2: [C, R]; 1x1 filters [R, C, 1, 1] and [C, R, 1, 1] are taken as well.
        bias1: [R] or None. bias2: [C] or None. All of the dtype and on the device of x; under autocast x has
            autocast's type and the others any.
        residual: like x, added before the activation; or None.
        activation: "none", "relu" or "relu6".
        gate: "sigmoid", or "tanh" or "relu" in its place.
        backend: None (the current one), "auto", "native", "triton" or "reference".
    Returns: the sizes of x.
    Raises: RuntimeError for sizes, dtypes or devices that do not fit together, or when a backend asked for by
        name refuses; ValueError for an unknown activation, gate or backend; TypeError for what is no tensor.

    Fast path: float32, bfloat16 and float16 on the CPU, sigmoid. Maps of 16 bits are converted where they are
    read and rounded where they are written; all else is float32 or double. A thread takes an image through
    its means, the layers and y while the image is in its cache; backward likewise, grad for the sums of
    grad * x and for dx. Sums over pixels go over to double after 8; their order does not depend on threads,
    nor a sample on its batch. Kept for backward: x, the layers and their values, and a bit of each element
    that the activation passed. Higher derivatives come from the formula. On a GPU (with
    FB_GPU_PLANS=1) the same types by Triton: two passes each way, with means, layers and gate in float32;
    bits are kept with a residual only.
    """
    tensors = (x, weight1, bias1, weight2, bias2)
    if has_torch_function_variadic(*tensors, residual):
        return handle_torch_function(
            squeeze_excite,
            (*tensors, residual),
            *tensors,
            residual=residual,
            activation=activation,
            gate=gate,
            backend=backend,
        )
    args = _prepare(*tensors, residual=residual, activation=activation, gate=gate)
    y = _dispatch.run(_OP, args, backend)
    return y.squeeze(0) if x.dim() == 3 else y

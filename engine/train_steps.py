"""What the steps of a training program call: layers, and layers that belong together as one op.

    Convolution        an nn.Conv2d by a kernel
    Norm               batch norm, the addition of the shortcut, the activation
    NormConvolution    batch norm, the activation, the convolution behind them
    Gate               squeeze-and-excitation, the addition of the shortcut, the activation
    Pool               an nn.MaxPool2d or nn.AvgPool2d by a kernel

Each calls its modules one by one when one of them has hooks, so that hooks of layers see what they always
see.

Where a map is read several times, its gradient is a sum. `passing` of a convolution returns its input beside
its output, for those that read it later: what comes back there is added in the kernel of its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import _conv, _conv_narrow, _gpu_training, _native
from ..kernels.batch_norm import fused as fused_norm
from ..kernels.batch_norm import refuse as refuse_norm
from ..kernels.batch_norm_conv2d import fused, refuse
from .train_concat import hand_on, moments_of, own

ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see this module called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Convolution:
    """An nn.Conv2d by the op of `kernels` that its groups ask for."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module, self.modules, self.op = module, [module], kernels.conv2d
        self.geometry = module.stride, module.padding, module.dilation, module.groups
        self.window = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            self.op = kernels.depthwise_conv2d
        else:
            self.window["groups"] = module.groups

    @staticmethod
    def takes(module: nn.Module) -> bool:
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        if hooked(module):
            return module(x)
        if x.is_cpu and (x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu")):
            return self.in_16_bits(x)
        return self.op(x, module.weight, module.bias, **self.window)

    def in_16_bits(self, x: Tensor) -> Tensor:
        """PyTorch's convolution, which may keep less."""
        module = self.module
        if not _conv_narrow.takes(x, module.weight):
            return module(x)
        return _conv_narrow.convolve(x, module.weight, module.bias, *self.geometry)

    def passing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module, found = self.module, None
        if self.op is kernels.conv2d and not hooked(module):
            found = _conv.passing(x, module.weight, module.bias, *self.geometry)
        return (self(x), x) if found is None else found


class Tail(NamedTuple):
    """What follows a norm or a gate: the function that adds the shortcut, the activation (a module or a
    function of one argument); each may be None."""

    addition: Callable[..., Any] | None = None
    activation: Any = None

    @property
    def name(self) -> str:
        """The activation, as `kernels` call it."""
        if self.activation is None:
            return "none"
        return FUNCTIONS.get(self.activation) or ACTIVATIONS[type(self.activation)]

    def modules(self) -> list[nn.Module]:
        return [self.activation] if isinstance(self.activation, nn.Module) else []

    def __call__(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if self.addition is not None:
            y = self.addition(y, residual)
        return y if self.activation is None else self.activation(y)


class Norm:
    """An nn.BatchNorm2d and its tail."""

    def __init__(self, norm: nn.BatchNorm2d, tail: Tail) -> None:
        self.norm, self.tail = norm, tail
        self.modules = [norm, *tail.modules()]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = self.norm
        if any(map(hooked, self.modules)) or not _fits(x, residual):
            return self.tail(norm(own(x)), residual)
        mean, var, options = self.begin()
        return kernels.batch_norm(x, norm.weight, norm.bias, mean, var, residual=residual, **options)

    def narrow(self, x: Tensor, passes: bool) -> tuple[Tensor, Tensor]:
        """For maps of 16 bits, whose convolution is PyTorch's: y, and x for those that read it later."""
        norm = self.norm
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        if x.dtype not in _native.NARROW or refuse_norm(x, *tensors, None) is not None:
            return self(x), x
        *running, options = self.begin()
        known = moments_of(x) if options["training"] else None
        y, passed = fused_norm(x, *tensors[:2], *running, moments=known, passes=passes, **options)
        hand_on(x, passed)
        return y, passed

    def begin(self) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
        """Count the batch as nn.BatchNorm2d does; the running moments, and the options of the op."""
        norm = self.norm
        mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
        batch = norm.training or mean is None
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # the average of all batches
                momentum = 1.0 / float(norm.num_batches_tracked)
        if norm.training and not norm.track_running_stats:
            mean = var = None
        options = {
            "training": batch,
            "momentum": 0.0 if momentum is None else momentum,
            "eps": norm.eps,
            "activation": self.tail.name,
        }
        return mean, var, options


class NormConvolution:
    """A norm with its activation and the convolution that alone reads it."""

    def __init__(self, norm: Norm, convolution: Convolution) -> None:
        self.norm, self.convolution = norm, convolution
        self.modules = [*norm.modules, convolution.module]

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, False)[0]

    def passing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, True)

    def _run(self, x: Tensor, passes: bool) -> tuple[Tensor, Tensor]:
        norm, conv = self.norm.norm, self.convolution.module
        affine = norm.weight, norm.bias
        layer = conv.weight, conv.bias
        if any(map(hooked, self.modules)):
            return self.convolution(self.norm(x)), x
        if refuse(x, *affine, norm.running_mean, norm.running_var, *layer):
            y, passed = self.norm.narrow(x, passes)
            return self.convolution(y), passed
        mean, var, options = self.norm.begin()
        window = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        y, passed = fused(
            x,
            *affine,
            mean,
            var,
            *layer,
            **options,
            **window,
            groups=conv.groups,
            moments=moments_of(x) if options["training"] else None,
            passes=passes,
        )
        hand_on(x, passed)
        return y, passed


class Gate:
    """x * sigmoid(fc2(relu(fc1(mean of x)))) of squeeze-and-excitation, and its tail."""

    def __init__(self, layers: tuple[nn.Module, ...], tail: Tail) -> None:
        self.layers, self.tail = layers, tail
        self.modules = [*layers, *tail.modules()]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc1, _, fc2, _ = self.layers
        if any(map(hooked, self.modules)) or not _fits(x, residual):
            gate = x.mean((2, 3), keepdim=True)
            for layer in self.layers:
                gate = layer(gate)
            return self.tail(x * gate, residual)
        small = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return kernels.squeeze_excite(x, *small, residual=residual, activation=self.tail.name)


class Pool:
    """An nn.MaxPool2d or nn.AvgPool2d by a kernel."""

    def __init__(self, module: nn.MaxPool2d | nn.AvgPool2d) -> None:
        self.module, self.modules = module, [module]

    @staticmethod
    def takes(module: nn.Module) -> bool:
        if type(module) is nn.MaxPool2d:
            return module.dilation in (1, (1, 1)) and not module.return_indices
        return type(module) is nn.AvgPool2d and module.divisor_override is None

    def __call__(self, x: Tensor) -> Tensor:
        pool = self.module
        # The kernels are the CPU's; those for GPUs may be asked for by name.
        ours = x.is_cpu and x.dim() == 4 and kernels.current_backend() != _gpu_training.FAMILY
        if hooked(pool) or not ours:
            return pool(x)
        window = {"stride": pool.stride, "padding": pool.padding, "ceil_mode": pool.ceil_mode}
        if isinstance(pool, nn.MaxPool2d):
            return kernels.max_pool2d(x, pool.kernel_size, **window)
        return kernels.avg_pool2d(x, pool.kernel_size, **window, count_include_pad=pool.count_include_pad)


def _fits(x: Tensor, residual: Tensor | None) -> bool:
    """Whether nothing is broadcast or promoted: that is PyTorch's affair."""
    if residual is None:
        return True
    return isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (x.shape, x.dtype)


class Attribute:
    """A parameter, buffer or constant of the model, read at every call."""

    def __init__(self, model: nn.Module, target: str) -> None:
        path, _, self.name = target.rpartition(".")
        self.owner = model.get_submodule(path) if path else model

    def __call__(self) -> Any:
        return getattr(self.owner, self.name)


class Method:
    """A method of the first argument."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)

"""When a plan may not be used, each rule a sentence.

    call_refusal(model, x)        about this call: mode, gradients, autocast, tracing, the input
    structure_refusal(model)      about the model: training, hooks, kinds of tensors and modules

A refusal is not an error: the model's own modules run instead, and why_not() tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..kernels import _ext, _gpu_training, current_backend
from .capture import capturing

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
TRAINED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRAD = "grad is enabled and parameters require it: use torch.no_grad() or torch.inference_mode()"


def call_refusal(model: nn.Module, x: Tensor) -> str | None:
    """Why this call may not use a plan, whatever the model looks like inside. Costs about 2 us."""
    if torch.compiler.is_dynamo_compiling():
        return "torch.compile is tracing"
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if model.training:
        return "the model is in training mode"
    return _environment_refusal(SURROUNDINGS) or _input_refusal(x)


Rules = tuple[tuple[Callable[[], Any], Any, str], ...]


def _environment_refusal(rules: Rules) -> str | None:
    for ask, answer, reason in rules:
        if ask() != answer:
            return reason
    if _ext.native() is None:
        return f"the native library is absent: {_ext.why_not()}"
    return None


def _function_mode() -> bool:
    """Whether a TorchFunctionMode changes what operations do. torch.set_default_device installs one, too,
    but tensors that say where they live ignore that."""
    return torch._C._len_torch_function_stack() > 0 and not _only_device_contexts()


def _only_device_contexts() -> bool:
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _forward_differentiation() -> bool:
    return forward_ad._current_level >= 0


def _global_hooks() -> bool:
    forward = nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
    return bool(forward or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)


def _reference_backend() -> bool:
    return current_backend() == "reference"


_WITHOUT_AUTOCAST = (partial(torch.is_autocast_enabled, "cpu"), False, "autocast is active")

# What a plan needs of its surroundings: whom to ask, the answer wanted, the sentence for any other. Dynamo is
# not among them: only code that it traces can ask for it.
SURROUNDINGS: Rules = (
    (capturing, False, "the engine is capturing the model"),
    (torch._C._get_tracing_state, None, "torch.jit is tracing"),
    (
        torch._C._are_functorch_transforms_active,
        False,
        "inside a torch.func transform (vmap, grad, jvp)",
    ),
    (torch._C._len_torch_dispatch_stack, 0, "a TorchDispatchMode is active"),
    (_function_mode, False, "a TorchFunctionMode is active"),
    _WITHOUT_AUTOCAST,
    (_forward_differentiation, False, "forward-mode differentiation is active"),
    (_global_hooks, False, "global module hooks are registered"),
    (_reference_backend, False, "the backend is 'reference'"),
)

# And what a fused step in train() needs.
_SURROUNDINGS_OF_TRAINING: Rules = tuple(rule for rule in SURROUNDINGS if rule is not _WITHOUT_AUTOCAST)

# What _input_refusal looks at besides gradients: two inputs that agree in these agree in its answer.
INPUT_ATTRIBUTES = (Tensor.is_cpu, Tensor.dtype, Tensor.layout, Tensor.is_nested, Tensor.shape)
INPUT_METHODS = (Tensor.is_neg, Tensor.stride)  # and the strides, which choose the plan


def _input_refusal(x: Tensor) -> str | None:
    if not x.is_cpu and (reason := _device_refusal(x)):
        return reason
    if x.dtype not in DTYPES[x.device.type]:
        return f"the input is {x.dtype}, the kernels take {_taken(x)}"
    if x.layout is not torch.strided or x.is_nested:
        return f"the input's layout is {x.layout}"
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, expected [N, C, H, W]"
    if x.numel() == 0:
        return "the input is empty"
    if x.is_neg():
        return "the input is a negated view"
    if x.requires_grad and torch.is_grad_enabled():
        return "the input requires grad and grad is enabled"
    return None


def _device_refusal(x: Tensor) -> str | None:
    if not x.is_cuda:
        return f"the input is on {x.device}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is active"
    return gpu_refusal(x.device.index)


@cache
def gpu_refusal(device: int, what: str = "plans for GPUs have") -> str | None:
    """Why there are no kernels for this GPU, as a sentence."""
    if not _gpu_training.switched_on():
        return f"{what} never run on one yet; {_gpu_training.SWITCH}=1 switches them on"
    return _gpu_training.device_refusal(device)


def _taken(tensor: Tensor) -> str:
    return " and ".join(map(str, DTYPES[tensor.device.type]))


def structure_refusal(model: nn.Module) -> str | None:
    """Why this model has no plan at the moment. Costs some 100 us: asked when the structure has changed."""
    for name, module in model.named_modules():
        reason = _root_refusal(module) if module is model else _inner_refusal(module)
        if reason is not None:
            return f"{name or 'the model'} {reason}"
    places = set()
    for name, tensor in named_tensors(model):
        reason = _tensor_refusal(tensor)
        if reason is not None:
            return f"{name} {reason}"
        places.add(tensor.device)
    if len(places) > 1:
        return f"the model is on {' and '.join(sorted(map(str, places)))}"
    return None


def training_call_refusal(x: Tensor) -> str | None:
    """Why this call in train() runs the modules, whatever the model looks like inside. Autocast may be
    active: the steps cast as PyTorch's do."""
    known = x.device.type in DTYPES and x.dtype in TRAINED_DTYPES
    if not known or x.layout is not torch.strided or x.dim() != 4:
        got = f"{x.dtype} on {x.device} in {x.dim()} dimensions"
        return f"the input is {got}: training is fused for 32 and 16 bits in 4, on the CPU and on CUDA"
    if x.is_cuda and (reason := gpu_refusal(x.device.index, "the kernels of training on a GPU have")):
        return reason
    if x.numel() == 0:
        return "the input is empty"
    if torch.is_inference_mode_enabled() or x.is_inference():
        return "inference mode is on, or made the input"
    return _environment_refusal(_SURROUNDINGS_OF_TRAINING)


def training_refusal(model: nn.Module) -> str | None:
    """Why this model runs its modules in train()."""
    for name, module in model.named_modules():
        reason = _changed_refusal(module) if module is not model else None
        if reason is not None or isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} {reason or 'is a TorchScript module'}"
    for name, tensor in named_tensors(model):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}, not a plain tensor"
    return None


# A layer that was put into a model after eval() is in training mode; for these that makes no difference.
_SAME_IN_TRAINING = {
    nn.Conv2d, nn.Linear, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten,
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample,
}  # fmt: skip


def _root_refusal(module: nn.Module) -> str | None:
    """Hooks of the root, and its own forward, run around the plan."""
    if module.training and type(module) not in _SAME_IN_TRAINING:
        return "is in training mode"
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module"
    return "is parametrized" if nn.utils.parametrize.is_parametrized(module) else None


def _inner_refusal(module: nn.Module) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    return _changed_refusal(module) or _root_refusal(module)


def _changed_refusal(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "has a forward of its own (replaced on the instance)"
    if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
        return "is compiled by torch.compile"
    return None


def _tensor_refusal(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if tensor.device.type not in DTYPES:
        return f"is on {tensor.device}"
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return f"has layout {tensor.layout}, dtype {tensor.dtype}"
    if tensor.dtype not in DTYPES[tensor.device.type] and (tensor.is_floating_point() or tensor.is_complex()):
        return f"is {tensor.dtype}, the kernels take {_taken(tensor)}"
    if tensor.is_inference():
        return "is an inference tensor, whose changes PyTorch does not count"
    return None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)

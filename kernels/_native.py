"""What all native candidates share: when compiled kernels may run at all, and the layout of their outputs."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling as is_compiling

from . import _ext

# FakeTensor and FunctionalTensor stand for ordinary tensors while torch.export and torch.compile trace.
_PLAIN_TYPES = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")

# Of maps, where kernels convert as they read and write.
MAPS = (torch.float32, torch.bfloat16, torch.float16)
NARROW = MAPS[1:]


def map_refusal(x: Tensor, residual: Tensor | None, *others: Tensor | None) -> str | None:
    """Why no native kernel can take the maps x and residual, of one type, with others that are float32 or of
    that type, or None."""
    if x.dtype not in MAPS:
        return f"{x.dtype}: native handles maps of {', '.join(map(str, MAPS))}"
    if residual is not None and residual.dtype is not x.dtype:
        return f"x is {x.dtype}, residual {residual.dtype}: native handles maps of one type"
    return refusal(x, residual, dtypes=(x.dtype,)) or refusal(*others, dtypes=(torch.float32, x.dtype))


def wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In float32, differentiably."""
    return tuple(None if t is None else t.float() for t in tensors)


def refusal(
    *tensors: Tensor | None,
    cast_by_autocast: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> str | None:
    """Why no native kernel can take these tensors, or None."""
    if _ext.why_not() is not None:
        if not is_compiling():
            _ext.native()  # warns at the first refusal of the process
        return f"the compiled library is absent; {_ext.why_not()}"
    for t in tensors:
        if t is None:
            continue
        if t.device.type != "cpu":
            return f"device {t.device}: native handles cpu"
        if t.dtype not in dtypes:
            return f"{t.dtype}: native handles {' and '.join(map(str, dtypes))}"
        if t.layout is not torch.strided:
            return f"layout {t.layout}: native handles torch.strided"
        if type(t).__name__ not in _PLAIN_TYPES:
            return f"tensor subclass {type(t).__name__}: native handles plain tensors"
    if cast_by_autocast and torch.is_autocast_enabled("cpu"):
        return "autocast is on: native handles torch.float32 only"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform (vmap, grad, jvp): native has no rule for them"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on: native has no forward derivative"
    return None


def absent(like: Tensor, sizes: torch.Size) -> Tensor:
    """A tensor of these sizes without memory, for formulas that look at the sizes alone."""
    return like.new_empty(()).expand(sizes)


def apart(residual: Tensor | None, x: Tensor) -> Tensor | None:
    """residual, or an alias where it is x: Dynamo traces a Function only when its tensors are distinct."""
    return residual.view_as(residual) if residual is x else residual


def transforming() -> bool:
    """Whether torch.func (vmap, grad, jvp) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(grad: Tensor) -> bool:
    """Whether a gradient stands for many, as torch.autograd.grad(is_grads_batched=True) makes them: ops of
    ours are called for each, views and copies into other memory are not."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Torch's rule for the layout of an output: channels_last when any of the tensors suggests it."""
    from torch._prims_common import suggest_memory_format

    if any(suggest_memory_format(t) == torch.channels_last for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def register_fake(op: str):
    """Decorator: the fake kernel of torch.ops.fast_backbones.<op>; idle without the compiled library."""

    def decorate(fake):
        if _ext.why_not() is None:
            torch.library.register_fake(f"fast_backbones::{op}", fake)
        return fake

    return decorate

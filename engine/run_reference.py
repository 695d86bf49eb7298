"""Runs a plan with plain PyTorch: the meaning of every step, one formula each.

`run` needs no native library and no arena; it is what the rewrites are tested against. `run_in_arena`
executes the lowered instances one by one on views of an arena, so that places and schedule can be tested
without kernels too. `formula` also serves run_cpu for the steps that no kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .graph import Live, map_leaves
from .plan import Instance, Place, Plan, Ref, Step, Value
from .weights import fold

Tensors = Mapping[str, Tensor]


def run(plan: Plan, x: Tensor, tensors: Tensors, dtype: torch.dtype = torch.float32) -> Any:
    """What the model returns for x, by the steps of the plan in order, computed in `dtype`."""
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    results: dict[int, Any] = {plan.input: x.to(dtype)}

    def read(value: int) -> Any:
        found = plan.values[value]
        return results[value] if found.same_as is None else read(found.same_as).reshape(found.shape)

    with torch.no_grad():
        for step in plan.steps:
            results[step.output] = evaluate(plan, step, read, tensors, dtype)
    return rebuild(plan, read)


def evaluate(
    plan: Plan, step: Step, read: Callable[[int], Any], tensors: Tensors, dtype: torch.dtype = torch.float32
) -> Any:
    """The result of one step; `read` gives the logical value (NCHW) of a value id."""
    if step.call is not None:
        target, args, kwargs = map_leaves(list(step.call), lambda leaf: _argument(leaf, read, tensors))
        return target(*args, **kwargs)
    y = formula(step, [read(v) for v in step.inputs], tensors, dtype)
    shape = plan.values[step.output].shape
    return y.flatten(1) if step.op == "global_avg_pool" and len(shape or ()) == 2 else y


def _argument(leaf: Any, read: Callable[[int], Any], tensors: Tensors) -> Any:
    if isinstance(leaf, Ref):
        return read(leaf.value)
    return tensors[leaf.name] if isinstance(leaf, Live) else leaf


def formula(step: Step, inputs: list[Tensor], tensors: Tensors, dtype: torch.dtype = torch.float32) -> Tensor:
    """One step in plain PyTorch: inputs and result are logical, [N, C, H, W] or [N, C]."""
    x, p = inputs[0], step.params
    if step.op == "conv2d":
        weight, bias = folded(step, tensors, dtype)
        stride, padding, dilation = conv_geometry(p)
        y = F.conv2d(x, weight, bias, stride, padding, dilation, p["groups"])
        y = y + inputs[1] if len(inputs) > 1 else y
        return y.relu() if activates(p) else y
    if step.op == "linear":
        y = F.linear(x, *folded(step, tensors, dtype))
        return y.relu() if activates(p) else y
    if step.op == "batch_norm":
        mean, var, weight, bias = (tensors[p[k]] if p[k] else None for k in ("mean", "var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, p["eps"])
    if step.op == "max_pool2d":
        kernel, stride, padding = pool_geometry(p)
        return F.max_pool2d(x, kernel, stride, padding, ceil_mode=bool(p["ceil_mode"]))
    if step.op == "global_avg_pool":
        return x.mean((2, 3), keepdim=True)
    return SIMPLE[step.op](*inputs)


SIMPLE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "add": torch.add,
    "flatten": lambda x: x.flatten(1),
    "to_nhwc": lambda x: x,
    "to_nchw": lambda x: x.contiguous(),
}


def folded(step: Step, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    assert step.recipe is not None
    weight, bias = fold(step.recipe, tensors)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def activates(p: Mapping[str, Any]) -> bool:
    return p["activation"] in (1, "relu")


def conv_geometry(p: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding, dilation from a kernel's parameters or from a node's attributes."""
    if "stride" in p:
        return p["stride"], p["padding"], p["dilation"]
    return (p["stride_h"], p["stride_w"]), (p["pad_h"], p["pad_w"]), (p["dilation_h"], p["dilation_w"])


def pool_geometry(p: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride, padding, likewise."""
    if "stride" in p:
        return p["kernel"], p["stride"], p["padding"]
    return (p["r"], p["s"]), (p["stride_h"], p["stride_w"]), (p["pad_h"], p["pad_w"])


def rebuild(plan: Plan, read: Callable[[int], Any]) -> Any:
    """The model's return value from the plan's outputs."""
    flat = [output.constant if output.value is None else read(output.value) for output in plan.outputs]
    return pytree.tree_unflatten(flat, plan.out_spec)


def view(memory: Tensor, plan: Plan, value: Value, place: Place, first: int, last: int, start: int) -> Tensor:
    """Images [first, last) of a value, logically, over `memory`; its place holds image `start` first."""
    assert value.shape is not None
    stride, image = place.pixel_stride, place.image_bytes // 4
    offset = place.offset // 4 + (first - start) * image
    if len(value.shape) == 2:
        return memory.as_strided((last - first, value.shape[1]), (image, 1), offset)
    _, c, h, w = value.shape
    return memory.as_strided((last - first, c, h, w), (image, 1, w * stride, stride), offset)


def run_in_arena(
    plan: Plan, x: Tensor, tensors: Tensors, arena: Tensor, order: list[int] | None = None
) -> Any:
    """Like `run`, instance by instance (in `order`, default the plan's), with arena values in `arena`."""
    results: dict[int, Any] = {plan.input: x}
    for value in plan.values:
        if value.is_external:
            assert value.shape is not None
            results[value.id] = torch.full(value.shape, torch.nan)

    def part(value: int, instance: Instance) -> Any:
        found, root = plan.values[value], plan.root(value)
        if root.home == "arena":
            place = plan.places[root.id]
            start = instance.starts[place.depth]
            whole = view(arena, plan, root, place, instance.first, instance.last, start)
        elif root.shape is not None and root.home != "object":
            whole = results[root.id][instance.first : instance.last]
        else:
            whole = results[root.id]
        return whole if found.same_as is None else whole.reshape(-1, *(found.shape or ())[1:])

    whole_batch = Instance(0, 0, plan.batch, (0,) * 16)
    with torch.no_grad():
        for number in range(len(plan.instances)) if order is None else order:
            instance = plan.instances[number]
            step = plan.steps[instance.step]
            at = instance if step.native else whole_batch

            def read(value: int, at: Instance = at) -> Any:
                return part(value, at)

            result = evaluate(plan, step, read, tensors)
            if plan.values[step.output].home == "object":
                results[step.output] = map_leaves(result, _own)
            else:
                target = part(step.output, at)
                target.copy_(result.reshape(target.shape))
    return rebuild(plan, lambda value: part(value, whole_batch))


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf

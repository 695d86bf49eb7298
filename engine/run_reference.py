"""Runs a plan with plain PyTorch: the meaning of every step, one formula each.

`run` needs no native library and no arena; it is what the rewrites are tested against. `run_in_arena`
executes the lowered instances one by one on views of an arena, so that places and schedule can be tested
without kernels too. `formula` also serves run_cpu for the steps that no kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .borders import Padding, as_border, is_even
from .graph import Live, leaves, map_leaves
from .plan import Instance, Place, Plan, Ref, Step, Value
from .recipes import Tensors, fold


def run(plan: Plan, x: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """What the model returns for x, by the steps of the plan in order, computed in `dtype`."""
    tensors = known({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, plan)
    results: dict[int, Any] = {plan.input: x.to(dtype)}

    def read(value: int) -> Any:
        root = plan.root(value)
        if root.id not in results and root.id != value:  # a buffer, whose owner is written in slices
            results[root.id] = torch.full(root.shape or (), torch.nan, dtype=dtype)
        return shown(plan, value, results[root.id])

    with torch.no_grad():
        for step in plan.steps:
            result = evaluate(plan, step, read, tensors, dtype)
            if plan.root(step.output).id == step.output:
                results[step.output] = result
            else:
                read(step.output).copy_(result)
    return rebuild(plan, lambda value: read(value))


def known(tensors: Mapping[str, Tensor], plan: Plan) -> Tensors:
    """The tensors of the model and what the plan's recipes name besides."""
    found = Tensors(tensors)
    found.calls = plan.computed
    return found


def shown(plan: Plan, value: int, owner: Any) -> Any:
    """The logical tensor of a value whose root is `owner`: some of its channels, or its map as rows."""
    found, root = plan.values[value], plan.root(value)
    if found.id == root.id:
        return owner
    if found.pixels != root.pixels:
        rows = owner.permute(0, 2, 3, 1) if owner.dim() == 4 else owner  # in the order of memory
        if found.pixels == 1:
            first = plan.channel(value)
            row = rows.reshape(owner.shape[0], -1)[:, first : first + found.channels]
            return row.reshape(owner.shape[0], *(found.shape or ())[1:])
        n, c, h, w = (owner.shape[0], *(found.shape or ())[1:])
        return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)
    channel = plan.channel(value)
    part = owner[:, channel : channel + found.channels]
    return part.reshape(-1, *(found.shape or ())[1:]) if part.dim() != len(found.shape or ()) else part


def evaluate(
    plan: Plan, step: Step, read: Callable[[int], Any], tensors: Tensors, dtype: torch.dtype = torch.float32
) -> Any:
    """The result of one step; `read` gives the logical value (NCHW) of a value id."""
    if step.call is not None:
        target, args, kwargs = map_leaves(list(step.call), lambda leaf: _argument(leaf, read, tensors))
        return target(*args, **kwargs)
    inputs = dict(zip(step.roles, [read(v) for v in step.inputs]))
    y = formula(step, inputs, folded(step, tensors, dtype))
    shape = plan.values[step.output].shape
    return y.flatten(1) if step.op == "global_avg_pool" and len(shape or ()) == 2 else y


def _argument(leaf: Any, read: Callable[[int], Any], tensors: Tensors) -> Any:
    if isinstance(leaf, Ref):
        return read(leaf.value)
    return tensors[leaf.name] if isinstance(leaf, Live) else leaf


Parts = Mapping[str, tuple[Tensor, Tensor | None]]
Inputs = Mapping[str, Tensor]

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def formula(step: Step, inputs: Inputs, parts: Parts) -> Tensor:
    """One step in plain PyTorch: inputs and result are logical, [N, C, H, W] or [N, C]."""
    return FORMULAS[step.op](step.attrs, inputs, parts)


def conv2d(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    x = inputs["x"]
    if "pre" in parts:
        x = scaled(x, *parts["pre"])
    x, padding = bordered(ACTIVATE[a.get("pre_activation", "none")](x), a["padding"])
    y = F.conv2d(x, *parts["weight"], a["stride"], padding, a["dilation"], a["groups"])
    return finished(a, y, inputs)


def separable_conv2d(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    x, padding = bordered(ACTIVATE[a["pre_activation"]](inputs["x"]), a["padding"])
    y = F.conv2d(x, *parts["depth"], a["stride"], padding, a["dilation"], x.shape[1])
    return finished(a, F.conv2d(ACTIVATE[a["depth_activation"]](y), *parts["weight"]), inputs)


def linear(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    weight, bias = parts["weight"]
    return finished(a, F.linear(inputs["x"], weight.flatten(1), bias), inputs)


def affine(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    return finished(a, scaled(inputs["x"], *parts["weight"]) if "weight" in parts else inputs["x"], inputs)


def avg_pool2d(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    x = inputs["x"]
    if a["size"] is not None:
        y = F.adaptive_avg_pool2d(x, a["size"])
    else:
        x, padding = bordered(x, a["padding"], a["kernel"])
        window = a["kernel"], a["stride"], padding, a["ceil_mode"], a["count_include_pad"], a["divisor"]
        y = F.avg_pool2d(x, *window)
    return finished(a, y + per_channel(parts["bias"][1], y) if "bias" in parts else y, inputs)


def max_pool2d(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    x, padding = bordered(inputs["x"], a["padding"], a["kernel"], -inf)
    return F.max_pool2d(x, a["kernel"], a["stride"], padding, ceil_mode=a["ceil_mode"])


def bordered(
    x: Tensor, padding: Padding, window: tuple[int, int] | None = None, value: float = 0.0
) -> tuple[Tensor, Padding]:
    """x and what it is padded with; what PyTorch does not take as padding becomes part of x.

    That is a border which differs from side to side, and for the window of a pool more than half of it.
    """
    narrow = window is None or all(2 * side <= size for side, size in zip(padding, window))
    if is_even(padding) and narrow:
        return x, padding
    return F.pad(x, as_border(padding), value=value), (0, 0)


def local_response_norm(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    f = a["formula"]
    return F.local_response_norm(inputs["x"], f["size"], f["alpha"], f["beta"], f["offset"])


def layer_norm(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    last = inputs["x"].movedim(1, -1)
    y = F.layer_norm(last, last.shape[-1:], *parts.get("weight", (None, None)), a["eps"])
    return y.movedim(-1, 1)


def group_norm(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    return F.group_norm(inputs["x"].contiguous(), a["groups"], *parts.get("weight", (None, None)), a["eps"])


def l2_normalize(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    return F.normalize(inputs["x"], dim=1, eps=a["eps"])


def squared_distances(a: Mapping[str, Any], inputs: Inputs, parts: Parts) -> Tensor:
    return (inputs["x"].unsqueeze(1) - parts["weight"][0]).square().sum(2)


FORMULAS: dict[str, Callable[[Mapping[str, Any], Inputs, Parts], Tensor]] = {
    "conv2d": conv2d,
    "separable_conv2d": separable_conv2d,
    "linear": linear,
    "affine": affine,
    "avg_pool2d": avg_pool2d,
    "max_pool2d": max_pool2d,
    "local_response_norm": local_response_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "multiply": lambda a, inputs, parts: inputs["x"] * inputs["residual"],
    "leaky_relu": lambda a, inputs, parts: F.leaky_relu(inputs["x"], a["slope"]),
    "upsample_nearest2d": lambda a, inputs, parts: F.interpolate(inputs["x"], a["size"]),
    "l2_normalize": l2_normalize,
    "squared_distances": squared_distances,
    "global_avg_pool": lambda a, inputs, parts: inputs["x"].mean((2, 3), keepdim=True),
    "shuffle": lambda a, inputs, parts: F.channel_shuffle(inputs["x"], a["groups"]),
    "pad": lambda a, inputs, parts: F.pad(inputs["x"], a["border"], value=a["value"]),
    "row": lambda a, inputs, parts: inputs["x"].reshape(-1, *a["size"]),
    "flatten": lambda a, inputs, parts: inputs["x"].flatten(1),
    "to_nhwc": lambda a, inputs, parts: inputs["x"],
    "to_nchw": lambda a, inputs, parts: inputs["x"].contiguous(),
}


def finished(a: Mapping[str, Any], y: Tensor, inputs: Inputs) -> Tensor:
    """act(y * gate + residual); channels below act_from get no activation."""
    if "gate" in inputs:
        y = y * inputs["gate"].reshape(*inputs["gate"].shape[:2], *(1,) * (y.dim() - 2))
    if "residual" in inputs:
        y = y + inputs["residual"]
    start = a.get("act_from", 0)
    act = ACTIVATE[a["activation"]]
    return torch.cat([y[:, :start], act(y[:, start:])], 1) if start else act(y)


def scaled(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    y = x * per_channel(scale, x)
    return y if shift is None else y + per_channel(shift, x)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (x.dim() - 2))


def folded(step: Step, tensors: Tensors, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor | None]]:
    found = {}
    for part, recipe in step.recipes.items():
        weight, bias = fold(recipe, tensors)
        found[part] = weight.to(dtype), None if bias is None else bias.to(dtype)
    return found


def rebuild(plan: Plan, read: Callable[[int], Any]) -> Any:
    """The model's return value from the plan's outputs."""
    flat = [output.constant if output.value is None else read(output.value) for output in plan.outputs]
    return pytree.tree_unflatten(flat, plan.out_spec)


def owned(result: Any, memory: Tensor) -> Any:
    """What a PyTorch call returned, no part of it a view of `memory`, which later steps overwrite."""
    address = memory.untyped_storage().data_ptr()

    def own(leaf: Any) -> Any:
        shared = isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == address
        return leaf.clone() if shared else leaf

    return map_leaves(result, own) if any(True for _ in leaves(result)) else result


def view(memory: Tensor, value: Value, place: Place, first: int, last: int, start: int) -> Tensor:
    """Images [first, last) of a value, logically, over `memory`; its place holds image `start` first."""
    assert value.shape is not None
    stride, image = place.pixel_stride, place.image_stride
    offset = place.offset // 4 + (first - start) * image + place.channel
    if len(value.shape) == 2:
        return memory.as_strided((last - first, value.shape[1]), (image, 1), offset)
    _, c, h, w = value.shape
    return memory.as_strided((last - first, c, h, w), (image, 1, w * stride, stride), offset)


def run_in_arena(
    plan: Plan, x: Tensor, tensors: Mapping[str, Tensor], arena: Tensor, order: list[int] | None = None
) -> Any:
    """Like `run`, instance by instance (in `order`, default the plan's), with arena values in `arena`."""
    tensors = known(tensors, plan)
    results: dict[int, Any] = {plan.input: x}
    for value in plan.values:
        if value.is_external:
            assert value.shape is not None
            results[value.id] = torch.full(value.shape, torch.nan)

    def part(value: int, instance: Instance) -> Any:
        found, root = plan.values[value], plan.root(value)
        if root.home == "arena":
            place = plan.places[value]
            return view(arena, found, place, instance.first, instance.last, instance.starts[place.depth])
        if root.shape is None or root.home == "object":
            return results[root.id]
        return shown(plan, value, results[root.id][instance.first : instance.last])

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

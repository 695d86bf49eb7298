"""Recognisers: what an ATen call means to the engine.

Each takes the bound arguments of one call and its result, and returns `(op, inputs, attrs)`, or None when
this call is not the plain case; the call then stays as it is, an "aten" node. `roles` among the attrs says
what the inputs are when there is more than x.

Norms, activations, sums, products with numbers and gates all become "affine" nodes:

    act((x * scale + shift) * gate + residual)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .borders import Padding, padding_of
from .graph import Live, Node
from .program import Facts
from .recipes import Fixed, Norm, Recipe, Vector, scaling

aten = torch.ops.aten
Recognised = tuple[str, list[Node], dict[str, Any]] | None
RECOGNISERS: dict[Any, Callable[[dict[str, Any], Facts], Recognised]] = {}


def recognises(*targets: Any) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        for target in targets:
            RECOGNISERS[target] = function
        return function

    return register


def pair(value: Any) -> tuple[int, int]:
    """ATen writes [s] for [s, s]."""
    value = [value] if isinstance(value, int) else list(value)
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def is_float(node: Any) -> bool:
    """A float32 tensor that some node computes (not a parameter)."""
    return isinstance(node, Node) and node.dtype is torch.float32 and node.shape is not None


def is_map(node: Any, rank: int = 4) -> bool:
    return is_float(node) and len(node.shape) == rank


def is_map_or_rows(node: Any) -> bool:
    return is_map(node) or is_map(node, 2)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_gate(node: Any, of: Node) -> bool:
    """One number per image and channel."""
    return is_map(node) and is_map(of) and node.shape == (*(of.shape or ())[:2], 1, 1)


def is_per_channel(value: Any, of: Node, a: dict[str, Any]) -> bool:
    """A parameter, or something computed from parameters, with one number per channel of a map or of rows, or
    with one number for all."""
    shape = a["shapes"].get(value) if isinstance(value, Live) else None
    if shape is None or len(shape) > len(of.shape or ()):
        return False
    tail = (of.channels, *(1,) * (len(of.shape or ()) - 2))
    return shape in (tail, (1, *tail)) or all(size == 1 for size in shape)


def known_tensors(*tensors: Any) -> bool:
    return all(isinstance(tensor, Live | None) for tensor in tensors)


def name_of(live: Live | None) -> str | None:
    return None if live is None else live.name


# ---- convolutions and linear layers ----


def padding(a: dict[str, Any]) -> Padding:
    """In numbers. Of an odd total "same" puts the larger part behind the image."""
    if not isinstance(a["padding"], str):
        return pair(a["padding"])
    if a["padding"] == "valid":
        return (0, 0)
    height, width = (d * (k - 1) for d, k in zip(pair(a["dilation"]), a["weight_shape"][2:]))
    return padding_of(height // 2, width // 2, height - height // 2, width - width // 2)


@recognises(aten.conv2d.default, aten.conv2d.padding)
def conv2d(a: dict[str, Any], result: Facts) -> Recognised:
    if not (is_map(a["input"]) and isinstance(a["weight"], Live) and known_tensors(a["bias"])):
        return None
    attrs = {
        "recipe": Recipe(a["weight"].name, name_of(a["bias"])), "activation": "none",
        "kernel": tuple(a["weight_shape"][2:]), "filters": a["weight_shape"][0], "groups": a["groups"],
        "stride": pair(a["stride"]), "padding": padding(a), "dilation": pair(a["dilation"]),
    }  # fmt: skip
    return "conv2d", [a["input"]], attrs


@recognises(aten.linear.default)
def linear(a: dict[str, Any], result: Facts) -> Recognised:
    if not (is_map(a["input"], 2) and isinstance(a["weight"], Live) and known_tensors(a["bias"])):
        return None
    recipe = Recipe(a["weight"].name, name_of(a["bias"]))
    return "linear", [a["input"]], {"recipe": recipe, "filters": a["weight_shape"][0], "activation": "none"}


# ---- one number per channel, elementwise ----


def affine(x: Node, label: str, *maps: Any, activation: str = "none", **others: Node) -> Recognised:
    recipe = scaling(x.channels, *maps) if maps else None
    attrs = {"recipe": recipe, "activation": activation, "label": label, "roles": ("x", *others)}
    return "affine", [x, *others.values()], attrs


@recognises(aten.batch_norm.default)
def batch_norm(a: dict[str, Any], result: Facts) -> Recognised:
    stats = (a["running_mean"], a["running_var"])
    known = all(isinstance(s, Live) for s in stats) and known_tensors(a["weight"], a["bias"])
    if a["training"] or not known or not is_map_or_rows(a["input"]):
        return None
    norm = Norm(stats[0].name, stats[1].name, a["eps"], name_of(a["weight"]), name_of(a["bias"]))
    return affine(a["input"], "norm", norm)


def activation(x: Any, name: str) -> Recognised:
    return affine(x, name, activation=name) if is_map_or_rows(x) else None


for _name in ("relu", "relu6", "sigmoid", "tanh", "silu", "hardsigmoid", "hardswish"):

    @recognises(getattr(aten, _name).default)
    def _(a: dict[str, Any], result: Facts, name: str = _name) -> Recognised:
        return activation(a["self"], name)


@recognises(aten.hardtanh.default)
def hardtanh(a: dict[str, Any], result: Facts) -> Recognised:
    return activation(a["self"], "relu6") if (a["min_val"], a["max_val"]) == (0, 6) else None


@recognises(aten.clamp.default, aten.clamp_min.default)
def clamp(a: dict[str, Any], result: Facts) -> Recognised:
    name = {(0, 6): "relu6", (0, None): "relu"}.get((a["min"], a.get("max")))
    return activation(a["self"], name) if name is not None else None


@recognises(aten.gelu.default)
def gelu(a: dict[str, Any], result: Facts) -> Recognised:
    return activation(a["self"], "gelu" if a["approximate"] == "none" else "gelu_tanh")


@recognises(aten.add.Tensor)
def add(a: dict[str, Any], result: Facts) -> Recognised:
    left, right, alpha = a["self"], a["other"], a["alpha"]
    if isinstance(left, Live) and alpha == 1:
        left, right = right, left
    if not is_map_or_rows(left):
        return None
    if is_number(right):
        return affine(left, "add", Fixed(shift=(float(right * alpha),)))
    if is_per_channel(right, left, a) and alpha == 1:
        return affine(left, "add", Vector(shift=right.name))
    if not is_float(right) or left.shape != right.shape:
        return None
    if alpha != 1:
        return affine(right, "add", Fixed((float(alpha),)), residual=left)
    return affine(left, "add", residual=right)


@recognises(aten.sub.Tensor)
def sub(a: dict[str, Any], result: Facts) -> Recognised:
    left, right, alpha = a["self"], a["other"], a["alpha"]
    if not is_map_or_rows(left):
        return None
    if is_number(right):
        return affine(left, "sub", Fixed(shift=(-float(right * alpha),)))
    if not is_float(right) or left.shape != right.shape:
        return None
    return affine(right, "sub", Fixed((-float(alpha),)), residual=left)


@recognises(aten.rsub.Scalar)
def rsub(a: dict[str, Any], result: Facts) -> Recognised:
    """A number minus x."""
    if not is_map_or_rows(a["self"]):
        return None
    return affine(a["self"], "rsub", Fixed((-float(a["alpha"]),), (float(a["other"]),)))


@recognises(aten.neg.default)
def neg(a: dict[str, Any], result: Facts) -> Recognised:
    return affine(a["self"], "neg", Fixed((-1.0,))) if is_map_or_rows(a["self"]) else None


def unexpanded(value: Any) -> Any:
    """A gate, of what was expanded to the size of a map."""
    given = arguments(value, aten.expand_as.default, aten.expand.default)
    one_pixel = given is not None and is_map(given[0]) and given[0].pixels == 1
    return given[0] if one_pixel and given[0].channels == value.channels else value


@recognises(aten.mul.Tensor)
def mul(a: dict[str, Any], result: Facts) -> Recognised:
    left, right = a["self"], a["other"]
    left, right = (right, left) if isinstance(left, Live) else (left, right)
    if is_map_or_rows(left) and is_number(right):
        return affine(left, "mul", Fixed((float(right),)))
    if is_map_or_rows(left) and is_per_channel(right, left, a):
        return affine(left, "mul", Vector(scale=right.name))
    for x, other in ((left, right), (right, left)):
        if (name := written_out(x, other)) is not None:
            return affine(x, name, activation=name)
        if is_gate(gate := unexpanded(other), x):
            return affine(x, "gate", gate=gate)
    alike = is_map_or_rows(left) and is_float(right) and left.shape == right.shape and left is not right
    return ("multiply", [left, right], {"roles": ("x", "residual")}) if alike else None


WRITTEN_OUT = {"sigmoid": "silu", "hardsigmoid": "hardswish"}


def written_out(x: Any, factor: Any) -> str | None:
    """The activation that x * factor is: silu where the factor is sigmoid(x)."""
    if not isinstance(factor, Node) or factor.op != "affine" or factor.inputs != [x]:
        return None
    return WRITTEN_OUT.get(factor.attrs["activation"]) if factor.attrs["recipe"] is None else None


@recognises(aten.addcmul.default)
def addcmul(a: dict[str, Any], result: Facts) -> Recognised:
    """shift + x * scale, of parameters and a map."""
    x, scale = a["tensor2"], a["tensor1"]
    if isinstance(x, Live):
        x, scale = scale, x
    if a["value"] != 1 or not is_map_or_rows(x) or not is_per_channel(scale, x, a):
        return None
    if not is_per_channel(a["self"], x, a):
        return None
    return affine(x, "addcmul", Vector(scale=scale.name, shift=a["self"].name))


@recognises(aten.div.Tensor)
def div(a: dict[str, Any], result: Facts) -> Recognised:
    if isinstance(a["other"], Node):
        return normalized(a["self"], a["other"])
    if not (is_map_or_rows(a["self"]) and is_number(a["other"]) and a["other"] != 0):
        return None
    return affine(a["self"], "div", Fixed((1.0 / float(a["other"]),)))


@recognises(aten.layer_norm.default)
def layer_norm(a: dict[str, Any], result: Facts) -> Recognised:
    """Over the last dimension: the channels of rows; of a permuted map, if a rewrite finds it (pixels.py)."""
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not is_map_or_rows(x) or not known_tensors(weight, bias):
        return None
    channels = x.shape[-1]
    if list(a["normalized_shape"]) != [channels]:
        return None
    given = weight is not None or bias is not None
    recipe = scaling(channels, Vector(name_of(weight), name_of(bias))) if given else None
    return "layer_norm", [x], {"recipe": recipe, "eps": float(a["eps"])}


@recognises(aten.group_norm.default)
def group_norm(a: dict[str, Any], result: Facts) -> Recognised:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not is_map(x) or not known_tensors(weight, bias):
        return None
    given = weight is not None or bias is not None
    recipe = scaling(x.channels, Vector(name_of(weight), name_of(bias))) if given else None
    return "group_norm", [x], {"recipe": recipe, "eps": float(a["eps"]), "groups": a["num_groups"]}


@recognises(aten.leaky_relu.default)
def leaky_relu(a: dict[str, Any], result: Facts) -> Recognised:
    return ("leaky_relu", [a["self"]], {"slope": float(a["negative_slope"])}) if is_map(a["self"]) else None


@recognises(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
def upsample_nearest2d(a: dict[str, Any], result: Facts) -> Recognised:
    """To a size, or by factors whose inverse is exact: PyTorch multiplies by that of other factors."""
    x = a.get("self", a.get("input"))
    factors = a.get("scale_factors") or [a.get("scales_h"), a.get("scales_w")]
    if not is_map(x) or any(factor not in (None, 1.0, 2.0, 4.0, 8.0, 16.0) for factor in factors):
        return None
    exact = all(f is None or f * i == o for f, i, o in zip(factors, x.shape[2:], result.shape[2:]))
    return ("upsample_nearest2d", [x], {"size": tuple(result.shape[2:])}) if exact else None


# ---- several calls that are one ----


def arguments(node: Any, *targets: Any) -> tuple[Any, ...] | None:
    """The positional arguments of a node that calls one of the targets without keywords, else None."""
    if not isinstance(node, Node) or node.op != "aten" or node.attrs["target"] not in targets:
        return None
    return None if node.attrs["kwargs"] else tuple(node.attrs["args"])


def normalized(x: Any, divisor: Any) -> Recognised:
    """F.normalize: x / expand(clamp_min(norm(x, 2, dim 1, keepdim), eps)), of rows or of a map's pixels."""
    expanded = arguments(divisor, aten.expand_as.default, aten.expand.default)
    clamped = arguments(expanded[0], aten.clamp_min.default) if expanded else None
    length = (
        arguments(clamped[0], aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) if clamped else None
    )
    if length is None or len(length) != 4 or not is_map_or_rows(x):
        return None
    source, order, dims, keepdim = length
    same = source is x and order == 2 and list(dims) == [1] and keepdim
    return ("l2_normalize", [x], {"eps": float(clamped[1])}) if same and is_number(clamped[1]) else None


@recognises(aten.sum.dim_IntList)
def squared_distances(a: dict[str, Any], result: Facts) -> Recognised:
    """sum((unsqueeze(x, 1) - centers)^2, 2) of rows [N, C] and a tensor of the model, [K, C]."""
    if a["dim"] not in ([2], [-1]) or a["keepdim"] or a["dtype"] is not None:
        return None
    squared = arguments(a["self"], aten.square.default) or arguments(a["self"], aten.pow.Tensor_Scalar)
    apart = arguments(squared[0], aten.sub.Tensor) if squared and squared[1:] in ((), (2,)) else None
    rows = arguments(apart[0], aten.unsqueeze.default) if apart and len(apart) == 2 else None
    if rows is None or rows[1] != 1 or not is_map(rows[0], 2):
        return None
    x, centers = rows[0], apart[1]
    if isinstance(centers, Node):  # computed from parameters alone
        centers = centers.attrs.get("constant")
    shape = a["shapes"].get(centers) if isinstance(centers, Live) else None
    if shape is None or len(shape) != 2 or shape[1] != x.channels:
        return None
    return "squared_distances", [x], {"recipe": Recipe(centers.name), "filters": shape[0]}


# ---- pools ----


@recognises(aten.max_pool2d.default)
def max_pool2d(a: dict[str, Any], result: Facts) -> Recognised:
    kernel = pair(a["kernel_size"])
    if not is_map(a["self"]) or pair(a["dilation"]) != (1, 1):
        return None
    stride = pair(a["stride"]) if a["stride"] else kernel
    attrs = {"kernel": kernel, "stride": stride, "padding": pair(a["padding"]), "ceil_mode": a["ceil_mode"]}
    return "max_pool2d", [a["self"]], attrs


@recognises(aten.avg_pool2d.default)
def avg_pool2d(a: dict[str, Any], result: Facts) -> Recognised:
    if not is_map(a["self"]):
        return None
    kernel, padding, divisor = pair(a["kernel_size"]), pair(a["padding"]), a["divisor_override"]
    if kernel == a["self"].shape[2:] and padding == (0, 0) and divisor is None:
        return "global_avg_pool", [a["self"]], {}
    attrs = {
        "kernel": kernel, "stride": pair(a["stride"]) if a["stride"] else kernel, "padding": padding,
        "ceil_mode": a["ceil_mode"], "count_include_pad": a["count_include_pad"], "size": None,
        "divisor": divisor, "recipe": None, "activation": "none",
    }  # fmt: skip
    return "avg_pool2d", [a["self"]], attrs


@recognises(aten.adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(a: dict[str, Any], result: Facts) -> Recognised:
    if not is_map(a["self"]):
        return None
    size = tuple(result.shape[2:])
    if size == (1, 1):
        return "global_avg_pool", [a["self"]], {}
    if size == a["self"].shape[2:]:
        return "identity", [a["self"]], {}
    attrs = {"kernel": None, "size": size, "recipe": None, "activation": "none"}
    return "avg_pool2d", [a["self"]], attrs


@recognises(aten.mean.dim)
def mean(a: dict[str, Any], result: Facts) -> Recognised:
    if not is_map(a["self"]) or not a["dim"] or a["dtype"] is not None:
        return None
    spatial = sorted(d % 4 for d in a["dim"]) == [2, 3]
    return ("global_avg_pool", [a["self"]], {}) if spatial else None


# ---- channels, borders, shapes ----


@recognises(aten.cat.default)
def cat(a: dict[str, Any], result: Facts) -> Recognised:
    parts = a["tensors"]
    if not all(map(is_map, parts)) or a["dim"] % 4 != 1:
        return None
    return "cat", list(parts), {"roles": ("x",) * len(parts)}


@recognises(aten.slice.Tensor, aten.narrow.default)
def slice_channels(a: dict[str, Any], result: Facts) -> Recognised:
    if not is_map(a["self"]) or a["dim"] % 4 != 1 or a.get("step", 1) != 1 or not result.shape[1]:
        return None
    channels = a["self"].channels
    start = min(max(0, (a["start"] or 0) + (channels if (a["start"] or 0) < 0 else 0)), channels)
    return "slice", [a["self"]], {"start": start}


SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def piece(pieces: Any, number: int, results: Any) -> Recognised:
    """getitem(split(x, ..., dim 1), number): some channels of x. results: all pieces, as Facts."""
    found = arguments(pieces, *SPLITS)
    if found is None or len(found) != 3 or not is_map(found[0]) or found[2] % 4 != 1:
        return None
    sizes = [part.shape[1] for part in results]
    number %= len(sizes)
    return ("slice", [found[0]], {"start": sum(sizes[:number])}) if sizes[number] else None


@recognises(aten.pad.default, aten.constant_pad_nd.default)
def pad(a: dict[str, Any], result: Facts) -> Recognised:
    x, border = a["self"], list(a["pad"])
    if not is_map(x) or a.get("mode", "constant") != "constant":
        return None
    left, right, top, bottom = border + [0] * (4 - len(border)) if len(border) <= 4 else [-1] * 4
    if min(left, right, top, bottom) < 0:
        return None
    return "pad", [x], {"border": (left, right, top, bottom), "value": float(a["value"] or 0)}


@recognises(aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims,
            aten.unsqueeze.default)  # fmt: skip
def flatten(a: dict[str, Any], result: Facts) -> Recognised:
    x, shape = a["self"], tuple(result.shape)
    if is_map(x, 3):  # rows[:, :, None, None]
        x = (arguments(x, aten.unsqueeze.default) or (x,))[0]
    if is_map(x, 2) and shape == (*x.shape, 1, 1):
        return "flatten", [x], {}
    if not is_map(x):
        return None
    if x.shape == shape:
        return "identity", [x], {}
    n, c, h, w = x.shape
    return ("flatten", [x], {}) if shape == (n, c * h * w) else None


@recognises(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(a: dict[str, Any], result: Facts) -> Recognised:
    idle = not a["train"] and isinstance(a["input"], Node)
    return ("identity", [a["input"]], {}) if idle else None


@recognises(aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default)
def same_value(a: dict[str, Any], result: Facts) -> Recognised:
    return ("identity", [a["self"]], {}) if isinstance(a["self"], Node) else None


@recognises(aten.to.dtype, aten.to.device, aten.to.dtype_layout)
def to(a: dict[str, Any], result: Facts) -> Recognised:
    if not isinstance(a["self"], Node):
        return None
    held = a["self"].narrow or a["self"].dtype
    same = held is result.dtype and result.device.type == "cpu"
    return ("identity", [a["self"]], {}) if same and result.layout is torch.strided else None

"""The kernels by the names and parameters that a plan knows (csrc/cpu/op.h has their meaning).

refusal(kind, params)             "" when there is a kernel, else the reason
packed(kind, params, weight)      filters [K, C/G, R, S] as that kernel reads them
tiles(kind, params, dtype)        other tiles than the rule's own, by name
launch(kind, params, operands)    what to put on the stream
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import affine, conv2d, depthwise_conv2d, grouped_conv2d, pointwise_conv2d, pooling, separable_conv2d
from .launch import Launch

Params = Mapping[str, Any]
Operands = Mapping[str, Tensor | None]
Tile = dict[str, int] | None

SIGMOID = 3  # the first activation that does not leave zero where it is
MOST_TAPS = 49  # of an unrolled window

REFUSED = {
    "winograd_conv2d": "no Winograd on GPUs: it loses digits in 16 bits, and costs memory traffic",
    "local_response_norm": "no kernel for GPUs yet",
    "l2_normalize": "no kernel for GPUs yet",
    "layer_norm": "no kernel for GPUs yet",
    "group_norm": "no kernel for GPUs yet",
    "channel_shuffle": "no kernel for GPUs yet",
    "upsample_nearest2d": "no kernel for GPUs yet",
    "leaky_relu": "no kernel for GPUs yet",
    "multiply": "no kernel for GPUs yet",
    "squared_distances": "no kernel for GPUs yet",
    "pad2d": "no kernel for GPUs yet",
}


def refusal(kind: str, params: Params) -> str:
    if kind in REFUSED:
        return REFUSED[kind]
    if kind not in LAUNCHES:
        return f"unknown kind '{kind}'"
    if kind in ("depthwise_conv2d", "separable_conv2d"):
        if params.get("r", 1) * params.get("s", 1) > MOST_TAPS:
            return f"window {params['r']}x{params['s']}: unrolled windows have up to {MOST_TAPS} taps"
        if params.get("pre") or params.get("gated"):
            return "neither scales and shifts its input nor takes a gate"
    if kind == "avg_pool2d" and params.get("out_h") and params.get("activation", 0):
        return "pools to a given size apply no activation"
    if kind == "separable_conv2d" and params.get("pre_activation", 0) >= SIGMOID:
        return "zero must stay zero before the depthwise part"
    if params.get("nchw_in") and (
        kind != "conv2d" or params["c"] // params.get("groups", 1) >= conv2d.FLAT_CHANNELS
    ):
        return "planar input: only convolutions of few channels read planes"
    return ""


def pair(params: Params, name: str, default: int) -> tuple[int, int]:
    return params.get(f"{name}_h", default), params.get(f"{name}_w", default)


def window(params: Params) -> dict[str, Any]:
    kernel = params.get("r", 1), params.get("s", 1)
    return {"kernel": kernel, "stride": pair(params, "stride", 1), "padding": pair(params, "pad", 0)}


def is_pointwise(params: Params) -> bool:
    """A product of pixels and nothing else."""
    w = window(params)
    plain = w["kernel"] == (1, 1) and w["padding"] == (0, 0) and not params.get("nchw_in")
    return (
        plain
        and params.get("groups", 1) == 1
        and not params.get("pad_bottom")
        and not params.get("pad_right")
    )


def packed(kind: str, params: Params, weight: Tensor) -> Tensor:
    if kind == "depthwise_conv2d":
        return depthwise_conv2d.pack(weight)
    if kind == "grouped_conv2d":
        return grouped_conv2d.pack(weight, params["groups"])
    if kind in ("linear", "separable_conv2d") or is_pointwise(params):
        return weight.flatten(1).contiguous()
    return conv2d.pack(weight)


def tiles(kind: str, params: Params, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Other tiles than the rule's own, by name: for products, whose rule knows too little of the card."""
    filters = params.get("k", 0) // params.get("groups", 1)
    if kind in ("conv2d", "linear"):
        module = pointwise_conv2d if kind == "linear" or is_pointwise(params) else conv2d
        found = module.tiles(filters, params["c"] // params.get("groups", 1), dtype)
    elif kind == "grouped_conv2d":
        found = grouped_conv2d.tiles(params["c"], params["k"], params["groups"], dtype)
    else:
        return {}
    return {named(tile): tile for tile in found}


def named(tile: Mapping[str, int]) -> str:
    sizes = "x".join(str(tile[f"BLOCK_{axis}"]) for axis in "MNK")
    return f"{sizes}, {tile['num_warps']} warps, {tile['num_stages']} stages"


EPILOGUE = ("scale", "bias", "gate", "residual")
PROLOGUE = ("pre_scale", "pre_shift")


def some(operands: Operands, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    return {name: operands.get(name) for name in names}


def convolution(kind: str, params: Params, o: Operands, precision: str, tile: Tile = None) -> Launch:
    options: dict[str, Any] = {
        **some(o, EPILOGUE), **some(o, PROLOGUE), "activation": params.get("activation", 0),
        "pre_activation": params.get("pre_activation", 0), "act_from": params.get("act_from", 0),
        "precision": precision, "tiles": tile,
    }  # fmt: skip
    if kind == "linear" or (kind == "conv2d" and is_pointwise(params)):
        return pointwise_conv2d.launch(
            o["x"], o["weight"], o["y"], stride=pair(params, "stride", 1), **options
        )
    options |= {**window(params), "dilation": pair(params, "dilation", 1), "groups": params.get("groups", 1)}
    made = grouped_conv2d.launch if kind == "grouped_conv2d" else conv2d.launch
    return made(o["x"], o["weight"], o["y"], **options)


def depthwise(kind: str, params: Params, o: Operands, precision: str, tile: Tile = None) -> Launch:
    return depthwise_conv2d.launch(
        o["x"], o["weight"], o["y"], **window(params), dilation=pair(params, "dilation", 1),
        scale=o.get("scale"),
        bias=o.get("bias"), activation=params.get("activation", 0),
        pre_activation=params.get("pre_activation", 0),
    )  # fmt: skip


def separable(kind: str, params: Params, o: Operands, precision: str, tile: Tile = None) -> Launch:
    return separable_conv2d.launch(
        o["x"], o["weight"], o["y"], **window(params), dilation=pair(params, "dilation", 1),
        precision=precision,
        **some(o, ("depth_weight", "depth_scale", "depth_bias", "scale", "bias", "residual")),
        depth_activation=params.get("depth_activation", 0), activation=params.get("activation", 0),
        pre_activation=params.get("pre_activation", 0),
    )  # fmt: skip


def elementwise(kind: str, params: Params, o: Operands, precision: str, tile: Tile = None) -> Launch:
    """affine, whose factors are its "weight", and copies between maps."""
    scale = o.get("weight") if o.get("weight") is not None else o.get("scale")
    return affine.launch(
        o["x"], o["y"], scale=scale, shift=o.get("bias"), gate=o.get("gate"), residual=o.get("residual"),
        activation=params.get("activation", 0),
    )  # fmt: skip


def pool(kind: str, params: Params, o: Operands, precision: str, tile: Tile = None) -> Launch:
    if kind == "global_avg_pool":
        return pooling.mean(o["x"], o["y"])
    if params.get("out_h"):
        return pooling.adaptive(o["x"], o["y"])
    behind = params.get("pad_bottom", params.get("pad_h", 0)), params.get("pad_right", params.get("pad_w", 0))
    return pooling.windows(
        o["x"], o["y"], maximum=kind == "max_pool2d", **window(params), behind=behind, bias=o.get("bias"),
        count_include_pad=bool(params.get("count_include_pad", 1)), divisor=params.get("divisor", 0),
        activation=params.get("activation", 0),
    )  # fmt: skip


LAUNCHES = {
    "conv2d": convolution,
    "grouped_conv2d": convolution,
    "linear": convolution,
    "depthwise_conv2d": depthwise,
    "separable_conv2d": separable,
    "affine": elementwise,
    "max_pool2d": pool,
    "avg_pool2d": pool,
    "global_avg_pool": pool,
}


def launch(kind: str, params: Params, operands: Operands, precision: str = "ieee", tile: str = "") -> Launch:
    """precision: of float32 products in convolutions and linear layers, "ieee" or "tf32". tile: one of
    `tiles`, by name; one that is not among them (any more) is the rule's own."""
    x = operands["x"]
    assert x is not None
    chosen = tiles(kind, params, x.dtype).get(tile) if tile else None
    return LAUNCHES[kind](kind, params, operands, precision, chosen)

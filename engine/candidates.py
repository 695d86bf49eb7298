"""Which kernels may take a node, best first, and with which parameters.

The choice depends on the layer and on the precision that the user allows, never on the batch or the number
of threads: a sample gets the same bits in any batch. `refusal(kind, params)` asks the native library ("" when
it accepts); what it says is kept for explain().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .borders import is_even, padding_params, sides, with_border
from .graph import Node

Params = dict[str, Any]
Refusal = Callable[[str, Params], str]
Candidate = tuple[str, Params, str]  # kind, parameters, why the engine declines ("" if it does not)
Choice = tuple[str, Params, list[str]]  # kernel, parameters, what the better ones said
Choices = Mapping[str, str]  # algorithm by layer, as tuning has measured them

ACTIVATIONS = (  # by their number in the library
    "none", "relu", "relu6", "sigmoid", "tanh", "silu", "hardsigmoid", "hardswish", "gelu", "gelu_tanh",
)  # fmt: skip

# Below these sizes Winograd's transforms cost more than the multiplications they save.
WINOGRAD_MIN_CHANNELS = 32
WINOGRAD_MIN_OUTPUT = 4  # of 3x3
# Fewer do not pay for reading 13 weights instead of 7 (1x7 and 7x1) or 46 instead of 25 (5x5).
WINOGRAD_MIN_TILES = 40

BF16_KERNELS = ("conv2d", "winograd_conv2d", "linear", "separable_conv2d", "grouped_conv2d")
BF16_MIN_CHANNELS = 16  # of a group, in the kernels that take it alone

GROUP_WIDTHS = (4, 8, 16, 32)  # output channels of a group, from as many or half as many
DEPTHWISE_MAX_WINDOW = 7

REASONS = {  # why there is no kernel at all
    "cat": "the concatenation of something else than feature maps of kernels",
    "slice": "some channels of a map, for something that is no kernel",
}


def choose(
    node: Node, refusal: Refusal, precision: str = "highest", choices: Choices | None = None
) -> Choice:
    """(kernel, parameters, what the better ones said); the kernel is "aten" when none accepts.

    precision: as torch.set_float32_matmul_precision understands it. "high" lets Winograd take points of
    larger error, "medium" also lets the dense kernels multiply bfloat16, where the processor does.
    choices: `layer_key` -> one of `algorithms`, which then comes first.
    """
    if choices and node.op == "conv2d":
        wanted = choices.get(layer_key(node, precision))
        found = algorithms(node, refusal) if wanted is not None else {}
        if wanted in found:
            kind, params = found[wanted]
            return kind, relaxed(kind, params, refusal, precision), []
    said: list[str] = []
    params: Params = {}
    for kind, params, declined in candidates(node):
        why = declined or refusal(kind, params)
        if not why:
            return kind, relaxed(kind, params, refusal, precision), said
        said.append(f"{kind}: {why}")
    return "aten", params, said or [REASONS.get(node.op, f"no kernel for {node.called}")]


def relaxed(kernel: str, params: Params, refusal: Refusal, precision: str) -> Params:
    """The parameters with what the precision allows; points of more error would be too much for bfloat16."""
    if precision == "medium" and not bf16_declined(kernel, params):
        narrow = {**params, "bf16": 1}
        if not refusal(kernel, narrow):
            return narrow
    if precision != "highest" and kernel == "winograd_conv2d":
        return {**params, "real_points": 1}
    return params


LAYER = (
    "c", "k", "h", "w", "r", "s", "stride_h", "stride_w", "pad_h", "pad_w", "pad_bottom", "pad_right",
    "dilation_h", "dilation_w", "groups",
)  # fmt: skip


def layer_key(node: Node, precision: str) -> str:
    """What makes a convolution fast or slow, besides batch and threads: "c=64 k=64 h=56 ... highest"."""
    p = conv_params(node)
    return " ".join([*(f"{key}={p[key]}" for key in LAYER if key in p), precision])


def algorithms(node: Node, refusal: Refusal) -> dict[str, tuple[str, Params]]:
    """Every way to compute a convolution that all keep the 2x rule, by name, whatever `candidates` thinks of
    their speed; the direct one first. One or none: there is nothing to choose. The image is left to the
    rules: whether it has to be copied first depends on its layout."""
    if node.op != "conv2d" or is_depthwise(node) or node.inputs[0].op == "input":
        return {}
    found: dict[str, tuple[str, Params]] = {}
    for kind, params, declined in conv_candidates(node):
        if kind == "winograd_conv2d" and "pad_bottom" not in params:
            tiles = (2, 4) if params["r"] == params["s"] == 3 else (0,)
            ways = {f"{kind} {tile}".removesuffix(" 0"): {**params, "tile": tile} for tile in tiles}
        else:
            ways = {} if declined else {kind: params}
        found |= {name: (kind, p) for name, p in ways.items() if not refusal(kind, p)}
    return dict(sorted(found.items(), key=lambda item: item[0] != "conv2d"))


def candidates(node: Node) -> Iterator[Candidate]:
    """Kernels that may take this node, best first."""
    if node.op in BY_OP:
        yield from BY_OP[node.op](node)


def input_params(node: Node) -> Params:
    """The sizes of x; rows [N, C] are maps of one pixel."""
    shape = node.inputs[0].shape or ()
    h, w = shape[2:] if len(shape) == 4 else (1, 1)
    return {"n": 1, "h": h, "w": w, "c": shape[1]}


def map_params(node: Node) -> Params:
    """Of what keeps the channels."""
    sizes = input_params(node)
    return {**sizes, "k": sizes["c"]}


def window_params(node: Node) -> Params:
    a = node.attrs
    params = {
        "r": a["kernel"][0], "s": a["kernel"][1], "stride_h": a["stride"][0], "stride_w": a["stride"][1],
        **padding_params(a["padding"]),
    }  # fmt: skip
    if "dilation" in a:
        params |= {"dilation_h": a["dilation"][0], "dilation_w": a["dilation"][1]}
    return params


def epilogue_params(node: Node) -> Params:
    """Only what is there, so that a kernel need not know the others."""
    a = node.attrs
    params: Params = {"activation": ACTIVATIONS.index(a["activation"])}
    if "gate" in node.roles:
        params["gated"] = 1
    if a.get("act_from"):
        params["act_from"] = a["act_from"]
    if a.get("pre") is not None:
        params["pre"] = 1
    if a.get("pre_activation", "none") != "none":
        params["pre_activation"] = ACTIVATIONS.index(a["pre_activation"])
    return params


def conv_params(node: Node) -> Params:
    sizes = {**input_params(node), "k": node.attrs["filters"], "groups": node.attrs["groups"]}
    return {**sizes, **window_params(node), **epilogue_params(node)}


def winograd_declined(p: Params) -> str:
    """Why this convolution of stride 1, 3x3, 5x5, 1x7 or 7x1, does not go to Winograd; "" when it does."""
    if "pad_bottom" in p:
        return "a border that differs from side to side"
    if p["c"] < WINOGRAD_MIN_CHANNELS or p["k"] < WINOGRAD_MIN_CHANNELS:
        return f"{p['c']} to {p['k']} channels: pays from {WINOGRAD_MIN_CHANNELS} on"
    height, width = p["h"] + 2 * p["pad_h"] - p["r"] + 1, p["w"] + 2 * p["pad_w"] - p["s"] + 1
    if p["r"] != p["s"]:
        tiles = height * -(-width // 4) if p["r"] == 1 else -(-height // 4) * width
        return few_tiles(tiles)
    if p["r"] == 5:
        return few_tiles(-(-height // 2) * -(-width // 2))
    if height < WINOGRAD_MIN_OUTPUT or width < WINOGRAD_MIN_OUTPUT:
        return f"output {height}x{width}: pays from {WINOGRAD_MIN_OUTPUT}x{WINOGRAD_MIN_OUTPUT} on"
    return ""


def few_tiles(tiles: int) -> str:
    few = f"{tiles} tiles of 4 outputs: pays from {WINOGRAD_MIN_TILES} on"
    return few if tiles < WINOGRAD_MIN_TILES else ""


def bf16_declined(kernel: str, p: Params) -> str:
    """Why this kernel goes on multiplying float32 where bfloat16 is allowed; "" when it does not."""
    if kernel not in BF16_KERNELS:
        return "multiplies float32 only"
    width = p["c"] // p.get("groups", 1)
    if kernel != "grouped_conv2d" and width < BF16_MIN_CHANNELS:
        return f"{width} channels: pays from {BF16_MIN_CHANNELS} on"
    return ""


def is_depthwise(node: Node) -> bool:
    """Every channel is convolved on its own, and the window is one that the kernel is made for."""
    a = node.attrs
    alone = node.op == "conv2d" and a["groups"] == a["filters"] == node.inputs[0].channels > 1
    return alone and max(a["kernel"]) <= DEPTHWISE_MAX_WINDOW


def is_pointwise(node: Node) -> bool:
    """A 1x1 convolution of every pixel, in one group."""
    a = node.attrs
    same = node.op == "conv2d" and a["kernel"] == a["stride"] == (1, 1) and a["padding"] == (0, 0)
    return same and a["groups"] == 1


def added_declined(node: Node) -> str:
    """For kernels that add and multiply nothing after their own arithmetic."""
    return "takes no residual and no gate" if len(node.roles) > 1 else ""


def conv_candidates(node: Node) -> Iterator[Candidate]:
    """Best first. Kinds that are made for something else altogether are not mentioned."""
    p = conv_params(node)
    window = (p["r"], p["s"], p["dilation_h"], p["dilation_w"])
    strides, pads = {p["stride_h"], p["stride_w"]}, {*sides(node.attrs["padding"])}
    narrow = pads <= {0, 1}
    if (
        is_pointwise(node)
        and (p["h"], p["w"]) == (1, 1)
        and not p.keys() & {"pre", "pre_activation", "act_from"}
    ):
        yield "linear", {key: p[key] for key in ("n", "h", "w", "c", "k", "activation")}, added_declined(node)
    if is_depthwise(node):
        yield "depthwise_conv2d", p, added_declined(node)
    square = len(pads) == 1 or not is_even(node.attrs["padding"])
    dense = p["groups"] == 1 and strides == {1}
    if window in ((1, 7, 1, 1), (7, 1, 1, 1)) and dense and is_even(node.attrs["padding"]):
        yield "winograd_conv2d", p, winograd_declined(p)
    if window in ((3, 3, 1, 1), (5, 5, 1, 1)) and dense and max(pads) <= p["r"] // 2 and square:
        yield "winograd_conv2d", p, winograd_declined(p)
    if window == (3, 3, 1, 1) and p["groups"] > 1 and narrow and strides in ({1}, {2}):
        width = p["c"] // p["groups"]
        fits = p["k"] in (p["c"], 2 * p["c"]) and p["k"] // p["groups"] in GROUP_WIDTHS
        if fits or not is_depthwise(node):
            declined = "" if fits else f"{width} channels a group, {p['c']} to {p['k']} channels"
            yield "grouped_conv2d", p, declined
    yield "conv2d", p, ""


def separable_candidates(node: Node) -> Iterator[Candidate]:
    p = {**input_params(node), "k": node.attrs["filters"], **window_params(node), **epilogue_params(node)}
    yield "separable_conv2d", {**p, "depth_activation": ACTIVATIONS.index(node.attrs["depth_activation"])}, ""


def linear_candidates(node: Node) -> Iterator[Candidate]:
    """The rows are [N, C], whatever map they were flattened from."""
    sizes = {"n": 1, "h": 1, "w": 1, "c": (node.inputs[0].shape or ())[1], "k": node.attrs["filters"]}
    yield "linear", {**sizes, **epilogue_params(node)}, added_declined(node)


def pad_candidates(node: Node) -> Iterator[Candidate]:
    sizes, a = input_params(node), node.attrs
    border = {**padding_params(with_border((0, 0), a["border"])), "border": a["value"]}
    yield "pad2d", {**sizes, "k": sizes["c"], **border}, ""


def affine_candidates(node: Node) -> Iterator[Candidate]:
    sizes = input_params(node)
    yield "affine", {**sizes, "k": sizes["c"], **epilogue_params(node)}, ""


def max_pool_candidates(node: Node) -> Iterator[Candidate]:
    sizes = input_params(node)
    yield (
        "max_pool2d",
        {**sizes, "k": sizes["c"], **window_params(node), "ceil_mode": int(node.attrs["ceil_mode"])},
        "",
    )


def avg_pool_candidates(node: Node) -> Iterator[Candidate]:
    a, sizes = node.attrs, input_params(node)
    p = {**sizes, "k": sizes["c"], "activation": ACTIVATIONS.index(a["activation"])}
    if a["size"] is not None:
        p |= {"out_h": a["size"][0], "out_w": a["size"][1]}
    else:
        counts = {"count_include_pad": int(a["count_include_pad"]), "divisor": a["divisor"] or 0}
        p |= {**window_params(node), "ceil_mode": int(a["ceil_mode"]), **counts}
    yield "avg_pool2d", p, added_declined(node)


def global_pool_candidates(node: Node) -> Iterator[Candidate]:
    sizes = input_params(node)
    yield "global_avg_pool", {**sizes, "k": sizes["c"]}, ""


def response_candidates(node: Node) -> Iterator[Candidate]:
    sizes = input_params(node)
    yield "local_response_norm", {**sizes, "k": sizes["c"], **node.attrs["formula"]}, ""


def shuffle_candidates(node: Node) -> Iterator[Candidate]:
    yield "channel_shuffle", {**map_params(node), "groups": node.attrs["groups"]}, ""


def layer_norm_candidates(node: Node) -> Iterator[Candidate]:
    yield "layer_norm", {**map_params(node), "eps": node.attrs["eps"]}, ""


def group_norm_candidates(node: Node) -> Iterator[Candidate]:
    yield "group_norm", {**map_params(node), "eps": node.attrs["eps"], "groups": node.attrs["groups"]}, ""


def multiply_candidates(node: Node) -> Iterator[Candidate]:
    yield "multiply", map_params(node), ""


def leaky_relu_candidates(node: Node) -> Iterator[Candidate]:
    yield "leaky_relu", {**map_params(node), "alpha": node.attrs["slope"]}, ""


def upsample_candidates(node: Node) -> Iterator[Candidate]:
    height, width = node.attrs["size"]
    yield "upsample_nearest2d", {**map_params(node), "out_h": height, "out_w": width}, ""


def l2_candidates(node: Node) -> Iterator[Candidate]:
    sizes = input_params(node)
    yield "l2_normalize", {**sizes, "k": sizes["c"], "eps": node.attrs["eps"]}, ""


def distance_candidates(node: Node) -> Iterator[Candidate]:
    yield "squared_distances", {**input_params(node), "k": node.attrs["filters"]}, ""


BY_OP: dict[str, Callable[[Node], Iterator[Candidate]]] = {
    "conv2d": conv_candidates,
    "separable_conv2d": separable_candidates,
    "linear": linear_candidates,
    "pad": pad_candidates,
    "affine": affine_candidates,
    "max_pool2d": max_pool_candidates,
    "avg_pool2d": avg_pool_candidates,
    "global_avg_pool": global_pool_candidates,
    "local_response_norm": response_candidates,
    "shuffle": shuffle_candidates,
    "layer_norm": layer_norm_candidates,
    "group_norm": group_norm_candidates,
    "multiply": multiply_candidates,
    "leaky_relu": leaky_relu_candidates,
    "upsample_nearest2d": upsample_candidates,
    "l2_normalize": l2_candidates,
    "squared_distances": distance_candidates,
}

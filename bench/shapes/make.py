"""Write the layer shapes of real networks: python -m bench.shapes.make [--check]

One file per network, one line per distinct layer, found by forward hooks on a meta-device model (shapes only,
no arithmetic). --check compares with the files instead of writing them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from fast_backbones.backbones.layers import SqueezeExcite
from torch import nn

HERE = Path(__file__).resolve().parent
NETWORKS = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "vgg16",
    "mobilenetv1_100",
    "legacy_xception",
    "alexnet_2012",
    "densenet121",
    "legacy_seresnet50",
)
SIZES = {"alexnet_2012": 227}  # of images, where it is not 224
# VGG's configuration D (Simonyan and Zisserman 2014, arXiv 1409.1556, table 1)
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

HEADER = """\
# Layers of {name} for one {size} image. Written by `python -m bench.shapes.make`.
# C H W input, K filters or outputs, R kernel (R x R), count = how often the network has this layer.
# {columns}
"""
COLUMNS = ["op", "C", "H", "W", "K", "R", "stride", "padding", "groups", "count", "why"]


def vgg16() -> nn.Module:
    """The convolutions, pools and linear layers of VGG-16: enough for its shapes. Named by block, as in the
    paper."""
    layers: dict[str, nn.Module] = {}
    channels, block, number = 3, 1, 1
    for width in VGG16:
        if width == "M":
            layers[f"pool{block}"] = nn.MaxPool2d(2)
            block, number = block + 1, 1
        else:
            layers[f"conv{block}_{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            channels, number = width, number + 1
    layers["flatten"] = nn.Flatten()
    for name, inputs, outputs in (("fc6", 512 * 7 * 7, 4096), ("fc7", 4096, 4096), ("fc8", 4096, 1000)):
        layers[name] = nn.Linear(inputs, outputs)
    return nn.Sequential(OrderedDict(layers))


def is_depthwise(conv: nn.Conv2d) -> bool:
    """One filter for each of several channels."""
    return conv.groups == conv.in_channels == conv.out_channels > 1


def conv_op(conv: nn.Conv2d) -> str:
    """The kernel op that this convolution belongs to."""
    if conv.kernel_size == (1, 1) and conv.groups == 1:
        return "pointwise_conv2d"
    if is_depthwise(conv):
        return "depthwise_conv2d"
    if conv.groups > 1:
        return "grouped_conv2d"
    return "stem_conv2d" if conv.in_channels == 3 and conv.stride == (2, 2) else "conv2d"


def role(op: str, c: int, k: int, stride: int) -> str:
    """What the layer does for the network, in a few words."""
    if op == "linear":
        return "classifier" if k == 1000 else "hidden layer of the classifier"
    if op == "global_avg_pool":
        return "head"
    if op == "stem_conv2d":
        return "first layer"
    if op == "local_response_norm":
        return "normalises"
    if op == "squeeze_excite":
        return "gates channels"
    parts = ["halves the image"] if stride > 1 else []
    if op == "pointwise_conv2d" or c != k:
        parts.append("widens" if k > c else "narrows" if k < c else "keeps the width")
    return ", ".join(parts) or "keeps size and width"


def layer_of(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple | None:
    """(op, C, H, W, K, R, stride, padding, groups) of one call, or None when there is no kernel for the
    module."""

    def number(value) -> int:
        pair = (value, value) if isinstance(value, int) else tuple(value)
        if pair[0] != pair[1]:
            raise ValueError(f"{module}: the shape files hold square kernels, strides and paddings only")
        return pair[0]

    if isinstance(module, nn.Conv2d):
        geometry = (number(module.kernel_size), number(module.stride), number(module.padding), module.groups)
        return (conv_op(module), *x.shape[1:], module.out_channels, *geometry)
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        op = "max_pool2d" if isinstance(module, nn.MaxPool2d) else "avg_pool2d"
        geometry = (number(module.kernel_size), number(module.stride), number(module.padding), 1)
        return (op, *x.shape[1:], x.shape[1], *geometry)
    if isinstance(module, nn.LocalResponseNorm):
        return ("local_response_norm", *x.shape[1:], x.shape[1], module.size, 1, module.size // 2, 1)
    if isinstance(module, SqueezeExcite):
        return ("squeeze_excite", *x.shape[1:], module.fc1.out_channels, 1, 1, 0, 1)
    if isinstance(module, nn.AdaptiveAvgPool2d) and y.shape[2:] == (1, 1):
        return ("global_avg_pool", *x.shape[1:], x.shape[1], 1, 1, 0, 1)
    if isinstance(module, nn.Linear):
        return ("linear", module.in_features, 1, 1, module.out_features, 1, 1, 0, 1)
    return None


def separable(depth: tuple, pointwise: tuple) -> tuple:
    """The layer that a depthwise and the 1x1 convolution behind it are together."""
    _, c, h, w, _, r, stride, padding, _ = depth
    return ("separable_conv2d", c, h, w, pointwise[4], r, stride, padding, 1)


def layers_of(model: nn.Module, image: torch.Tensor) -> dict[tuple, list[str]]:
    """Distinct layers in the order of the forward, each with the names of the modules that have that
    shape."""
    found: dict[tuple, list[str]] = {}
    depthwise: tuple[str, tuple, torch.Size] | None = None  # the last one: its name, layer and output

    def listen(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            nonlocal depthwise
            layer = layer_of(module, inputs[0], output)
            if layer is None:
                return
            found.setdefault(layer, []).append(name)
            if layer[0] == "depthwise_conv2d":
                depthwise = (name, layer, output.shape)
            elif layer[0] == "pointwise_conv2d" and depthwise and inputs[0].shape == depthwise[2]:
                found.setdefault(separable(depthwise[1], layer), []).append(depthwise[0])
                depthwise = None
            else:
                depthwise = None

        return hook

    hooks = [m.register_forward_hook(listen(n)) for n, m in model.named_modules()]
    try:
        with torch.no_grad():
            getattr(model, "forward_modules", model)(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def lines(name: str) -> Iterable[str]:
    """The file of one network."""
    with torch.device("meta"):
        if name == "vgg16":
            model = vgg16().eval()
        else:
            import fast_backbones as fb

            model = fb.create_model(name).eval()
        size = SIZES.get(name, 224)
        image = torch.empty(1, 3, size, size)
    rows = [COLUMNS]
    for layer, names in layers_of(model, image).items():
        op, c, _, _, k, _, stride, _, _ = layer
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append([*map(str, layer), str(len(names)), f"{names[0]}{more}: {role(op, c, k, stride)}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]

    def aligned(row: list[str]) -> str:
        first, *numbers = row[:-1]
        right = [v.rjust(w) for v, w in zip(numbers, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *right, row[-1]])

    yield HEADER.format(name=name, size=f"{size} x {size}", columns=aligned(rows[0]))
    for row in rows[1:]:
        yield f"  {aligned(row)}\n"


def main(argv: list[str]) -> int:
    stale = []
    for name in NETWORKS:
        path, text = HERE / f"{name}.txt", "".join(lines(name))
        if "--check" not in argv:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            stale.append(path.name)
    if stale:
        print(
            f"not what the models say: {', '.join(stale)}; run python -m bench.shapes.make", file=sys.stderr
        )
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Convolutions of the torch-free interface, one line each: what a plan asks of it and the public ops do not.

Layer                                 sizes, operands, the formula, a run on memory with marked borders
layer(), winograd(), separable()      make one
LAYERS                                the table that several test files walk
check_exact(layer)                    integers, to the bit
check_same_bits(layer)                whatever the threads, the strides and the batch
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from helpers import assert_bit_equal, assert_equal, integers, reals, threads

from fast_backbones.kernels import _ext

MARK = 12345.0  # what the memory around y holds
ACTIVATIONS = {
    0: lambda t: t,
    1: F.relu,
    2: F.relu6,
    3: torch.sigmoid,
    4: torch.tanh,
    5: F.silu,
    6: F.hardsigmoid,
    7: F.hardswish,
    8: F.gelu,
    9: partial(F.gelu, approximate="tanh"),
}
NONE, RELU, RELU6, SIGMOID, TANH, SILU, HARDSIGMOID, HARDSWISH, GELU, GELU_TANH = ACTIVATIONS


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Layer:
    """A convolution of the torch-free interface: sizes, and which of its operands there are."""

    why: str
    x: tuple[int, int, int, int]  # n, c, h, w
    filters: int
    kernel: int | tuple[int, int] = 1
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int = 1
    groups: int = 1
    kind: str = "conv2d"
    bias: bool = True
    residual: bool = False
    scaled: bool = False  # the sums, before the bias is added: of bfloat16 kernels
    # gated, activation, act_from, pre, pre_activation, nchw_in; pad_bottom and pad_right, both or neither
    options: dict = field(default_factory=dict)

    def option(self, name: str) -> int:
        return self.options.get(name, 0)

    def params(self, n: int) -> dict:
        _, c, h, w = self.x
        names = {"r": _pair(self.kernel)[0], "s": _pair(self.kernel)[1], "groups": self.groups}
        pairs = {"stride": self.stride, "pad": self.padding, "dilation": self.dilation}
        for name, value in pairs.items():
            names |= {f"{name}_h": _pair(value)[0], f"{name}_w": _pair(value)[1]}
        return {"n": n, "c": c, "h": h, "w": w, "k": self.filters} | names | self.options

    def depth_params(self, n: int) -> dict:
        """Of the depthwise part of a separable convolution."""
        options = {"activation": self.option("depth_activation"), "depth_activation": 0, "bf16": 0}
        return self.params(n) | {"k": self.x[1], "groups": self.x[1]} | options

    def inputs(self, data: str = "integers", seed: int = 0) -> dict:
        def make(shape, offset, limit=4, multiple=1):
            if data == "integers":
                return integers(shape, 20 * seed + offset, limit=limit, multiple=multiple)
            return reals(shape, 20 * seed + offset, positive=data == "positive")

        n, c, _, _ = self.x
        shape = (self.filters, c // self.groups, *self.dense_kernel())
        fine = self.option("tile") == 4 or (self.kind == "winograd_conv2d" and self.kernel == 5)
        quarters = 16 if fine else 4  # Winograd divides filters by 4 or 16
        tensors = {"x": make(self.x, 0), "weight": make(shape, 1, limit=2, multiple=quarters)}
        if self.kind == "separable_conv2d":
            tensors["depth_weight"] = make((c, 1, *_pair(self.kernel)), 7, limit=2)
            if self.bias:
                tensors["depth_bias"] = make((c,), 8)
        for name in ("weight", "depth_weight"):
            if data != "integers" and name in tensors:
                tensors[name] = tensors[name] / (tensors[name][0].numel() ** 0.5)
        if self.bias:
            tensors["bias"] = make((self.filters,), 2, limit=64)
        if self.scaled:
            tensors["scale"] = make((self.filters,), 9, limit=3)
        if self.option("gated"):
            tensors["gate"] = make((n, self.filters), 3, limit=3)
        if self.option("pre"):
            tensors["pre_scale"] = make((c,), 4, limit=2)
            tensors["pre_shift"] = make((c,), 5, limit=3)
        if self.residual:
            tensors["residual"] = make(self.exact(tensors).shape, 6, limit=64)
        return tensors

    def dense_kernel(self) -> tuple[int, int]:
        """Of the convolution that adds up channels."""
        return (1, 1) if self.kind == "separable_conv2d" else _pair(self.kernel)

    def reference(self, tensors: dict) -> torch.Tensor:
        """The formula of csrc/cpu/op.h in plain PyTorch, in the precision of the tensors."""
        x = tensors["x"]
        if self.option("pre"):
            x = x * tensors["pre_scale"][:, None, None] + tensors["pre_shift"][:, None, None]
        x = ACTIVATIONS[self.option("pre_activation")](x)
        geometry = (self.stride, self.padding, self.dilation)
        if "pad_bottom" in self.options:
            top, left = _pair(self.padding)
            x = F.pad(x, (left, self.option("pad_right"), top, self.option("pad_bottom")))
            geometry = (self.stride, 0, self.dilation)
        if self.kind == "separable_conv2d":
            depth_weight, depth_bias = tensors["depth_weight"], tensors.get("depth_bias")
            x = F.conv2d(x, depth_weight, depth_bias, *geometry, groups=x.shape[1])
            x = ACTIVATIONS[self.option("depth_activation")](x)
            geometry = ()
        if "scale" in tensors:
            y = F.conv2d(x, tensors["weight"], None, *geometry, groups=self.groups)
            y = y * tensors["scale"][:, None, None]
            y = y + tensors["bias"][:, None, None] if self.bias else y
        else:
            y = F.conv2d(x, tensors["weight"], tensors.get("bias"), *geometry, groups=self.groups)
        if "gate" in tensors:
            y = y * tensors["gate"][:, :, None, None]
        if "residual" in tensors:
            y = y + tensors["residual"]
        first = self.option("act_from")
        return torch.cat([y[:, :first], ACTIVATIONS[self.option("activation")](y[:, first:])], 1)

    def exact(self, tensors: dict) -> torch.Tensor:
        return self.reference({name: t.double() for name, t in tensors.items()})

    def is_exact(self) -> bool:
        return max(map(self.option, ("activation", "pre_activation", "depth_activation"))) <= RELU6

    def run(self, tensors: dict, count: int = 1, wide: bool = False) -> torch.Tensor:
        """The native result; `wide` puts x, residual, gate and y into slices of wider memory."""
        module = _ext.native()
        n = tensors["x"].shape[0]
        params = self.params(n)
        y = Place(self.exact(tensors).float(), wide, MARK)
        sources = {"x": Place(tensors["x"], wide and not self.option("nchw_in"), float("nan"))}
        params |= {"ldy": y.ld}
        if self.option("nchw_in"):
            planar = tensors["x"].contiguous()
            sources["x"].address = planar.data_ptr()
        else:
            params |= {"ldx": sources["x"].ld}
        if self.residual:
            sources["residual"] = Place(tensors["residual"], wide, float("nan"))
            params |= {"ldr": sources["residual"].ld}
        if "gate" in tensors:
            sources["gate"] = Place(tensors["gate"][:, :, None, None], wide, float("nan"))
            params |= {"ldg": sources["gate"].ld}
        weight = packed(self.kind, params, tensors["weight"])
        pointers = {name: place.address for name, place in sources.items()}
        pointers |= {"weight": weight.data_ptr(), "y": y.address}
        if self.kind == "separable_conv2d":
            depth_weight = packed("depthwise_conv2d", self.depth_params(n), tensors["depth_weight"])
            pointers["depth_weight"] = depth_weight.data_ptr()
        for name in ("scale", "bias", "pre_scale", "pre_shift", "depth_bias"):
            if name in tensors:
                pointers[name] = tensors[name].data_ptr()
        with threads(count):
            module.run_op(self.kind, params, pointers, threads=count)
        assert (y.rest() == MARK).all(), "wrote beside its output"
        return y.values.contiguous()


def packed(kind: str, params: dict, weight: torch.Tensor) -> torch.Tensor:
    module = _ext.native()
    out = torch.full((module.packed_floats(kind, params),), float("nan"))
    plain = weight.contiguous()  # kept alive while it is read
    module.pack_weight(kind, params, plain.data_ptr(), out.data_ptr())
    return out


class Place:
    """An NHWC map of the sizes of a tensor, dense or as a slice of wider pixels."""

    def __init__(self, tensor: torch.Tensor, wide: bool, fill: float):
        n, c, h, w = tensor.shape
        before, after = (3, 6) if wide else (0, 0)
        self.ld = before + c + after
        spare = 64
        size = n * h * w * self.ld + 2 * spare
        self.memory = torch.full((size,), fill, dtype=tensor.dtype, device=tensor.device)
        inner = self.memory[spare : spare + n * h * w * self.ld].view(n, h, w, self.ld)
        self.values = inner[..., before : before + c].permute(0, 3, 1, 2)
        self.address = self.values.data_ptr()
        if fill != MARK:
            self.values.copy_(tensor)

    def rest(self) -> torch.Tensor:
        mask = torch.ones_like(self.memory, dtype=torch.bool)
        mask.as_strided(self.values.shape, self.values.stride(), self.values.storage_offset()).fill_(False)
        return self.memory[mask]


def layer(why, x, filters, kernel=1, *, residual=False, bias=True, **rest) -> Layer:
    geometry = {k: rest.pop(k) for k in ("stride", "padding", "dilation", "groups", "kind") if k in rest}
    return Layer(why, x, filters, kernel, residual=residual, bias=bias, options=rest, **geometry)


def winograd(why, x, filters, tile, kernel=3, **rest) -> Layer:
    rest = {"padding": 1, "tile": tile, "activation": RELU} | rest
    form = f"F({tile}x{tile})" if tile else f"{kernel}x{kernel} by Winograd"
    return layer(f"{form}: {why}", x, filters, kernel, kind="winograd_conv2d", **rest)


def separable(why, x, filters, kernel=3, **rest) -> Layer:
    padding = rest.pop("padding", 1)
    return layer(f"separable: {why}", x, filters, kernel, kind="separable_conv2d", padding=padding, **rest)


def uneven(**behind) -> list[Layer]:
    text = " and ".join(
        f"{behind[name]} {place}" for name, place in (("pad_bottom", "below"), ("pad_right", "right"))
    )
    grouped = {"padding": 0, "stride": 2, "groups": 8, "kind": "grouped_conv2d"}
    depth = {"padding": 0, "groups": 40, "kind": "depthwise_conv2d", "activation": RELU6}
    found = [
        layer(f"3x3 of stride 2, border {text}", (2, 24, 8, 10), 40, 3, stride=2, activation=RELU, **behind),
        layer(f"two phases, border {text}", (2, 350, 6, 6), 64, 3, stride=2, padding=(0, 1), pre=1, **behind),
        layer(f"groups, border {text}", (2, 24, 6, 7), 36, 3, groups=3, residual=True, **behind),
        layer(f"planar, border {text}", (2, 3, 18, 16), 24, 3, stride=2, nchw_in=1, **behind),
        layer(f"depthwise, border {text}", (2, 40, 12, 18), 40, 3, stride=2, **depth, **behind),
        layer(f"depthwise 5x5, border {text}", (1, 40, 9, 19), 40, 5, **depth, **behind),
        separable(f"border {text}", (2, 24, 8, 18), 40, stride=2, padding=0, depth_activation=RELU, **behind),
        separable(
            f"two phases, border {text}", (1, 420, 6, 6), 360, padding=(1, 0), pre_activation=RELU, **behind
        ),
    ]
    if max(behind.values()) <= 1:
        found.append(layer(f"grouped rows, border {text}", (2, 64, 8, 10), 64, 3, **grouped, **behind))
    return found


LAYERS = [
    layer("relu6 of a 1x1", (2, 37, 5, 7), 53, activation=RELU6),
    layer("relu6 of a 3x3, residual", (1, 24, 9, 8), 40, 3, padding=1, residual=True, activation=RELU6),
    *(
        winograd(why, x, filters, tile, **rest)
        for tile in (2, 4)
        for why, x, filters, rest in [
            ("relu6", (2, 19, 7, 9), 37, {"activation": RELU6}),
            ("one pixel, all padding", (1, 5, 1, 1), 3, {}),
            ("no padding, no bias", (1, 33, 10, 6), 32, {"padding": 0, "bias": False}),
            ("padding in one direction, wider than the window", (2, 16, 3, 5), 20, {"padding": (0, 4)}),
            ("several tasks, residual", (1, 20, 37, 42), 40, {"residual": True}),
            ("several images in a task, residual", (5, 70, 9, 7), 35, {"residual": True}),
            ("large weights on few pixels: two phases", (2, 256, 6, 5), 136, {"residual": True}),
        ]
    ),
    *(
        winograd(why, x, filters, 0, kernel=5, **{"padding": 2, **rest})
        for why, x, filters, rest in [
            ("relu6", (2, 19, 7, 9), 37, {"activation": RELU6}),
            ("one pixel, all padding", (1, 5, 1, 1), 3, {}),
            ("no padding, no bias", (1, 33, 10, 6), 32, {"padding": 0, "bias": False}),
            ("padding in one direction, wider than the window", (2, 16, 5, 5), 20, {"padding": (0, 6)}),
            ("padding much wider than the window", (1, 16, 3, 4), 20, {"padding": (9, 11)}),
            ("several tasks, residual", (1, 20, 21, 26), 40, {"residual": True}),
            ("several images in a task, residual", (5, 70, 5, 4), 35, {"residual": True}),
            ("large weights on few pixels: two phases", (2, 160, 6, 5), 136, {"residual": True}),
        ]
    ),
    *(
        layer(f"F(4,7): {why}", x, filters, kernel, kind="winograd_conv2d", **{"activation": RELU, **rest})
        for kernel, padding in (((1, 7), (0, 3)), ((7, 1), (3, 0)))
        for why, x, filters, rest in [
            (f"{kernel}", (2, 24, 9, 10), 40, {"padding": padding, "residual": True}),
            (f"{kernel}, relu6", (1, 33, 17, 17), 37, {"padding": padding, "activation": RELU6}),
            (f"{kernel} on fewer pixels than taps", (2, 16, 3, 2), 20, {"padding": padding}),
            (f"{kernel} without padding or bias", (1, 19, 12, 11), 33, {"bias": False}),
            (f"{kernel}, padding on all sides", (2, 17, 5, 6), 35, {"padding": 4}),
            (f"{kernel}, large weights on few pixels: two phases", (2, 256, 6, 5), 136, {"padding": padding}),
        ]
    ),
    layer("relu6 of grouped rows", (1, 32, 6, 9), 32, 3, padding=1, groups=8, kind="grouped_conv2d",
          activation=RELU6),
    layer("relu6 of linear", (5, 70, 1, 1), 33, kind="linear", activation=RELU6),
    layer("sigmoid of a 1x1", (2, 40, 5, 7), 53, activation=SIGMOID),
    layer("sigmoid of linear: a gate", (3, 64, 1, 1), 256, kind="linear", activation=SIGMOID),
    layer("tanh of a 5x5", (2, 6, 10, 9), 16, 5, activation=TANH),
    layer("tanh of linear, residual", (3, 84, 1, 1), 45, kind="linear", residual=True, activation=TANH),
    layer("sigmoid in two phases", (1, 350, 5, 6), 64, 3, stride=2, padding=1, activation=SIGMOID),
    layer("gate", (3, 24, 5, 7), 40, gated=1),
    layer("gate, residual, relu: a squeeze-excite tail", (2, 64, 7, 7), 256, residual=True, gated=1,
          activation=RELU),
    layer("gate without bias", (2, 16, 4, 5), 33, bias=False, gated=1, activation=RELU6),
    layer("gates of many small images in one block", (9, 32, 2, 3), 48, gated=1, residual=True),
    layer("gate with large weights", (2, 512, 7, 7), 456, gated=1, residual=True, activation=RELU),
    layer("gate of a 3x3", (2, 17, 6, 5), 35, 3, padding=1, gated=1, activation=RELU),
    layer("gate of a strided 1x1", (3, 40, 7, 5), 24, stride=2, gated=1),
    layer("gate of groups in two phases", (3, 24, 7, 6), 36, 3, padding=1, groups=3, gated=1, residual=True),
    layer("gate and sigmoid", (2, 24, 5, 7), 40, gated=1, activation=SIGMOID),
    layer("activation from channel 32 on", (2, 40, 5, 7), 100, act_from=32, activation=RELU),
    layer("activation from channel 64 on, relu6, residual", (1, 16, 6, 6), 70, residual=True, act_from=64,
          activation=RELU6),
    layer("activation beyond the last channel", (1, 16, 6, 6), 50, act_from=64, activation=RELU),
    layer("sigmoid from channel 32 on", (1, 16, 6, 6), 70, act_from=32, activation=SIGMOID),
    layer("activation from a channel of large weights on", (1, 512, 14, 14), 416, act_from=288,
          activation=RELU),
    layer("activation from a channel on, 3x3", (1, 20, 6, 6), 64, 3, padding=1, act_from=32, activation=RELU),
    layer("relu on the input of a 1x1", (2, 37, 5, 7), 33, pre_activation=RELU),
    layer("scaled input of a 1x1", (2, 37, 5, 7), 33, pre=1),
    layer("batch norm and relu on the input: DenseNet", (2, 100, 7, 6), 128, pre=1, pre_activation=RELU,
          activation=RELU),
    layer("DenseNet with weights larger than the cache", (2, 1000, 5, 4), 128, pre=1, pre_activation=RELU,
          activation=RELU),
    layer("strided 1x1 from pixels of 4 KiB", (2, 1024, 5, 6), 40, stride=2),
    layer("3x3 from pixels of 4 KiB", (1, 1024, 4, 5), 33, 3, padding=1),
    layer("scaled input, pixels of 4 KiB", (2, 1024, 4, 5), 40, pre=1, pre_activation=RELU),
    separable("pixels of 4 KiB", (2, 1024, 5, 6), 40, depth_activation=RELU),
    layer("DenseNet transition", (1, 96, 14, 14), 48, pre=1, pre_activation=RELU),
    layer("scaled input of a 3x3: padding stays zero", (2, 18, 6, 5), 20, 3, padding=1, pre=1,
          pre_activation=RELU),
    layer("scaled input in two phases", (2, 350, 5, 6), 64, 3, stride=2, padding=1, pre=1,
          pre_activation=RELU),
    layer("scaled input of groups", (2, 24, 5, 6), 36, 3, padding=1, groups=3, pre=1, pre_activation=RELU),
    layer("scaled input of 1x1 groups", (2, 24, 5, 6), 36, groups=3, pre=1, pre_activation=RELU6),
    layer("scaled input of a strided 1x1", (2, 40, 7, 5), 24, stride=2, pre=1, pre_activation=RELU),
    layer("scaled input of a strided 1x1, large weights", (2, 512, 7, 5), 224, stride=2, pre=1,
          pre_activation=RELU),
    winograd("scaled input", (2, 35, 9, 14), 20, 2, pre=1, pre_activation=RELU),
    winograd("scaled input, no padding", (1, 20, 18, 17), 33, 4, padding=0, pre=1),
    winograd("scaled input in two phases", (2, 350, 6, 5), 300, 2, pre=1, pre_activation=RELU6),
    layer("scaled input of grouped rows", (2, 64, 9, 7), 64, 3, padding=1, groups=16, kind="grouped_conv2d",
          pre=1, pre_activation=RELU),
    layer("scaled input of grouped rows, twice as many out", (1, 32, 8, 16), 64, 3, padding=1, stride=2,
          groups=4, kind="grouped_conv2d", pre=1),
    layer("scaled planar input", (2, 3, 17, 15), 24, 3, stride=2, padding=1, pre=1, nchw_in=1),
    layer("scaled planar input of a 1x1", (2, 2, 7, 5), 24, stride=2, pre=1, nchw_in=1, pre_activation=RELU),
    layer("sigmoid on the input", (1, 20, 6, 6), 24, pre_activation=SIGMOID),
    layer("silu, gate, residual", (2, 40, 5, 7), 70, residual=True, gated=1, activation=SILU),
    layer("gelu_tanh of a linear layer", (3, 84, 1, 1), 45, kind="linear", activation=GELU_TANH),
    layer("hardswish of planes", (2, 3, 17, 15), 24, 3, stride=2, padding=1, nchw_in=1, activation=HARDSWISH),
    layer("gelu of a 3x3", (2, 17, 6, 5), 35, 3, padding=1, activation=GELU),
    winograd("silu", (2, 35, 9, 14), 20, 2, residual=True, activation=SILU),
    winograd("gelu", (1, 41, 11, 9), 70, 4, activation=GELU),
    winograd("hardsigmoid", (1, 32, 9, 20), 33, 0, kernel=(1, 7), padding=(0, 3), activation=HARDSIGMOID),
    layer("silu of grouped rows", (2, 64, 9, 7), 64, 3, padding=1, groups=16, kind="grouped_conv2d",
          activation=SILU, residual=True),
    *(
        layer(f"{name} of depthwise rows", (2, 150, 9, 7), 150, kernel, padding=kernel // 2, stride=stride,
              groups=150, kind="depthwise_conv2d", activation=number)
        for name, number, kernel, stride in (("silu", SILU, 3, 1), ("hardswish", HARDSWISH, 5, 2),
                                             ("gelu", GELU, 5, 1), ("sigmoid", SIGMOID, 3, 2))
    ),
    separable("silu between", (2, 34, 9, 7), 70, depth_activation=SILU, activation=HARDSWISH, residual=True),
    layer("everything at once", (2, 33, 6, 5), 70, 3, padding=(1, 0), stride=(1, 2), residual=True, gated=1,
          pre=1, pre_activation=RELU6, act_from=32, activation=RELU),
    separable("MobileNet", (2, 32, 11, 9), 70, depth_activation=RELU, activation=RELU),
    separable("relu6 twice, stride 2", (2, 24, 9, 8), 40, stride=2, depth_activation=RELU6, activation=RELU6),
    separable("Xception: relu in front, residual", (1, 37, 9, 9), 53, pre_activation=RELU, residual=True),
    separable("no bias at all", (1, 16, 6, 5), 33, bias=False),
    separable("one pixel, all padding", (2, 20, 1, 1), 16, depth_activation=RELU),
    separable("5x3, dilation 2, stride 1 by 2", (2, 19, 14, 12), 24, (5, 3), stride=(1, 2), padding=(4, 1),
              dilation=2),
    separable("padding wider than the window", (1, 8, 3, 4), 16, padding=4, depth_activation=RELU),
    separable("large image: several tasks of several parts", (1, 48, 40, 57), 64, depth_activation=RELU),
    separable("weights larger than the cache", (2, 420, 19, 18), 360, depth_activation=RELU, activation=RELU),
    separable("large weights on few pixels: two phases", (1, 420, 7, 6), 360, pre_activation=RELU,
              residual=True),
    separable("two phases over several images, stride 2", (3, 420, 5, 4), 360, stride=2,
              depth_activation=RELU6),
    separable("sigmoid", (1, 24, 6, 7), 40, activation=SIGMOID),
    # Geometry of the networks that Winograd and the grouped rows decline.
    layer("1x7", (2, 24, 9, 8), 40, (1, 7), padding=(0, 3), activation=RELU),
    layer("7x1", (2, 24, 9, 8), 40, (7, 1), padding=(3, 0), activation=RELU),
    layer("1x3", (1, 48, 5, 8), 33, (1, 3), padding=(0, 1), activation=RELU),
    layer("3x1", (1, 48, 8, 5), 33, (3, 1), padding=(1, 0), activation=RELU),
    layer("7x1 on fewer rows than taps", (1, 16, 2, 5), 33, (7, 1), padding=(3, 0)),
    layer("11x11 of stride 4", (1, 3, 35, 39), 64, 11, stride=4, padding=2, activation=RELU, nchw_in=1),
    layer("5x5 in two groups", (2, 32, 7, 9), 64, 5, padding=2, groups=2, activation=RELU),
    layer("groups of 14", (1, 56, 7, 7), 56, 3, padding=1, groups=4, activation=RELU),
    layer("groups of 24, stride 2", (2, 96, 7, 7), 96, 3, stride=2, padding=1, groups=4, activation=RELU),
    layer("groups of 40", (1, 120, 6, 5), 120, 3, padding=1, groups=3),
    layer("groups of 48", (1, 96, 6, 5), 96, 3, padding=1, groups=2),
    layer("groups of 64", (1, 128, 5, 6), 128, 3, padding=1, groups=2, activation=RELU),
    layer("groups of 96, stride 2", (1, 192, 5, 6), 192, 3, stride=2, padding=1, groups=2),
    layer("groups of 192", (1, 384, 5, 6), 384, 3, padding=1, groups=2),
    layer("grey planar image", (2, 1, 12, 11), 6, 5, padding=2, activation=TANH, nchw_in=1),
    layer("grey planar image without padding", (1, 1, 12, 11), 6, 5, nchw_in=1),
    *(
        layer(f"planes to {k} channels", (2, 2, 9, 39), k, 3, padding=1, activation=RELU, nchw_in=1)
        for k in range(1, 9)
    ),
    layer("planes to more taps than a block", (1, 6, 9, 11), 6, 5, padding=2, nchw_in=1),
    layer("gated planes", (2, 2, 9, 18), 6, 3, padding=1, gated=1, nchw_in=1),
    layer("planes with more border behind", (2, 1, 6, 7), 6, 3, nchw_in=1, pad_bottom=2, pad_right=1),
    layer("image smaller than the kernel", (2, 16, 2, 1), 20, 5, padding=2),
    layer("kernel as large as the padded image", (1, 16, 3, 4), 20, (5, 6), padding=1),
    layer("3x3 of stride 2 without padding", (1, 32, 11, 9), 40, 3, stride=2, activation=RELU),
    # TensorFlow's "same" pads behind the image what it cannot halve.
    *(
        one
        for bottom, right in ((1, 1), (0, 2), (3, 0))
        for one in uneven(pad_bottom=bottom, pad_right=right)
    ),
    layer("more border than a planar image", (1, 3, 4, 5), 24, 3, stride=2, nchw_in=1, pad_bottom=5,
          pad_right=4),
    layer("a border behind a 1x1 alone", (2, 24, 5, 6), 40, pad_bottom=1, pad_right=0),
    layer("everything at once behind an uneven border", (2, 33, 6, 5), 70, 3, padding=(1, 0), stride=(1, 2),
          residual=True, gated=1, pre=1, pre_activation=RELU6, act_from=32, activation=RELU, pad_bottom=0,
          pad_right=2),
    layer("grouped rows without padding", (2, 32, 7, 6), 32, 3, groups=4, kind="grouped_conv2d"),
    layer("grouped rows padded above and to the right", (1, 64, 8, 9), 64, 3, padding=(1, 0), stride=2,
          groups=4, kind="grouped_conv2d", pad_bottom=0, pad_right=1),
]  # fmt: skip


def by_why(one: Layer) -> str:
    return one.why


def check_exact(one: Layer) -> None:
    """Integers, also from and into slices of wider maps."""
    tensors = one.inputs()
    expected = one.exact(tensors).float()
    assert_equal(one.run(tensors), expected)
    assert_equal(one.run(tensors, wide=True), expected, "slices of wider maps")


def check_same_bits(one: Layer) -> None:
    """They depend on neither threads nor strides nor the batch around an image."""
    tensors = one.inputs("reals")
    first = one.run(tensors)
    assert_bit_equal(one.run(tensors, count=3), first, "3 threads")
    assert_bit_equal(one.run(tensors, count=2, wide=True), first, "slices of wider maps")
    batched = ("x", "gate", "residual")
    many = {
        name: t.repeat(3, *(1 for _ in t.shape[1:])) if name in batched else t for name, t in tensors.items()
    }
    assert_bit_equal(one.run(many, count=2), first.repeat(3, 1, 1, 1), "a batch three times as large")
    for image in range(one.x[0]):
        alone = {name: t[image : image + 1] if name in batched else t for name, t in tensors.items()}
        assert_bit_equal(one.run(alone), first[image : image + 1], f"image {image} alone")


def detail(one: Layer, params: dict) -> str:
    module = _ext.native()
    tensors = one.inputs()
    y = torch.zeros(one.exact(tensors).numel() + 16)
    weight = torch.zeros(module.packed_floats(one.kind, params))
    places = {name: (-1, t.data_ptr()) for name, t in tensors.items()}
    places |= {"weight": (-1, weight.data_ptr()), "y": (-1, y.data_ptr())}
    plan = module.Plan()
    plan.add(one.kind, params, places, deps=[], name=one.why)
    plan.finish()
    (step,) = plan.profile(0, [], repeats=1, threads=1)
    return step["detail"]

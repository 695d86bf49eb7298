"""One table of awkward cases for all ops: tests, instruction-set runs and property tests walk over it.

A case has an op, a name that says why it exists, and makes its own inputs. As a program,

    python tests/kernel_cases.py OUT.pt

runs every case on every candidate that accepts it, under NaN poison, checks integer data against float64, and
saves the results of real data. The tests start it once per instruction set.
"""

import sys
from dataclasses import dataclass, field

import torch
from helpers import (
    LAYOUTS,
    assert_equal,
    integers,
    layout_name,
    poisoned,
    public,
    reals,
    reference,
    refusal,
    threads,
)
from torch import Tensor

from fast_backbones import kernels


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call; tensors may be converted all at once."""

    args: tuple
    kwargs: dict

    def map(self, f) -> "Inputs":
        args = tuple(f(a) if isinstance(a, Tensor) else a for a in self.args)
        return Inputs(args, {k: f(v) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()})

    def double(self) -> "Inputs":
        return self.map(Tensor.double)

    def to_layout(self, layout: torch.memory_format) -> "Inputs":
        return self.map(lambda t: t.to(memory_format=layout) if t.dim() == 4 else t)

    def sample(self, index: slice) -> "Inputs":
        """The same call on part of the batch: the first argument and the residual are cut."""
        kwargs = {k: v[index] if k == "residual" and v is not None else v for k, v in self.kwargs.items()}
        return Inputs((self.args[0][index], *self.args[1:]), kwargs)


@dataclass(frozen=True)
class Case:
    op: str
    why: str
    x: tuple[int, ...]
    weight: tuple[int, ...] | None = None
    options: dict = field(default_factory=dict)
    bias: bool = False
    residual: bool = False
    positional: tuple = ()

    @property
    def id(self) -> str:
        return f"{self.op}: {self.why}"

    def inputs(self, data: str = "integers", seed: int = 0) -> Inputs:
        """`data`: integers (exact), reals (normal) or positive."""

        def make(shape, offset, limit=4, multiple=1):
            if data == "integers":
                return integers(shape, 10 * seed + offset, limit=limit, multiple=multiple)
            return reals(shape, 10 * seed + offset, positive=data == "positive")

        x = make(self.x, 0)
        if self.weight is None:
            return Inputs((x, *self.positional), dict(self.options))
        weight = make(self.weight, 1, limit=2, multiple=4)
        if data != "integers":
            weight = weight / (weight[0].numel() ** 0.5)
        bias = make(self.weight[:1], 2, limit=64) if self.bias else None
        options = dict(self.options)
        if self.residual:
            shape = self.reference(Inputs((x, weight), options)).shape
            options["residual"] = make(shape, 3, limit=64)
        return Inputs((x, weight, bias), options)

    def run(self, inputs: Inputs, backend: str | None = None) -> Tensor:
        return public(self.op)(*inputs.args, **inputs.kwargs, backend=backend)

    def reference(self, inputs: Inputs) -> Tensor:
        return reference(self.op)(*inputs.args, **inputs.kwargs)

    def exact(self, inputs: Inputs) -> Tensor:
        return self.reference(inputs.double())

    def accepted_by(self, backend: str) -> bool:
        return refusal(self.op, backend, *self.inputs().args, **self.inputs().kwargs) is None


@dataclass(frozen=True)
class SeparableCase(Case):
    """Its weights are a filter per channel and a 1x1 convolution to `filters` channels."""

    filters: int = 0
    kernel: int | tuple[int, int] = 3

    def inputs(self, data: str = "integers", seed: int = 0) -> Inputs:
        c = self.x[1]
        shapes = [self.x, (c, 1, *_pair(self.kernel)), (self.filters, c, 1, 1), (c,), (self.filters,)]
        if data == "integers":
            tensors = [integers(shape, 10 * seed + i, limit=2) for i, shape in enumerate(shapes)]
        else:
            positive = data == "positive"
            tensors = [reals(shape, 10 * seed + i, positive=positive) for i, shape in enumerate(shapes)]
            for weight in tensors[1:3]:
                weight /= weight[0].numel() ** 0.5
        biases = tensors[3:] if self.bias else [None, None]
        return Inputs((*tensors[:3], *biases), dict(self.options))


@dataclass(frozen=True)
class SqueezeCase(Case):
    """Its weights are two layers over the means of channels, with `hidden` values between them.

    On integers means are whole numbers, and the sigmoid sees multiples of 256: gates are 0, 1/2 or 1.
    """

    hidden: int = 1

    def inputs(self, data: str = "integers", seed: int = 0) -> Inputs:
        _, c, h, w = self.x
        shapes = [self.x, (self.hidden, c), (self.hidden,), (c, self.hidden, 1, 1), (c,)]
        if data == "integers":
            multiples = (h * w, 1, 1, 256, 256)
            tensors = [
                integers(s, 10 * seed + i, limit=1, multiple=multiples[i]) for i, s in enumerate(shapes)
            ]
        else:
            positive = data == "positive"
            tensors = [reals(shape, 10 * seed + i, positive=positive) for i, shape in enumerate(shapes)]
            for weight in (tensors[1], tensors[3]):
                weight /= weight[0].numel() ** 0.5
        biases = (tensors[2], tensors[4]) if self.bias else (None, None)
        return Inputs((tensors[0], tensors[1], biases[0], tensors[3], biases[1]), {})


@dataclass(frozen=True)
class UnitCase(Case):
    """Pixels of integers whose length is an integer: with S the sum of squares of all channels but the last,
    and S odd, (S - 1) / 2 as the last one makes it (S + 1) / 2."""

    def inputs(self, data: str = "integers", seed: int = 0) -> Inputs:
        inputs = super().inputs(data, seed)
        (x,) = inputs.args
        if data == "integers" and x.shape[1] > 1:
            x[:, 0] = 0
            x[:, 0] = 1 - x[:, :-1].square().sum(1) % 2
            x[:, -1] = (x[:, :-1].square().sum(1) - 1) / 2
        return inputs


@dataclass(frozen=True)
class DistancesCase(Case):
    """The weights are centres."""

    def inputs(self, data: str = "integers", seed: int = 0) -> Inputs:
        inputs = super().inputs(data, seed)
        return Inputs(inputs.args[:2], {})


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def conv(
    why, n, c, h, w, k, kernel=3, *, groups=1, bias=True, residual=False, relu=True, op="conv2d", **options
) -> Case:
    if relu:
        options["activation"] = "relu"
    if groups != 1 or op == "grouped_conv2d":
        options["groups"] = groups
    return Case(op, why, (n, c, h, w), (k, c // groups, *_pair(kernel)), options, bias, residual)


def pointwise(why, n, c, h, w, k, **options) -> Case:
    return conv(why, n, c, h, w, k, 1, op="pointwise_conv2d", **options)


def grouped(why, n, c, h, w, k, groups, kernel=3, **options) -> Case:
    return conv(why, n, c, h, w, k, kernel, groups=groups, op="grouped_conv2d", **options)


def stem(why, n, c, h, w, k, kernel=7, **options) -> Case:
    return conv(why, n, c, h, w, k, kernel, op="stem_conv2d", **options)


def pool(why, x, kernel_size, **options) -> Case:
    return Case("max_pool2d", why, x, options=options, positional=(kernel_size,))


def mean_pool(why, x, kernel_size, **options) -> Case:
    return Case("avg_pool2d", why, x, options=options, positional=(kernel_size,))


def depthwise(why, n, c, h, w, kernel=3, *, bias=True, activation="relu", **options) -> Case:
    options["activation"] = activation
    return Case("depthwise_conv2d", why, (n, c, h, w), (c, 1, *_pair(kernel)), options, bias)


def response_norm(why, x, size, *, k=1.0) -> Case:
    """With beta 1 and alpha = size nothing but the division rounds."""
    return Case("local_response_norm", why, x, options={"alpha": size, "beta": 1, "k": k}, positional=(size,))


def unit(why, *x, **options) -> Case:
    return UnitCase("l2_normalize", why, x, options=options)


def distances(why, n, c, k) -> Case:
    return DistancesCase("squared_distances", why, (n, c), (k, c))


def squeeze(why, n, c, h, w, hidden, *, bias=True) -> Case:
    return SqueezeCase("squeeze_excite", why, (n, c, h, w), bias=bias, hidden=hidden)


def separable(why, n, c, h, w, k, kernel=3, *, bias=True, activations=("relu", "relu"), **options) -> Case:
    options |= {"depth_activation": activations[0], "activation": activations[1]}
    x = (n, c, h, w)
    return SeparableCase("separable_conv2d", why, x, None, options, bias, filters=k, kernel=kernel)


def average(why, *x) -> Case:
    return Case("global_avg_pool", why, x)


def linear(why, n, c, k, *, bias=True, relu=False) -> Case:
    return Case("linear", why, (n, c), (k, c), {"activation": "relu"} if relu else {}, bias)


CASES = [
    conv("one pixel, all padding", 1, 1, 1, 1, 1, padding=1),
    conv("empty batch", 0, 16, 6, 6, 8, padding=1),
    conv("odd channels, odd image: every tail", 2, 17, 13, 9, 19, padding=1),
    conv("prime channels without padding", 1, 13, 7, 11, 31),
    conv("one output channel", 2, 24, 6, 5, 1, padding=1, bias=False, relu=False),
    conv("one input channel", 1, 1, 12, 10, 33, padding=1),
    conv("a full panel and one more channel", 1, 32, 8, 8, 33, padding=1, residual=True),
    conv("residual without activation", 2, 16, 7, 7, 32, padding=1, residual=True, relu=False),
    conv("no bias, residual, ReLU", 1, 32, 6, 6, 48, padding=1, bias=False, residual=True),
    conv("output smaller than a Winograd tile", 3, 16, 3, 3, 16),
    conv("2x2 image: one tile, mostly padding", 2, 32, 2, 2, 32, padding=1),
    conv("padding wider than the kernel reaches", 1, 16, 4, 5, 16, padding=3),
    conv("different padding in height and width", 1, 18, 6, 9, 20, padding=(0, 2)),
    conv("sum longer than one block of 512", 1, 130, 5, 5, 37, padding=1),
    conv("many channels on few pixels: two-phase Winograd", 1, 256, 7, 7, 64, padding=1, residual=True),
    conv("large enough for several fused tasks", 1, 64, 57, 55, 64, padding=1),
    conv("batch of three odd images", 3, 48, 11, 9, 40, padding=1, residual=True),
    conv("stride 2", 2, 32, 11, 13, 24, stride=2, padding=1),
    conv("stride larger than the kernel", 1, 8, 17, 19, 12, 2, stride=(4, 5)),
    conv("dilation 2 and 3", 1, 12, 15, 16, 20, dilation=(2, 3), padding=2),
    conv("non-square kernel", 2, 10, 9, 12, 14, (1, 7), padding=(0, 3)),
    conv("tall kernel", 1, 10, 12, 6, 14, (7, 1), padding=(3, 0), stride=(2, 1)),
    conv("5x5", 1, 20, 10, 10, 30, 5, padding=2),
    conv("even kernel", 1, 9, 8, 8, 11, 4, stride=2, padding=1),
    conv("kernel as large as the image", 2, 21, 5, 6, 10, (5, 6)),
    conv("1x1 inside the general op", 2, 40, 5, 7, 24, 1, residual=True),
    conv("1x1 with padding", 1, 8, 3, 3, 9, 1, padding=1),
    conv("depthwise", 1, 12, 9, 9, 12, groups=12, padding=1),
    conv("groups that widen", 1, 12, 7, 7, 30, groups=3, padding=1, residual=True),
    conv("ResNeXt group inside the general op", 1, 64, 9, 9, 64, groups=16, padding=1),
    conv("AlexNet's 5x5, by Winograd", 1, 64, 11, 13, 40, 5, padding=2),
    conv("5x5 by Winograd without padding, residual", 2, 33, 9, 6, 20, 5, residual=True),
    conv("fused Winograd tasks over several images", 3, 32, 30, 29, 40, padding=1, residual=True),
    conv("two-phase Winograd over several images", 2, 128, 14, 13, 136, padding=1, residual=True),
    conv(
        "stride 2 with weights larger than the cache", 2, 128, 15, 14, 130, stride=2, padding=1, residual=True
    ),
    conv("one panel of large weights, several images", 2, 350, 5, 6, 32, stride=2, padding=1),
    conv("stride 2 with groups over several images", 2, 24, 9, 10, 36, groups=3, stride=2, padding=1),
    conv("large image, several blocks of rows", 2, 16, 40, 61, 24, 5, padding=2, stride=(1, 2)),
    *(
        conv(f"planes to {k} channels", 2, 3, 9, 37, k, padding=1, residual=k % 2 == 0, bias=k != 3)
        for k in range(1, 9)
    ),
    conv("planes to few channels, several blocks of rows", 2, 5, 90, 70, 8, 5, padding=2),
    conv("planes, rows of stride 2, dilation", 2, 2, 21, 19, 6, (3, 5), stride=(2, 1), dilation=2, padding=3),
    conv("LeNet-5's first layer", 1, 1, 32, 32, 6, 5),
    conv("one image row", 1, 16, 1, 40, 16, padding=1),
    conv("one image column", 1, 16, 40, 1, 16, padding=1),
    pointwise("one pixel, one channel", 1, 1, 1, 1, 1),
    pointwise("empty batch", 0, 8, 4, 4, 8),
    pointwise("prime sizes everywhere", 2, 37, 5, 7, 53, residual=True),
    pointwise("one output channel", 1, 64, 6, 6, 1, relu=False),
    pointwise("one input channel", 1, 1, 9, 9, 70),
    pointwise("fewer pixels than a tile is tall", 1, 128, 1, 3, 96, bias=False),
    pointwise("sum longer than four blocks", 1, 2053, 2, 2, 33),
    pointwise("stride 2 on an odd image", 2, 24, 9, 7, 40, stride=2),
    pointwise("stride 3 by 2, residual", 1, 24, 10, 9, 40, stride=(3, 2), residual=True),
    pointwise("stride 2, large weights, few pixels, several images", 3, 320, 5, 4, 328, stride=2),
    pointwise("stride 2, one panel of large weights, several images", 3, 3100, 4, 3, 32, stride=2),
    pointwise("stride 2, large weights, several panels a task", 2, 512, 14, 15, 456, stride=2, residual=True),
    pointwise("ResNet expansion", 1, 64, 28, 28, 256, residual=True),
    pointwise("wide and long: several tasks of several panels", 2, 512, 14, 14, 320),
    grouped("4 channels a group", 1, 128, 14, 14, 128, 32),
    grouped("8 channels a group, stride 2, odd image", 2, 64, 13, 11, 64, 8, stride=2),
    grouped("16 channels a group", 1, 64, 7, 7, 64, 4, residual=True),
    grouped("32 channels a group, stride 2", 1, 64, 8, 6, 64, 2, stride=2, bias=False),
    grouped("one pixel, all padding", 1, 16, 1, 1, 16, 4),
    grouped("one column", 2, 32, 6, 1, 32, 8),
    grouped("two columns, stride 2", 1, 32, 5, 2, 32, 4, stride=2),
    grouped("sixteen channels: the narrowest", 1, 16, 5, 9, 16, 2, relu=False),
    grouped("empty batch", 0, 32, 4, 4, 32, 8),
    grouped("channels that fill no vector: direct only", 1, 12, 6, 7, 12, 3),
    grouped("2 to 4 channels a group", 1, 32, 14, 15, 64, 16),
    grouped("4 to 8 channels a group, stride 2, odd image", 2, 64, 13, 11, 128, 16, stride=2, residual=True),
    grouped("8 to 16 channels a group", 1, 64, 7, 7, 128, 8),
    grouped("16 to 32 channels a group, stride 2", 1, 64, 8, 6, 128, 4, stride=2, bias=False),
    grouped("16 to 32 channels: the narrowest, one column", 1, 16, 5, 1, 32, 1),
    grouped("widening groups by half: direct only", 1, 32, 6, 6, 48, 8),
    grouped("1x1 groups: direct only", 1, 24, 6, 6, 24, 4, 1, padding=0),
    grouped(
        "strided 1x1 groups over several images: direct only", 2, 24, 7, 6, 24, 4, 1, padding=0, stride=2
    ),
    grouped("many channels, several images, stride 2", 2, 256, 15, 14, 256, 32, stride=2, residual=True),
    grouped("wide image: several tasks", 1, 64, 30, 58, 64, 16),
    stem("ResNet stem on a small odd image", 1, 3, 33, 31, 64),
    stem("two images, several blocks of rows", 2, 3, 70, 66, 40),
    stem("one channel, image smaller than the kernel", 2, 1, 4, 5, 17),
    stem("four channels", 1, 4, 20, 20, 32),
    stem("five channels: too many to read planar", 1, 5, 20, 20, 32),
    stem("3x3 stem", 1, 3, 17, 17, 24, 3, padding=1),
    stem("patches", 1, 3, 16, 16, 48, 4, stride=4, padding=0),
    stem("empty batch", 0, 3, 16, 16, 8),
    separable("MobileNet on an odd image", 2, 24, 9, 11, 40),
    separable("Xception: no activation, no bias", 1, 37, 7, 8, 53, bias=False, activations=("none", "none")),
    separable("relu6, stride 2", 2, 16, 8, 9, 33, stride=2, activations=("relu6", "relu6")),
    separable("empty batch", 0, 8, 4, 4, 8),
    separable("one pixel, one channel", 1, 1, 1, 1, 1),
    separable("5x3, dilation 2", 1, 12, 12, 9, 20, (5, 3), dilation=2, padding=(4, 1)),
    separable("no padding", 1, 20, 6, 5, 16, padding=0, activations=("relu", "none")),
    separable("large weights on few pixels: two phases", 2, 420, 5, 4, 360),
    pool("ResNet pool on an odd image", (2, 67, 13, 11), 3, stride=2, padding=1),
    pool("one pixel, all padding", (1, 1, 1, 1), 3, stride=2, padding=1),
    pool("empty batch", (0, 8, 4, 4), 2),
    pool("ceil mode with a partial window", (1, 16, 8, 7), 3, stride=2, ceil_mode=True),
    pool("ceil mode, last window outside", (1, 5, 5, 8), 2, stride=3, padding=1, ceil_mode=True),
    pool("stride larger than the window", (1, 33, 11, 9), 2, stride=(3, 4)),
    pool("overlapping, non-square", (2, 20, 7, 9), (1, 3), stride=1, padding=(0, 1)),
    pool("the largest window", (1, 17, 9, 9), 8, stride=1, padding=4),
    pool("ceil mode, image smaller than the window", (1, 18, 2, 1), 3, stride=3, ceil_mode=True),
    mean_pool("Inception's, beside its convolutions", (1, 35, 9, 11), 3, stride=1, padding=1),
    mean_pool(
        "without padding in the divisor", (2, 17, 7, 5), 3, stride=1, padding=1, count_include_pad=False
    ),
    mean_pool("DenseNet's on an odd image", (1, 64, 9, 7), 2, stride=2),
    mean_pool("empty batch", (0, 8, 4, 4), 2),
    mean_pool("one pixel, all padding", (1, 1, 1, 1), 3, stride=2, padding=1),
    mean_pool(
        "ceil mode, last windows leave the image", (1, 20, 8, 7), 3, stride=2, padding=1, ceil_mode=True
    ),
    mean_pool(
        "ceil mode without padding in the divisor",
        (2, 16, 8, 6),
        (4, 3),
        stride=3,
        padding=(2, 1),
        ceil_mode=True,
        count_include_pad=False,
    ),
    mean_pool("ceil mode, image smaller than the window", (1, 18, 2, 1), 3, stride=3, ceil_mode=True),
    mean_pool("the whole image, many channels", (2, 200, 8, 8), 8),
    mean_pool("window longer than a chain of 8", (1, 33, 13, 24), (11, 19), stride=(2, 3), padding=(5, 9)),
    depthwise("odd channels, odd image: every tail", 2, 17, 13, 9, padding=1),
    depthwise("stride 2, relu6", 2, 35, 9, 16, stride=2, padding=1, activation="relu6"),
    depthwise("empty batch", 0, 8, 4, 4),
    depthwise("one pixel, all padding", 1, 3, 1, 1, padding=1, activation="none"),
    depthwise("rows of one and two outputs", 1, 20, 6, 2, padding=1, bias=False),
    depthwise("no padding, several channel blocks", 1, 150, 6, 17),
    depthwise("7x7, dilation 2", 1, 16, 9, 20, 7, dilation=2, padding=6),
    depthwise("5x3, stride 3 by 1", 2, 24, 12, 16, (5, 3), stride=(3, 1), padding=(2, 1)),
    depthwise("padding wider than the kernel reaches", 1, 8, 3, 4, padding=4),
    depthwise("large enough for several tasks", 1, 64, 40, 61, padding=1),
    depthwise("5x5: whole tiles, an overlapping one, both borders", 2, 20, 9, 17, 5, padding=2),
    depthwise("5x5, stride 2, relu6", 1, 35, 12, 19, 5, stride=2, padding=2, activation="relu6"),
    depthwise("5x5 without padding, rows of four outputs", 1, 9, 7, 8, 5, activation="none"),
    depthwise("5x5, one column", 1, 12, 6, 1, 5, padding=2),
    depthwise("7x7, an image smaller than the window", 2, 24, 5, 4, 7, padding=3),
    depthwise("7x7, stride 2", 1, 19, 16, 31, 7, stride=2, padding=3, activation="none"),
    depthwise("7x7, several channel blocks", 1, 150, 8, 14, 7, padding=3),
    depthwise("3x5 and 5x3 count as what their columns are", 1, 17, 10, 16, (3, 5), padding=(1, 2)),
    depthwise("7 columns, 2 rows, stride 1 by 2", 1, 17, 10, 16, (2, 7), stride=(1, 2), padding=(0, 3)),
    response_norm("AlexNet's window", (2, 37, 3, 5), 5, k=2.0),
    response_norm("even window", (1, 16, 4, 3), 4),
    response_norm("window wider than the channels", (1, 3, 5, 2), 9),
    response_norm("one channel alone", (1, 1, 1, 1), 1),
    response_norm("empty batch", (0, 8, 3, 3), 3),
    response_norm("more pixels than a task", (1, 96, 15, 14), 5),
    unit("embeddings", 3, 512),
    unit("prime channels", 7, 37),
    unit("a sign", 4, 1),
    unit("empty batch", 0, 8),
    unit("pixels of a map", 2, 19, 3, 5),
    unit("more pixels than a task", 1, 96, 15, 14),
    unit("lengths below eps", 2, 5, 3, 4, eps=64.0),
    distances("LeNet-5's", 3, 84, 10),
    distances("one by one", 1, 1, 1),
    distances("empty batch", 0, 8, 4),
    distances("prime sizes, several tasks of rows", 67, 131, 7),
    distances("several tasks of centres", 2, 700, 61),
    squeeze("SE-ResNet's", 2, 64, 5, 7, 4),
    squeeze("odd sizes, no biases", 3, 19, 3, 2, 5, bias=False),
    squeeze("one pixel, one channel", 1, 1, 1, 1, 1),
    squeeze("empty batch", 0, 8, 4, 4, 2),
    squeeze("several tasks of gates", 2, 130, 18, 17, 8),
    average("one pixel", 1, 1, 1, 1),
    average("empty batch", 0, 8, 3, 3),
    average("49 pixels, odd channels", 3, 67, 7, 7),
    average("more pixels than a block of 512", 1, 19, 37, 29),
    average("many channels: several tasks", 2, 1030, 5, 3),
    linear("one by one", 1, 1, 1),
    linear("empty batch", 0, 8, 4),
    linear("classifier", 3, 2048, 1000),
    linear("prime sizes", 7, 131, 37, relu=True),
    linear("one output", 5, 64, 1, bias=False),
    linear("batch taller than a tile", 33, 48, 65),
]


# Ops of layers, which CASES covers one and all; those of training have tests of their own.
OPS = sorted(set(kernels.ops()) - {"batch_norm", "batch_norm_conv2d", "softmax_cross_entropy"})


def cases(op: str | None = None) -> list[Case]:
    return [case for case in CASES if op is None or case.op == op]


def native_candidates(op: str) -> list[str]:
    return [c.name for c in kernels.ops()[op].candidates if c.family == "native"]


# The compiled kernel behind each candidate of the convolutions.
KINDS = {
    "winograd": "winograd_conv2d",
    "grouped": "grouped_conv2d",
    "rows": "grouped_conv2d",
    "direct": "conv2d",
}


def prepared(case: Case) -> tuple:
    """The integer inputs of a case as its candidates receive them."""
    inputs = case.inputs()
    return kernels.ops()[case.op].prepare(*inputs.args, **inputs.kwargs)


POOLS = ("max_pool2d", "avg_pool2d")
NORMS = ("local_response_norm", "l2_normalize")


def has_parameters(case: Case) -> bool:
    """Whether `parameters` knows the op."""
    return len(case.x) == 4 and (case.weight is not None or case.op in (*POOLS, *NORMS))


def operands(case: Case, args: tuple) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias and residual of prepared arguments."""
    if case.weight is None:
        return None, None, None
    return (args[1], args[2], None) if case.op == "depthwise_conv2d" else args[1:4]


def parameters(case: Case, args: tuple) -> dict:
    """What the torch-free interface calls the sizes of prepared arguments."""
    x = args[0]
    params = {"n": x.shape[0], "c": x.shape[1], "h": x.shape[2], "w": x.shape[3], "k": x.shape[1]}
    if case.op == "local_response_norm":
        return params | dict(zip(("size", "alpha", "beta", "offset"), args[1:]))
    if case.op == "l2_normalize":
        return params | {"eps": args[1]}
    if case.op in POOLS:
        _, kernel, stride, padding, ceil_mode, *count_include_pad = args
        pairs = {"stride": stride, "pad": padding}
        params |= {"r": kernel[0], "s": kernel[1], "ceil_mode": int(ceil_mode)}
        if count_include_pad:
            params["count_include_pad"] = int(count_include_pad[0])
    else:
        weight = args[1]
        if case.op == "depthwise_conv2d":
            stride, padding, dilation, activation = args[3:]
            groups = x.shape[1]
        else:
            stride, padding, dilation, groups, activation = args[4:]
        pairs = {"stride": stride, "pad": padding, "dilation": dilation}
        params |= {"k": weight.shape[0], "r": weight.shape[2], "s": weight.shape[3], "groups": groups}
        params["activation"] = ("none", "relu", "relu6").index(activation)
    for name, pair in pairs.items():
        params |= {f"{name}_h": pair[0], f"{name}_w": pair[1]}
    return params


def main(path: str) -> None:
    results = {}
    with poisoned(), torch.inference_mode(), threads(1):
        for case in CASES:
            for backend in native_candidates(case.op):
                if not case.accepted_by(backend):
                    continue
                whole = case.inputs("integers")
                expected = case.exact(whole).float()
                for layout in LAYOUTS:
                    label = f"{case.id}, {backend}, {layout_name(layout)}"
                    assert_equal(case.run(whole.to_layout(layout), backend), expected, label)
                    results[label] = case.run(case.inputs("reals").to_layout(layout), backend)
    torch.save({"isa": kernels.build_info()["isa"], "results": results}, path)


if __name__ == "__main__":
    main(sys.argv[1])

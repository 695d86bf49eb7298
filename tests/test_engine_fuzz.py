"""Networks drawn at random from the pieces that rewrites know, run by a plan and by their modules.

Weights are whole numbers and small powers of two, so that float32 is exact and one wrong index, a lost bias
or a stale byte shows: plans must equal the modules in float64 to the bit, in eager's strides, whatever NaN
the memory held before. A seed that fails is worth a network of its own in test_engine_rewrites.py.
"""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, generator, integers, needs_native, poisoned
from helpers import one_thread as one_thread
from torch import nn

from fast_backbones import engine

pytestmark = needs_native
LARGEST = 2.0**20
PIECES = {}


def abs_in_place(x):
    y = x * 1
    y.abs_()
    return y.sub_(1).relu_()


ACTIVATIONS = [torch.relu, F.relu6, F.hardtanh, abs_in_place]


def piece(weight):
    """Register a method of Net that adds some steps to the network; it is drawn `weight` times as often."""

    def register(function):
        PIECES[function] = weight
        return function

    return register


class Net(nn.Module):
    """A program: step i computes value i + 1 from earlier values, value 0 is the image.

    It is drawn while it runs on an example in float64, so that every piece sees the sizes it gets.
    """

    def __init__(self, seed, x):
        super().__init__()
        self.dice, self.draw = random.Random(seed), generator(seed)
        self.steps, self.layers = [], nn.ModuleList()
        values = [x.double()]
        self.shapes = [tuple(x.shape)]
        while len(self.steps) < 12:
            (add_piece,) = self.dice.choices(list(PIECES), PIECES.values())
            known = len(self.steps)
            add_piece(self, self.pick())
            values = self.double().run(x.double())
            if len(self.steps) > known and not all(exact(value) for value in values):
                del self.steps[known:], self.shapes[known + 1 :]
        read = {i for _, inputs in self.steps for i in inputs}
        self.returned = [i for i in range(1, len(values)) if i not in read or self.dice.random() < 0.2]
        self.float().eval()

    def run(self, x):
        values = [x]
        for call, inputs in self.steps:
            values.append(call(*(values[i] for i in inputs)))
        return values

    def forward(self, x):
        values = self.run(x)
        return [values[i] for i in self.returned]

    def add(self, call, *inputs):
        """A step; the number of its value."""
        self.steps.append((call, inputs))
        call = copy.deepcopy(call).double() if isinstance(call, nn.Module) else call
        example = call(*(torch.zeros(self.shapes[i], dtype=torch.float64) for i in inputs))
        self.shapes.append(tuple(example.shape))
        return len(self.steps)

    def layer(self, module, *inputs):
        self.layers.append(module.eval())
        return self.add(module, *inputs)

    def maps(self, fits=lambda shape: True):
        return [i for i, shape in enumerate(self.shapes) if len(shape) == 4 and fits(shape)]

    def pick(self, **conditions):
        return self.dice.choice(self.maps(**conditions)[-4:])

    def like(self, x):
        return self.dice.choice(self.maps(lambda shape: shape == self.shapes[x]))

    # ---- layers with exact numbers ----

    def conv(self, x, planes, window, **options):
        layer = nn.Conv2d(self.shapes[x][1], planes, window, bias=self.dice.random() < 0.5, **options)
        with torch.no_grad():
            few = torch.rand(layer.weight.shape, generator=self.draw) < 4 / layer.weight[0].numel()
            layer.weight.copy_(self.whole(*layer.weight.shape) * few)
            if layer.bias is not None:
                layer.bias.copy_(self.whole(planes))
        return self.layer(layer, x)

    def norm(self, x):
        layer = nn.BatchNorm2d(self.shapes[x][1], eps=0.0)
        with torch.no_grad():
            layer.running_mean.copy_(self.whole(layer.num_features))
            layer.running_var.copy_(4.0 ** self.whole(layer.num_features))
            layer.weight.copy_(self.whole(layer.num_features))
            layer.bias.copy_(self.whole(layer.num_features))
        return self.layer(layer, x)

    def whole(self, *shape):
        return torch.randint(-1, 2, shape, generator=self.draw).float()

    def act(self, x):
        return self.add(self.dice.choice(ACTIVATIONS), x)

    # ---- pieces ----

    @piece(6)
    def unit(self, x):
        high, wide = self.dice.choice([(1, 1), (1, 1), (3, 3), (3, 3), (1, 7), (5, 1), (2, 2)])
        padding = self.dice.choice([(high // 2, wide // 2), (0, 0), (2, 1)])
        height, width = self.shapes[x][2:]
        if height + 2 * padding[0] >= high and width + 2 * padding[1] >= wide:
            y = self.conv(x, self.dice.choice([1, 4, 32]), (high, wide), padding=padding,
                          stride=self.dice.choice([1, 1, 2]))  # fmt: skip
            y = self.norm(y) if self.dice.random() < 0.5 else y
            if self.dice.random() < 0.5:
                self.act(y)

    @piece(3)
    def preactivated(self, x):
        y = self.act(self.norm(x))
        for _ in range(self.dice.choice([1, 2])):
            self.conv(y, 8, self.dice.choice([1, 3]), padding=1)

    @piece(3)
    def separable(self, x):
        channels = self.shapes[x][1]
        y = self.conv(x, channels, 3, padding=1, groups=channels, stride=self.dice.choice([1, 2]))
        self.act(self.conv(self.norm(y) if self.dice.random() < 0.5 else y, 16, 1))

    @piece(4)
    def squeezed(self, x):
        y = self.conv(x, self.shapes[x][1], 1) if self.dice.random() < 0.7 else x
        mean = self.add(lambda y: F.avg_pool2d(y, y.shape[2:]), y)
        gate = self.add(lambda g: g.clamp(0, 1).round(), self.conv(mean, self.shapes[y][1], 1))
        gated = self.add(torch.mul, *self.dice.sample([y, gate], 2))
        self.act(self.add(torch.add, gated, self.like(gated)))

    @piece(4)
    def branches(self, x):
        """An Inception module: siblings, a pool in front of a 1x1, the map itself, the same branch twice."""
        act = self.dice.choice(ACTIVATIONS)
        ends = [self.add(act, self.conv(x, planes, 1)) for planes in (32, 8, 32)]
        ends.append(self.conv(self.add(lambda y: F.avg_pool2d(y, 3, 1, 1, divisor_override=8), x), 8, 1))
        ends.append(self.conv(ends[1], 8, 3, padding=1))
        chosen = [self.dice.choice([*ends, x]) for _ in range(self.dice.choice([2, 3, 4]))]
        self.add(concatenated, *chosen)
        if self.dice.random() < 0.5:
            self.add(concatenated, *chosen[:2])
        if self.dice.random() < 0.5:
            self.rows(self.dice.choice([*ends, len(self.steps)]))

    @piece(2)
    def dense(self, x):
        maps = [x]
        for _ in range(3):
            y = self.add(concatenated, *maps) if len(maps) > 1 else x
            maps.append(self.conv(self.act(self.norm(y)), 8, 3, padding=1))

    @piece(4)
    def sum(self, x):
        alpha = self.dice.choice([1, 1, 2, -1])
        self.add(lambda a, b: torch.add(a, b, alpha=alpha), *self.dice.sample([x, self.like(x)], 2))

    @piece(3)
    def pooled(self, x):
        pads, ceil = self.dice.choice([0, 1]), self.dice.random() < 0.5
        if min(self.shapes[x][2:]) > 1:
            if self.dice.random() < 0.5:
                self.add(lambda y: F.max_pool2d(y, 2 + pads, 2, pads, ceil_mode=ceil), x)
            else:
                self.add(lambda y: F.avg_pool2d(y, 2, 2, pads, ceil_mode=ceil, divisor_override=4), x)

    @piece(3)
    def padded(self, x):
        border = self.dice.choice([(1, 1, 1, 1), (0, 1, 0, 1), (2, 0, 1, 1), (0, 0, 0, 0), (-1, 1, 0, 0)])
        y = self.add(lambda y: F.pad(y, border), x)
        if min(self.shapes[y][2:]) > 2:
            self.conv(y, 8, 3)

    @piece(3)
    def rows(self, x):
        """Flattened into linear layers; the weights go with the map's size."""
        y = self.add(lambda y: y.flatten(1), x)
        layer = nn.Linear(self.shapes[y][1], 5)
        with torch.no_grad():
            layer.weight.copy_(self.whole(*layer.weight.shape))
            layer.bias.copy_(self.whole(5))
        self.act(self.layer(layer, y))

    @piece(3)
    def some_channels(self, x):
        first = self.dice.randrange(self.shapes[x][1])
        calls = [lambda y: y[:, first:], lambda y: y.chunk(2, 1)[-1], lambda y: y.flip(1)]
        self.add(self.dice.choice(calls), x)

    @piece(2)
    def scaled(self, x):
        calls = [lambda y: y * 2 - 1, lambda y: 3 - y, lambda y: y / 4, lambda y: -y, lambda y: y.clone()]
        calls += [lambda y: F.dropout(y, 0.5, False), lambda y: y.transpose(2, 3)]
        self.add(self.dice.choice(calls), x)


def concatenated(*maps):
    return torch.cat(maps, 1)


def exact(value):
    """Whether float32 holds the value, the sums around it too."""
    return bool((value.float().double() == value).all() and value.abs().max() < LARGEST)


def strides(tensor):
    """Of dimensions in which there is a second element."""
    return [step for step, size in zip(tensor.stride(), tensor.shape) if size > 1]


LAYOUTS = [
    lambda x: x,
    lambda x: x.to(memory_format=torch.channels_last),
    lambda x: F.pad(x, (0, 1))[..., :-1],
    lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
]
SIZES = [(1, 3, 8, 8), (2, 8, 5, 7), (3, 1, 9, 4), (2, 4, 1, 1), (1, 16, 17, 19), (2, 3, 1, 6)]


@pytest.mark.parametrize("seed", range(48))
def test_exact_on_integers(seed):
    x = LAYOUTS[seed % len(LAYOUTS)](integers(SIZES[seed % len(SIZES)], seed))
    model, keep = Net(seed, x), x.clone()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = model(x)
        exact = copy.deepcopy(model).double()(x.double())
        for _ in range(2):
            with poisoned():
                ours = engine.forward(model, x, model.forward)
            for got, eager, right in zip(ours, plain, exact, strict=True):
                assert_equal(got.double(), right)
                assert got.dtype == eager.dtype and strides(got) == strides(eager)
    assert torch.equal(x, keep)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dense_images_have_plans():
    with torch.no_grad():
        for seed in range(8):
            x = LAYOUTS[seed % 2](integers(SIZES[seed % len(SIZES)], seed))
            assert engine.why_not(Net(seed, x), x) is None

"""What other people's networks are written with: each has a meaning in the engine, exact on whole numbers."""

import copy

import pytest
import torch
from helpers import assert_as_accurate, assert_equal, integers, needs_native, reals
from torch import nn

import fast_backbones as fb
from fast_backbones import engine

pytestmark = needs_native
SIZES = ((1, 5, 4), (3, 7, 8))  # N, H, W


class Net(nn.Module):
    """`middle` between two convolutions of few channels, all weights whole numbers."""

    def __init__(self, middle, channels=12, *, parts=(), seed=0):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, channels, 1), nn.LazyConv2d(5, 3, padding=1)
        self.parts, self.middle, self.seed = nn.ModuleList(parts), middle, seed
        self.gain, self.shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.after(self.middle(self, self.before(x)))


def made(middle, *, parts=(), whole=True, seed=0):
    net = Net(middle, parts=parts).eval()
    with torch.no_grad():
        net(torch.zeros(1, 3, 5, 4))
        for i, parameter in enumerate(net.parameters()):
            fill = integers if whole else reals
            parameter.copy_(fill(parameter.shape, seed + i))
    return net


def checked(net, *, left=(), exact=True):
    """Equal to eager on whole numbers for several sizes; the operations that PyTorch runs are `left`."""
    plan = None
    for n, h, w in SIZES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = (integers if exact else reals)((n, 3, h, w), n).to(memory_format=layout)
            with torch.inference_mode(False), torch.no_grad():
                plain = net(x)
                truth = copy.deepcopy(net).double()(x.double())
                model = fb.optimize_(copy.deepcopy(net))
                result = model(x)
                assert engine.why_not(model, x) is None
                assert result.stride() == plain.stride()
                if exact:
                    assert_equal(result, plain)
                else:
                    assert_as_accurate(result, plain, truth)
                plan = engine.plan_for(model, x)
        found = [str(step.call[0]) if step.call else step.op for step in plan.steps if not step.native]
        assert tuple(found) == tuple(left)
    return plan


def convs(*sizes):
    return [nn.Conv2d(c, k, 3, padding=1) for c, k in sizes]


def by_split(net, y):
    a, b, c = y.split(4, 1)
    return torch.cat([a, net.parts[0](b), c], 1)


def by_sizes(net, y):
    a, b, c = y.split([2, 7, 3], 1)
    return torch.cat([net.parts[0](b), c.relu(), a], 1)


def by_chunk(net, y):
    a, b = torch.chunk(y, 2, dim=-3)
    return net.parts[0](a) + b


def by_slice(net, y):
    return net.parts[0](y[:, :5]) * 2 - y[:, -3:]


def in_a_row(net, y):
    """Res2Net: every piece goes through a convolution together with the result of the one before."""
    pieces, outs, last = y.split(3, 1), [], None
    for conv, piece in zip(net.parts, pieces):
        last = conv(piece if last is None else last + piece)
        outs.append(last)
    return torch.cat([*outs, pieces[3]], 1)


def added_in_place(net, y):
    """Dual path networks: some channels go on, the others are added."""
    y = y.clone()
    y[:, :4] += net.parts[0](y)
    return y


def piece_of_a_piece(net, y):
    return net.parts[0](y.chunk(2, 1)[1].split([1, 5], 1)[1])


def depthwise_pieces(net, y):
    """Mixed kernels, and a pool of a piece."""
    a, b, c = y.chunk(3, 1)
    return torch.cat([net.parts[0](a), net.parts[1](b), nn.functional.max_pool2d(c, 3, 1, 1)], 1)


@pytest.mark.parametrize(
    "middle, parts",
    [
        (by_split, convs((4, 4))),
        (by_sizes, convs((7, 6))),
        (by_chunk, convs((6, 6))),
        (by_slice, convs((5, 3))),
        (in_a_row, convs(*[(3, 3)] * 3)),
        (piece_of_a_piece, convs((5, 2))),
        (depthwise_pieces, [nn.Conv2d(4, 4, k, padding=k // 2, groups=4) for k in (3, 5)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pieces_of_a_map_are_views(middle, parts):
    checked(made(middle, parts=parts))


def test_pieces_of_the_image_are_calls():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 1)

        def forward(self, x):
            return self.conv(x[:, 1:2]) + self.conv(x.split([2, 1], 1)[1])

    model, x = Halves().eval(), integers((2, 3, 6, 5), 0)
    with torch.no_grad():
        model.conv.weight.copy_(integers((4, 1, 1, 1), 1)), model.conv.bias.zero_()
        plain = model(x)
        assert_equal(fb.optimize_(model)(x), plain)
        assert [step.kernel for step in engine.plan_for(model, x).steps].count("aten") == 2


def test_pieces_that_are_returned_and_flattened():
    class Taps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(4 * 12, 2)

        def forward(self, x):
            y = self.conv(x)
            a, b = y.chunk(2, 1)
            return y, a, b.relu(), self.head(b.flatten(1))

    model, x = Taps().eval(), integers((2, 3, 4, 3), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(parameter.shape, 1))
        plain = model(x)
        ours = fb.optimize_(model)(x)
        for a, b in zip(ours, plain):
            assert_equal(a, b)
            assert a.stride() == b.stride()


def one_number(net, y):
    return net.shift + net.gain * (y * net.gain + net.shift)


def differences(net, y):
    z = net.parts[0](y)
    return 3 - (-torch.sub(y, z, alpha=2)) - z


@pytest.mark.parametrize("middle", [one_number, differences], ids=lambda value: value.__name__)
def test_arithmetic_of_maps_and_single_numbers(middle):
    checked(made(middle, parts=convs((12, 12))))
    checked(made(middle, parts=convs((12, 12)), whole=False), exact=False)

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


def blocks_of_pixels(net, y):
    """ConvNeXt: linear layers over the last of [N, H, W, C], a scale per channel, back to a map."""
    z = net.parts[1](net.parts[0](y.permute(0, 2, 3, 1)).relu()) * net.parts[2].weight
    return y + z.permute(0, 3, 1, 2)


def pixels_that_others_read(net, y):
    """What has no twin over channels reads a view: here a roll."""
    z = net.parts[0](y.permute(0, 2, 3, 1).contiguous())
    return (z + z.roll(1, 1)).permute(0, 3, 1, 2)


def sum_of_pixels(net, y):
    z = y.permute(0, 2, 3, 1)
    z = nn.functional.leaky_relu(z, 0.5) * z.relu()
    return (net.parts[0](z) + net.parts[1](z).clamp(0, 6) * 3 - z).permute(0, 3, 1, 2)


def linears(*sizes):
    return [nn.Linear(c, k) for c, k in sizes]


@pytest.mark.parametrize(
    "middle, parts, left",
    [
        (blocks_of_pixels, [*linears((12, 24), (24, 12)), nn.BatchNorm1d(12)], ()),
        (sum_of_pixels, linears((12, 12), (12, 12)), ()),
        (
            pixels_that_others_read,
            linears((12, 7)),
            ("aten.permute.default", "aten.roll.default", "aten.permute.default"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_linear_layers_over_permuted_maps_are_convolutions(middle, parts, left):
    plan = checked(made(middle, parts=parts), left=left)
    assert sum(step.kernel == "conv2d" for step in plan.steps) >= 3
    checked(made(middle, parts=parts, whole=False), left=left, exact=False)


def test_pixels_that_are_returned_keep_their_strides():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            y = self.conv(x).permute(0, 2, 3, 1)
            z = self.linear(y)
            return y, z, z.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2).relu()

    model, x = Pixels().eval(), integers((2, 3, 4, 3), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(parameter.shape, 1))
        plain = model(x)
        for a, b in zip(fb.optimize_(model)(x), plain):
            assert_equal(a, b)
            assert a.stride() == b.stride()


def normed_pixels(net, y):
    z = nn.functional.layer_norm(y.permute(0, 2, 3, 1), (12,), eps=1e-6).permute(0, 3, 1, 2)
    z = net.parts[0](z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return y + z


def normed_rows(net, y):
    return y * net.parts[0](y.mean((2, 3)))[:, :, None, None]


@pytest.mark.parametrize("middle", [normed_pixels, normed_rows], ids=lambda value: value.__name__)
def test_layer_norms_of_channels(middle):
    checked(made(middle, parts=[nn.LayerNorm(12, eps=1e-5)], whole=False), exact=False)
    checked(made(middle, parts=[nn.LayerNorm(12, bias=False)], whole=False), exact=False)


def test_a_layer_norm_over_a_side_stays_a_call():
    checked(
        made(lambda net, y: nn.functional.layer_norm(y[..., :3], (3,)), whole=False),
        left=("aten.slice.Tensor", "aten.layer_norm.default"),
        exact=False,
    )


def shuffled(net, y):
    n, c, h, w = y.shape
    return net.parts[0](y.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w))


def shuffled_and_split(net, y):
    """ShuffleNet v2: half of the channels goes on as it is."""
    for conv in net.parts:
        a, b = y.chunk(2, 1)
        y = torch.cat([a, conv(b)], 1)
        n, c, h, w = y.shape
        y = torch.flatten(torch.transpose(y.view(n, 2, c // 2, h, w), 1, 2).contiguous(), 1, 2)
    return y


@pytest.mark.parametrize(
    "middle, parts",
    [
        (shuffled, convs((12, 4))),
        (shuffled_and_split, convs((6, 6), (6, 6))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shuffles_of_channels(middle, parts):
    checked(made(middle, parts=parts))


def selected(net, y):
    """Selective kernels: two paths, weighted by a softmax over the two."""
    paths = torch.stack([net.parts[0](y), net.parts[1](y)], 1)
    weights = net.parts[2](paths.sum(1).mean((2, 3), keepdim=True))
    n, c = y.shape[:2]
    return (paths * weights.view(n, 2, c, 1, 1).softmax(1)).sum(1)


def split_attention(net, y):
    """ResNeSt, of radix 2."""
    n, c, h, w = y.shape
    paths = net.parts[0](y).reshape(n, 2, c, h, w)
    weights = net.parts[1](paths.sum(1).mean((2, 3), keepdim=True)) * 0.01
    weights = weights.view(n, 1, 2, -1).transpose(1, 2).softmax(1).reshape(n, -1).view(n, -1, 1, 1)
    return (paths * weights.reshape(n, 2, c, 1, 1)).sum(1)


def sum_of_halves(net, y):
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).sum(1)


@pytest.mark.parametrize(
    "middle, parts",
    [
        (selected, [*convs((12, 12), (12, 12)), nn.Conv2d(12, 24, 1)]),
        (split_attention, [*convs((12, 24)), nn.Conv2d(12, 24, 1)]),
        (sum_of_halves, ()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_attention_over_parts(middle, parts):
    checked(made(middle, parts=parts, whole=False), exact=False)


def test_attention_over_three_parts_stays_calls():
    def three(net, y):
        paths = torch.stack([y, -y, y * 2], 1)
        return (paths * paths.mean((3, 4), keepdim=True).softmax(1)).sum(1)

    left = ["aten.stack", "aten.mean", "aten.softmax", "aten.mul", "aten.sum"]
    plan = checked_left(made(three, whole=False))
    assert [name.rpartition(".")[0] for name in plan] == left


def test_parts_in_another_order_stay_calls():
    """Two channels in turn belong to one part here, and the transposition mixes them."""

    def mixed(net, y):
        n, c = y.shape[:2]
        weights = y.mean((2, 3), keepdim=True).view(n, 1, 2, c // 2).transpose(1, 3).softmax(2)
        return y * weights.reshape(n, c, 1, 1)

    assert "aten.softmax.int" in checked_left(made(mixed, whole=False))


def checked_left(net):
    x = reals((2, 3, 5, 4), 0)
    with torch.no_grad():
        plain, truth = net(x), copy.deepcopy(net).double()(x.double())
        model = fb.optimize_(copy.deepcopy(net))
        assert_as_accurate(model(x), plain, truth)
        return [str(step.call[0]) for step in engine.plan_for(model, x).steps if step.call]


def expanded_gate(net, y):
    return y * y.mean((2, 3), keepdim=True).sigmoid().expand_as(y)


def gates_of_neighbours(net, y):
    """ECA: a convolution along the channels of the pooled map."""
    n, c = y.shape[:2]
    z = net.parts[0](y.mean((2, 3)).view(n, 1, c)).sigmoid().view(n, c, 1, 1)
    return y * z.expand_as(y)


def neighbours_without_a_gate(net, y):
    n, c = y.shape[:2]
    return y.relu() * net.parts[0](y.mean((2, 3), keepdim=True).view(n, 1, -1)).reshape(n, c, 1, 1)


@pytest.mark.parametrize("middle", [gates_of_neighbours, neighbours_without_a_gate], ids=lambda m: m.__name__)
def test_convolutions_along_channels(middle):
    plan = checked(made(middle, parts=[nn.Conv1d(1, 1, 5, padding=2, bias=False)], whole=False), exact=False)
    assert [step.kernel for step in plan.steps].count("conv2d") == 3


def test_a_convolution_that_shortens_the_channels_stays_a_call():
    def shorter(net, y):
        return net.parts[0](y.mean((2, 3))[:, None, :])[:, 0, :, None, None] * y[:, :10]

    net = made(shorter, parts=[nn.Conv1d(1, 1, 3, bias=False)], whole=False)
    assert "aten.conv1d.default" in checked_left(net)


def neighbours(net, rows):
    n, c = rows.shape[:2]
    return net.parts[0](rows.reshape(n, 1, c)).sigmoid().view(n, c, 1, 1)


def pieces_of_a_gate(net, y):
    (a, b), (u, v) = neighbours(net, y.mean((2, 3))).chunk(2, 1), y.chunk(2, 1)
    return torch.cat([u * b, v * a], 1)


def gate_of_a_piece(net, y):
    mean = y.mean((2, 3), keepdim=True)[:, 6:]
    return y * torch.cat([neighbours(net, mean), neighbours(net, mean.flatten(1))], 1)


def gate_of_what_is_concatenated(net, y):
    mean, largest = y.mean((2, 3), keepdim=True), y.amax((2, 3), keepdim=True)
    return y * neighbours(net, mean.flatten(1)) + net.parts[1](torch.cat([largest, mean], 1))


def gate_of_one_side(net, y):
    return y * neighbours(net, y.flatten(2).mean(2, keepdim=True))


@pytest.mark.parametrize(
    "middle",
    [pieces_of_a_gate, gate_of_a_piece, gate_of_what_is_concatenated, gate_of_one_side],
    ids=lambda value: value.__name__,
)
def test_rows_of_gates_among_other_channels(middle):
    parts = [nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Conv2d(24, 12, 1)]
    checked_left(made(middle, parts=parts, whole=False))


def gate_of(y):
    return y.mean((2, 3), keepdim=True).sigmoid()


def expanded_and_scaled(net, y):
    return gate_of(y).expand(-1, -1, *y.shape[2:]) * 2.0 + y


def expanded_twice(net, y):
    return gate_of(y).expand_as(y) * (y.mean((2, 3), keepdim=True) + 1).expand_as(y)


def expanded_by_itself(net, y):
    mean = y.mean((2, 3), keepdim=True)
    return mean.expand_as(y) * mean.sigmoid()


def expanded_and_scaled_per_channel(net, y):
    return gate_of(y).expand_as(y) * net.parts[0].weight.view(-1, 1, 1)


@pytest.mark.parametrize(
    "middle",
    [expanded_and_scaled, expanded_twice, expanded_by_itself, expanded_and_scaled_per_channel],
    ids=lambda value: value.__name__,
)
def test_a_gate_that_was_expanded_is_as_large_as_a_map(middle):
    """Only where it multiplies a map does the expansion mean nothing."""
    checked_left(made(middle, parts=[nn.BatchNorm1d(12)], whole=False))


def shuffled_halves(net, z):
    n, c, h, w = z.shape
    return z.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def linear_halves(net, z):
    return nn.functional.gelu(net.parts[0](z.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def normed_halves(net, z):
    return nn.functional.layer_norm(z.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)


def attention_of_halves(net, z):
    n, c, h, w = z.shape
    weights = z.mean((2, 3), keepdim=True).view(n, 2, c // 2, 1, 1).softmax(1)
    return (z.view(n, 2, c // 2, h, w) * weights).sum(1).repeat(1, 2, 1, 1)


def gated_halves(net, z):
    n, c = z.shape[:2]
    return z * net.parts[1](z.mean((2, 3)).view(n, 1, c)).sigmoid().view(n, c, 1, 1)


@pytest.mark.parametrize(
    "middle",
    [shuffled_halves, linear_halves, normed_halves, attention_of_halves, gated_halves],
    ids=lambda value: value.__name__,
)
def test_halves_of_images_are_no_images(middle):
    """Twice as many maps as images: a kernel would compute the first half of them."""
    parts = [nn.Linear(6, 6), nn.Conv1d(1, 1, 3, padding=1, bias=False)]

    def halves(net, y):
        n, c, h, w = y.shape
        return middle(net, y.reshape(2 * n, c // 2, h, w)).reshape(n, c, h, w)

    checked_left(made(halves, parts=parts, whole=False))


def test_a_gate_for_all_images_is_none_for_each():
    def gated(net, y):
        both = torch.stack([y.mean((0, 2, 3), keepdim=True), y.amax((0, 2, 3), keepdim=True)], 1)
        return (torch.stack([y, y.relu()], 1) * both.softmax(1)).sum(1)

    checked_left(made(gated, whole=False))


def scales_in_one_call(net, y):
    return torch.addcmul(net.parts[0].bias.view(1, -1, 1, 1), net.parts[0].weight.view(1, -1, 1, 1), y)


def test_gates_and_scales_in_other_words():
    checked(made(expanded_gate, whole=False), exact=False)
    checked(made(scales_in_one_call, parts=[nn.BatchNorm1d(12)]))


def leaky(net, y):
    return nn.functional.leaky_relu(net.parts[0](nn.functional.leaky_relu(y, 0.5)), -2.0, inplace=True)


def products_of_maps(net, y):
    return net.parts[0](y) * y + (y.mean((2, 3), keepdim=True) * 0 + 2) * y


def silu_written_out(net, y):
    z = net.parts[0](y)
    return y * torch.sigmoid(y) + nn.functional.hardsigmoid(z) * z


def enlarged(net, y):
    small = nn.functional.avg_pool2d(y, 1, 2)
    by_factor = nn.functional.interpolate(net.parts[0](small), scale_factor=2, mode="nearest")
    return nn.functional.interpolate(by_factor, size=y.shape[2:]) + y


def test_passes_over_maps():
    checked(made(lambda net, y: torch.clamp(net.parts[0](y), min=0) + y.clamp(min=0), parts=convs((12, 12))))
    checked(made(leaky, parts=convs((12, 12))))
    checked(made(products_of_maps, parts=convs((12, 12))))
    checked(made(silu_written_out, parts=convs((12, 12)), whole=False), exact=False)
    checked(made(enlarged, parts=convs((12, 12))))


def test_rows_of_a_map_with_turned_sides_are_others():
    """As many pixels, but not the same ones: that the last convolution waits for both does not say that it
    has waited for the first."""

    def turned(net, y):
        small = nn.functional.interpolate(y, (y.shape[3], y.shape[2]))
        return torch.cat([y, nn.functional.interpolate(small, y.shape[2:])], 1)

    plan = checked(made(turned))
    waits = plan.parts[0].deps[-1]
    first = next(i for i, instance in enumerate(plan.instances) if plan.steps[instance.step].op == "conv2d")
    assert first in [earlier for earlier, _ in waits]


def test_a_factor_whose_inverse_is_rounded_stays_a_call():
    checked(
        made(lambda net, y: nn.functional.interpolate(y, scale_factor=3)),
        left=("aten.upsample_nearest2d.vec",),
    )


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norms(groups):
    norm = nn.GroupNorm(groups, 12)
    checked(made(lambda net, y: net.parts[0](y).relu(), parts=[norm], whole=False), exact=False)
    plain = nn.GroupNorm(groups, 12, affine=False)
    checked(made(lambda net, y: net.parts[0](y) * 3, parts=[plain], whole=False), exact=False)


@pytest.mark.parametrize("kind", ["layer_norm", "group_norm"])
def test_norms_of_large_means_keep_their_digits(kind):
    """Values around 1000 with a spread of 1: a variance from squares in float would be noise."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)
            self.norm = nn.LayerNorm(16) if kind == "layer_norm" else nn.GroupNorm(4, 16)

        def forward(self, x):
            y = self.conv(x)
            if kind == "layer_norm":
                return self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.norm(y)

    model, x = Norm().eval(), reals((2, 3, 31, 33), 0)
    with torch.no_grad():
        model.conv.bias.fill_(1000.0)
        plain, truth = model(x), copy.deepcopy(model).double()(x.double())
        assert_as_accurate(fb.optimize_(model)(x), plain, truth)
        assert all(step.native for step in engine.plan_for(model, x).steps)


@pytest.mark.parametrize(
    "middle, parts",
    [
        (by_split, convs((4, 4))),
        (blocks_of_pixels, [*linears((12, 24), (24, 12)), nn.BatchNorm1d(12)]),
        (normed_pixels, [nn.LayerNorm(12)]),
        (selected, [*convs((12, 12), (12, 12)), nn.Conv2d(12, 24, 1)]),
        (gates_of_neighbours, [nn.Conv1d(1, 1, 5, padding=2, bias=False)]),
        (enlarged, convs((12, 12))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_models_in_bfloat16(middle, parts):
    net, x = made(middle, parts=parts, whole=False).bfloat16(), reals((2, 3, 31, 32), 1).bfloat16()
    plain, truth = net(x), copy.deepcopy(net).double()(x.double())
    model = fb.optimize_(net)
    assert_as_accurate(model(x), plain, truth)
    assert all(step.native for step in engine.plan_for(model, x).steps)

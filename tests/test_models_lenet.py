"""LeNet-5: today's network and the paper's, against the formulas of the paper."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.backbones.lenet import C3_TABLE, LeNet5, RadialBasis, ScaledTanh, Subsampling, TableConv2d
from helpers import assert_as_accurate
from model_checks import (
    check_common_face,
    check_facts,
    check_tracing,
    described,
    image,
)

from fast_backbones import backbones
from fast_backbones.backbones import _registry

TAPS, STRIDES = (6, 16, 120), (1, 2, 4)
TABLE = [("lenet5", 0.06, 0.0004, TAPS, STRIDES), ("lenet5_1998", 0.06, 0.0003, TAPS, STRIDES)]
NAMES = [row[0] for row in TABLE]


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_facts(row):
    check_facts(row, "LeNet", (1, 32, 32))


@pytest.mark.parametrize(
    "name, params, macs", [("lenet5", 61_706, 416_520), ("lenet5_1998", 60_000, 325_680)], ids=NAMES
)
def test_counts_are_the_papers_to_the_last_digit(name, params, macs):
    info = backbones.model_info(name)
    assert (info.params, info.macs, info.num_features) == (params, macs, 84)


def test_parameters_of_each_layer_are_the_papers():
    model = backbones.lenet5_1998()
    layers = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    layers = {name: count for name, count in layers.items() if count}
    assert layers == {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48120, "f6": 10164}


def test_names():
    with torch.device("meta"):
        today, paper = backbones.lenet5(), backbones.lenet5_1998()
    assert [row[:2] for row in described(today)] == [
        ("c1.weight", (6, 1, 5, 5)), ("c1.bias", (6,)), ("c3.weight", (16, 6, 5, 5)), ("c3.bias", (16,)),
        ("c5.weight", (120, 16, 5, 5)), ("c5.bias", (120,)), ("f6.weight", (84, 120)), ("f6.bias", (84,)),
        ("output.weight", (10, 84)), ("output.bias", (10,)),
    ]  # fmt: skip
    assert [row[:2] for row in described(paper)] == [
        ("c1.weight", (6, 1, 5, 5)), ("c1.bias", (6,)), ("s2.weight", (6,)), ("s2.bias", (6,)),
        ("c3.weight", (60, 5, 5)), ("c3.bias", (16,)), ("s4.weight", (16,)), ("s4.bias", (16,)),
        ("c5.weight", (120, 16, 5, 5)), ("c5.bias", (120,)), ("f6.weight", (84, 120)), ("f6.bias", (84,)),
        ("output.centers", (10, 84)),
    ]  # fmt: skip


def test_scaled_tanh():
    f = ScaledTanh()
    assert f(torch.tensor([1.0, -1.0])).tolist() == pytest.approx([1.0, -1.0], abs=1e-4)
    assert f(torch.tensor(0.3)).item() == pytest.approx(1.7159 * math.tanh(0.2))


def test_subsampling_sums():
    layer = Subsampling(2)
    torch.nn.init.constant_(layer.weight, 0.5)
    torch.nn.init.constant_(layer.bias, 0.25)
    x = torch.arange(8.0).view(1, 2, 2, 2) / 16
    want = 1.7159 * torch.tanh((torch.tensor([6.0, 22.0]) / 16 * 0.5 + 0.25) * 2 / 3)
    torch.testing.assert_close(layer(x).flatten(), want)


def test_table_convolution_sees_the_maps_of_the_table():
    assert [len(maps) for maps in C3_TABLE] == [3] * 6 + [4] * 9 + [6]
    layer = TableConv2d(6, C3_TABLE, 5)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = image(2, 6, 9, 9)
    kernels = iter(layer.weight.split([len(maps) for maps in C3_TABLE]))
    want = [
        F.conv2d(x[:, list(maps)], next(kernels).unsqueeze(0), bias.view(1))
        for maps, bias in zip(C3_TABLE, layer.bias)
    ]
    torch.testing.assert_close(layer(x), torch.cat(want, 1))


def test_radial_basis_gives_squared_distances():
    layer = RadialBasis(84, 10)
    assert set(layer.centers.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(layer.centers, RadialBasis(84, 12).centers[:10])  # the same pattern in every model
    distances = layer(layer.centers)
    assert distances.argmin(1).tolist() == list(range(10)) and distances.diagonal().abs().max() == 0
    differing_bits = (layer.centers[3] != layer.centers[8]).sum().item()
    assert 20 < differing_bits < 64 and distances[3, 8].item() == 4 * differing_bits


def plain_1998(model, x):
    """The paper's network, layer by layer."""

    def f(a):
        return 1.7159 * torch.tanh(2 * a / 3)

    def subsample(x, layer):
        x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
        total = x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
        return f(layer.weight[:, None, None] * total + layer.bias[:, None, None])

    x = subsample(f(F.conv2d(x, model.c1.weight, model.c1.bias)), model.s2)
    x = subsample(f(F.conv2d(x, model.c3.dense_weight(), model.c3.bias)), model.s4)
    x = f(F.conv2d(x, model.c5.weight, model.c5.bias)).flatten(1)
    x = f(F.linear(x, model.f6.weight, model.f6.bias))
    return torch.stack([(x - center).square().sum(1) for center in model.output.centers], 1)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 1, 33, 35)], ids=["default", "odd, batch 3"])
def test_outputs_of_the_papers_network(shape):
    model, x = backbones.lenet5_1998().eval(), image(*shape)
    with torch.inference_mode():
        plain, exact = plain_1998(model, x), plain_1998(copy.deepcopy(model).double(), x.double())
        assert_as_accurate(model.forward_modules(x), plain, exact)
        assert_as_accurate(model(x), plain, exact)


@pytest.mark.parametrize(
    "options, act, pool",
    [
        ({}, torch.relu, F.max_pool2d),
        ({"act": "tanh", "pool": "avg"}, torch.tanh, F.avg_pool2d),
        ({"act": "scaled_tanh"}, lambda a: 1.7159 * torch.tanh(2 * a / 3), F.max_pool2d),
    ],
    ids=["today", "tanh and average", "scaled tanh"],
)
def test_outputs_of_todays_network(options, act, pool):
    model, x = backbones.lenet5(**options).eval(), image(3, 1, 33, 35)

    def plain(m, x):
        x = pool(act(F.conv2d(x, m.c1.weight, m.c1.bias)), 2)
        x = pool(act(F.conv2d(x, m.c3.weight, m.c3.bias)), 2)
        x = act(F.conv2d(x, m.c5.weight, m.c5.bias)).flatten(1)
        return m.output(act(m.f6(x)))

    with torch.inference_mode():
        exact = plain(copy.deepcopy(model).double(), x.double())
        assert_as_accurate(model.forward_modules(x), plain(model, x), exact)
        assert_as_accurate(model(x), plain(model, x), exact)


@pytest.mark.parametrize("name", NAMES)
def test_common_face(name):
    check_common_face(getattr(backbones, name), 2, 1, 32, 33)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_tracing(name):
    check_tracing(backbones.create_model(name).eval(), 2, 1, 32, 32)


def test_initialisation_of_the_paper():
    model = backbones.lenet5_1998()
    for name, fan_in in (("c1", 25), ("s2", 4), ("s4", 4), ("c5", 400), ("f6", 120)):
        for parameter in model.get_submodule(name).parameters():
            assert parameter.abs().max() <= 2.4 / fan_in
    assert model.c3.weight[-6:].abs().max() <= 2.4 / 150 < model.c3.weight[:18].abs().max() <= 2.4 / 75
    assert model.c5.weight.std().item() == pytest.approx(2.4 / 400 / math.sqrt(3), rel=0.02)


def test_larger_images_have_features_and_no_logits():
    model = backbones.lenet5().eval()
    with pytest.raises(ValueError, match="32 to 35"):
        model.forward_modules(image(1, 1, 40, 40))
    shapes = [tuple(t.shape) for t in backbones.lenet5(features_only=True).eval()(image(1, 1, 40, 36))]
    assert shapes == [(1, 6, 36, 32), (1, 16, 14, 12), (1, 120, 3, 2)]


def test_dropout_acts_in_training_only():
    model, x = backbones.lenet5(drop_rate=0.5), image(2, 1, 32, 32)
    assert torch.equal(model.eval().forward_modules(x), model.forward_modules(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize(
    "options, message",
    [({"act": "gelu"}, "act"), ({"pool": "sum"}, "pool"), ({"original": True}, "original")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LeNet5(**options)


def test_preprocessing_maps_white_and_ink_as_the_paper():
    cfg = backbones.lenet5().default_cfg
    white, ink = ((value - cfg["mean"][0]) / cfg["std"][0] for value in (0.0, 1.0))
    assert (white, ink) == (pytest.approx(-0.1), pytest.approx(1.175))
    assert (cfg["num_classes"], cfg["first_conv"], cfg["classifier"]) == (10, "c1", "output")


def test_sparse_layer_counts_its_connections_only():
    layer = TableConv2d(6, C3_TABLE, 5)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    assert _registry.count_macs(layer, image(2, 6, 14, 14)) == 2 * 100 * 60 * 25

"""MobileNet (with and without gates) and Xception: timm's networks, multipliers, TensorFlow's padding."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.backbones.mobilenet import MobileNetV1, scaled_channels
from fast_backbones.backbones.xception import Block, Xception
from helpers import assert_as_accurate
from model_checks import (
    check_common_face,
    check_facts,
    check_same_features,
    check_same_network,
    check_tracing,
    check_training_step,
    described,
    image,
    peer,
    trained,
)
from torch import nn

from fast_backbones import backbones
from fast_backbones.backbones import _registry, layers

STRIDES = (2, 4, 8, 16, 32)
MOBILENETS = [
    ("mobilenetv1_100", 4.23, 0.569, (64, 128, 256, 512, 1024), STRIDES),
    ("mobilenetv1_075", 2.59, 0.325, (48, 96, 192, 384, 768), STRIDES),
    ("mobilenetv1_050", 1.33, 0.149, (32, 64, 128, 256, 512), STRIDES),
    ("mobilenetv1_025", 0.47, 0.041, (16, 32, 64, 128, 256), STRIDES),
]
SE_MOBILENET = ("se_mobilenetv1_100", 4.72, 0.569, (64, 128, 256, 512, 1024), STRIDES)
XCEPTION = ("legacy_xception", 22.86, 8.36, (64, 128, 256, 728, 2048), STRIDES)
WIDTHS = {row[0]: int(row[0][-3:]) / 100 for row in MOBILENETS}
MMACS = {  # at 224, 192, 160, 128 pixels: table 7 of the paper and its neighbours
    1.0: (568.7, 418.1, 290.7, 186.4),
    0.75: (325.4, 239.3, 166.4, 106.8),
    0.5: (149.5, 110.0, 76.5, 49.2),
    0.25: (41.0, 30.2, 21.1, 13.6),
}


def timms(name: str, **options):
    timm = peer("timm")
    if name == "mobilenetv1_100" or name == "legacy_xception":
        return timm.create_model(name, **options)
    return timm.models.efficientnet._gen_mobilenet_v1("mobilenetv1_100", WIDTHS[name], **options)


def tiny(**options):
    return backbones.mobilenetv1(0.25, **options)


def tiny_gated(**options):
    return backbones.mobilenetv1(0.25, se_reduction=4, **options)


@pytest.mark.parametrize("row", MOBILENETS, ids=list(WIDTHS))
def test_facts_of_mobilenet(row):
    check_facts(row, "MobileNet", (3, 224, 224))


def test_facts_of_the_others():
    check_facts(SE_MOBILENET, "SE-MobileNet", (3, 224, 224))
    check_facts(XCEPTION, "Xception", (3, 299, 299))
    assert backbones.model_info("xception").name == "legacy_xception"
    assert backbones.model_info("mobilenet_v1").name == "mobilenetv1_100"
    assert backbones.xception is backbones.legacy_xception
    assert backbones.mobilenet_v1 is backbones.mobilenetv1_100


@pytest.mark.parametrize("width", MMACS)
def test_both_multipliers_have_the_papers_cost(width):
    with torch.device("meta"):
        model = backbones.mobilenetv1(width).eval()
        for size, mmacs in zip((224, 192, 160, 128), MMACS[width]):
            counted = _registry.count_macs(model, torch.empty(1, 3, size, size)) / 1e6
            assert abs(counted - mmacs) < 0.0501, f"{size} pixels: {counted}"


def test_common_face_of_mobilenet():
    check_common_face(tiny, 2, 3, 64, 65)


def test_common_face_with_gates():
    check_common_face(tiny_gated, 2, 3, 64, 65)


@pytest.mark.slow
def test_common_face_of_xception():
    check_common_face(backbones.legacy_xception, 1, 3, 71, 96)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "build, options",
    [(tiny, {}), (tiny_gated, {}), (tiny, {"pad_type": "same"}), (tiny, {"features_only": True})],
    ids=["plain", "gates", "same padding", "features"],
)
def test_tracing_of_mobilenet(build, options):
    check_tracing(trained(build(**options)).eval(), 2, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"pad_type": "same"}], ids=["symmetric", "same padding"])
def test_tracing_of_xception(options):
    check_tracing(trained(backbones.legacy_xception(num_classes=5, **options)).eval(), 2, 3, 72, 72)


# The same networks as timm's


@pytest.mark.peer
@pytest.mark.parametrize("name", [*WIDTHS, "legacy_xception"])
def test_state_dict_is_timms(name):
    with torch.device("meta"):
        assert described(timms(name)) == described(backbones.create_model(name))


@pytest.mark.peer
def test_seeded_xception_is_timms_to_the_bit():
    torch.manual_seed(7)
    theirs = timms("legacy_xception").state_dict()
    torch.manual_seed(7)
    ours = backbones.legacy_xception().state_dict()
    assert [k for k in theirs if not torch.equal(theirs[k], ours[k])] == []


@pytest.mark.peer
@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv1_025"])
def test_seeded_initialisation_of_mobilenet_is_timms_to_the_bit(name):
    """From the seed on: timm's constructor also draws the weights of a gate that it throws away."""
    ours, theirs = backbones.create_model(name), timms(name)
    torch.manual_seed(7)
    peer("timm").models._efficientnet_builder.efficientnet_init_weights(theirs)
    torch.manual_seed(7)
    ours.init_weights()
    state = ours.state_dict()
    assert [k for k, v in theirs.state_dict().items() if not torch.equal(v, state[k])] == []


@pytest.mark.peer
@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv1_025", "legacy_xception"])
def test_network_equals_timm(name):
    ours, theirs = backbones.create_model(name, num_classes=9), timms(name, num_classes=9)
    check_same_network(ours, theirs, (1, 3, 96, 96), (3, 3, 75, 97))


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("name", [*WIDTHS, "legacy_xception"])
def test_every_network_equals_timm_at_the_default_size(name):
    size = 299 if name == "legacy_xception" else 224
    check_same_network(
        backbones.create_model(name), timms(name), (1, 3, size, size), (3, 3, size - 31, size + 14)
    )


@pytest.mark.peer
@pytest.mark.parametrize("name", ["mobilenetv1_100", "legacy_xception"])
def test_features_equal_timms(name):
    theirs = trained(timms(name, features_only=True)).eval()
    ours = backbones.create_model(name, features_only=True).eval()
    state = {k.removeprefix("body."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict({k: state[k] for k in ours.state_dict()})
    check_same_features(ours, theirs, (1, 3, 96, 96), (3, 3, 75, 97))


@pytest.mark.peer
@pytest.mark.parametrize("options", [{"out_indices": (1, 3)}, {"in_chans": 1}], ids=str)
def test_options_of_features_equal_timms(options):
    theirs = trained(timms("mobilenetv1_100", features_only=True, **options)).eval()
    ours = backbones.mobilenetv1_100(features_only=True, **options).eval()
    ours.load_state_dict({k: theirs.state_dict()[k] for k in ours.state_dict()})
    check_same_features(ours, theirs, (2, options.get("in_chans", 3), 64, 65))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["mobilenetv1_025", "legacy_xception"])
def test_training_steps_equal_timm(name):
    ours = backbones.create_model(name, num_classes=2, drop_rate=0.2)
    check_training_step(ours, timms(name, num_classes=2, drop_rate=0.2), 2, 3, 72, 72)


@pytest.mark.peer
@pytest.mark.parametrize("size", [(64, 64), (65, 97)], ids=["even", "odd"])
def test_same_padding_equals_timms(size):
    options = {"pad_type": "same", "bn_eps": 1e-3}
    theirs = timms("mobilenetv1_025", num_classes=9, **options)
    ours = backbones.mobilenetv1_025(num_classes=9, **options)
    check_same_network(ours, theirs, (2, 3, *size))


# TensorFlow's padding


@pytest.mark.parametrize(
    "n, kernel, stride, before, after",
    [(8, 3, 2, 0, 1), (9, 3, 2, 1, 1), (8, 3, 1, 1, 1), (8, 5, 3, 1, 2), (9, 2, 3, 0, 0)],
)
def test_same_padding_is_the_formula_of_tensorflow(n, kernel, stride, before, after):
    x = torch.ones(1, 1, n, 3 * n)
    y = layers.pad_same(x, kernel, stride, value=7.0)
    row = (y[0, 0, :, y.shape[3] // 2] == 7.0).tolist()
    assert row == [True] * before + [False] * n + [True] * after
    conv = layers.make_conv2d(1, 1, 3, stride, pad_type="same")
    assert conv(x).shape[2:] == (math.ceil(n / stride), math.ceil(3 * n / stride))


def test_same_padding_of_a_strided_convolution_and_pool():
    conv = layers.make_conv2d(4, 4, 3, 2, groups=4, pad_type="same")
    pool = layers.make_max_pool2d(3, 2, pad_type="same")
    x = image(2, 4, 8, 9)
    want = F.conv2d(F.pad(x, (1, 1, 0, 1)), conv.weight, stride=2, groups=4)
    assert torch.equal(conv(x), want)
    lowest = F.pad(x - 9, (1, 1, 0, 1), value=-math.inf)  # all negative: a zero would win
    assert torch.equal(pool(x - 9), F.max_pool2d(lowest, 3, 2))
    odd = image(2, 4, 9, 9)
    assert torch.equal(conv(odd), F.conv2d(odd, conv.weight, stride=2, padding=1, groups=4))
    assert torch.equal(pool(odd), F.max_pool2d(odd, 3, 2, 1))


@pytest.mark.parametrize(
    "build, odd", [(tiny, 65), (backbones.legacy_xception, 67)], ids=["mobilenet", "xception"]
)
def test_same_padding_keeps_names_and_changes_even_sizes(build, odd):
    """`odd`: every map that is halved has an odd size, so that both ways to pad agree."""
    plain = trained(build(features_only=True, out_indices=(0, 1))).eval()
    padded = build(features_only=True, out_indices=(0, 1), pad_type="same").eval()
    padded.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        for size, equal in ((70, False), (odd, True)):
            a, b = (model.forward_modules(image(1, 3, size, size))[1] for model in (plain, padded))
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5) == equal
        x = image(2, 3, 70, 70)
        exact = copy.deepcopy(padded).double().forward_modules(x.double())
        for rows in zip(padded(x), padded.forward_modules(x), exact):
            assert_as_accurate(*rows)


@pytest.mark.parametrize("build", [tiny, backbones.legacy_xception], ids=["mobilenet", "xception"])
def test_epsilon_reaches_every_batch_norm(build):
    with torch.device("meta"):
        model, usual = build(bn_eps=1e-3), build()
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert {m.eps for m in usual.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


# MobileNet's options


@pytest.mark.parametrize(
    "channels, width, scaled",
    [(32, 0.25, 8), (1024, 0.75, 768), (32, 0.1, 8), (64, 0.35, 24), (32, 0.35, 16), (64, 1.4, 88)],
)
def test_scaled_channels(channels, width, scaled):
    assert scaled_channels(channels, width) == scaled
    assert scaled % 8 == 0 and scaled >= max(8, 0.9 * channels * width)


@pytest.mark.peer
@pytest.mark.parametrize("width", [0.1, 0.35, 0.6, 1.25])
def test_any_width_is_timms(width):
    build = peer("timm").models.efficientnet._gen_mobilenet_v1
    with torch.device("meta"):
        assert described(build("mobilenetv1_100", width)) == described(backbones.mobilenetv1(width))


def test_activation():
    x = image(2) * 100
    six, free = tiny(features_only=True), tiny(features_only=True, act="relu")
    free.load_state_dict(six.state_dict())
    assert max(t.max().item() for t in six.eval()(x)) <= 6.0 < max(t.max().item() for t in free.eval()(x))


def test_gates_come_after_the_last_activation_of_a_block():
    model = trained(backbones.se_mobilenetv1_100(features_only=True, out_indices=(0,))).eval()
    plain = backbones.mobilenetv1_100(features_only=True, out_indices=(0,)).eval()
    assert [k for k in model.state_dict() if "se_out" in k] == [
        f"blocks.0.0.se_out.fc{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    ]
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "se_out" not in k})
    x, se = image(2), model.blocks[0][0].se_out
    with torch.no_grad():
        (before,) = plain.forward_modules(x)
        hidden = F.conv2d(before.mean((2, 3), keepdim=True), se.fc1.weight, se.fc1.bias).relu()
        gate = F.conv2d(hidden, se.fc2.weight, se.fc2.bias).sigmoid()
        torch.testing.assert_close(model.forward_modules(x)[0], before * gate)
    assert se.fc1.weight.shape == (4, 64, 1, 1)


def test_reduction_of_the_gates():
    with torch.device("meta"):
        model = backbones.se_mobilenetv1_100(se_reduction=8)
    assert model.blocks[4][1].se_out.fc1.weight.shape == (128, 1024, 1, 1)


@pytest.mark.parametrize(
    "build, options, message",
    [
        (MobileNetV1, {"width": 0.0}, "width"),
        (MobileNetV1, {"act": "gelu"}, "act"),
        (MobileNetV1, {"pad_type": "valid"}, "pad_type"),
        (Xception, {"pad_type": "valid"}, "pad_type"),
    ],
)
def test_bad_options(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# Xception's blocks


def test_leading_relu_leaves_the_shortcut_alone():
    block, x = trained(Block(16, (16, 16, 16))).eval(), image(2, 16, 9, 9)
    before = x.clone()
    with torch.no_grad():
        y = block(x)
        assert torch.equal(x, before)
        assert torch.equal(y, block.rep(x) + x) and bool((y < 0).any())  # and no ReLU behind the sum


def test_separable_convolution_has_nothing_in_between():
    conv, x = Block(8, (12, 12)).rep[1], image(2, 8, 9, 9)
    want = F.conv2d(F.conv2d(x, conv.conv1.weight, padding=1, groups=8), conv.pointwise.weight)
    assert torch.equal(conv(x), want)


def test_widths_of_xception():
    with torch.device("meta"):
        model = backbones.legacy_xception()
    widths = [[m.pointwise.out_channels for m in block.rep if hasattr(m, "pointwise")]
              for name, block in model.named_children() if name.startswith("block")]  # fmt: skip
    assert widths == [[128, 128], [256, 256], [728, 728], *[[728] * 3] * 8, [728, 1024]]
    assert [hasattr(b, "skip") for n, b in model.named_children() if n.startswith("block")] == (
        [True] * 3 + [False] * 8 + [True]
    )


def test_taps_of_xception_are_activated_and_cost_nothing_more():
    model = trained(backbones.legacy_xception(features_only=True, out_indices=(1, 2))).eval()
    assert model.feature_info.module_name() == ["block2.rep.0", "block3.rep.0"]
    used = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert used == {"conv1", "bn1", "conv2", "bn2", "block1", "block2"}
    with torch.inference_mode():
        assert all(bool((t >= 0).all()) for t in model.forward_modules(image(1)))


def test_preprocessing():
    with torch.device("meta"):
        mobilenet, xception = backbones.mobilenetv1_100().default_cfg, backbones.xception().default_cfg
    for cfg in (mobilenet, xception):
        assert (cfg["interpolation"], cfg["mean"], cfg["std"]) == ("bicubic", (0.5,) * 3, (0.5,) * 3)
    assert (mobilenet["crop_pct"], xception["crop_pct"]) == (0.875, 0.8975)
    assert (mobilenet["first_conv"], mobilenet["classifier"]) == ("conv_stem", "classifier")
    assert (xception["first_conv"], xception["classifier"]) == ("conv1", "fc")

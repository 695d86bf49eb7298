"""AlexNet (torchvision's and the one of 2012) and VGG, against torchvision and against the papers' layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
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

VGG_TAPS = ((64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32))
VGG_TABLE = [
    ("vgg11", 132.86, 7.61, *VGG_TAPS),
    ("vgg11_bn", 132.87, 7.61, *VGG_TAPS),
    ("vgg13", 133.05, 11.31, *VGG_TAPS),
    ("vgg13_bn", 133.05, 11.31, *VGG_TAPS),
    ("vgg16", 138.36, 15.47, *VGG_TAPS),
    ("vgg16_bn", 138.37, 15.47, *VGG_TAPS),
    ("vgg19", 143.67, 19.63, *VGG_TAPS),
    ("vgg19_bn", 143.68, 19.63, *VGG_TAPS),
    ("vgg11_lrn", 132.86, 7.61, *VGG_TAPS),
    ("vgg16_c", 133.64, 11.77, *VGG_TAPS),
]
ALEXNET = ("alexnet", 61.10, 0.714, (64, 192, 256, 256), (4, 8, 16, 32))
ALEXNET_2012 = ("alexnet_2012", 60.97, 0.724, (96, 256, 256, 256), (4, 8, 16, 32))
VGGS = [row[0] for row in VGG_TABLE]
TORCHVISION = ["alexnet", *(n for n in VGGS if n not in ("vgg11_lrn", "vgg16_c"))]


@pytest.mark.parametrize("row", VGG_TABLE, ids=VGGS)
def test_facts_of_vgg(row):
    check_facts(row, "VGG", (3, 224, 224))


def test_facts_of_alexnet():
    check_facts(ALEXNET, "AlexNet", (3, 224, 224))
    check_facts(ALEXNET_2012, "AlexNet", (3, 227, 227))
    assert backbones.model_info("caffe_alexnet").name == "alexnet_2012"
    assert backbones.caffe_alexnet is backbones.alexnet_2012


@pytest.mark.parametrize(
    "depth, options, taps",
    [
        (11, {}, [1, 4, 9, 14, 19, 20]),
        (16, {}, [3, 8, 15, 22, 29, 30]),
        (16, {"batch_norm": True}, [5, 12, 22, 32, 42, 43]),
    ],
    ids=["vgg11", "vgg16", "vgg16_bn"],
)
def test_taps_of_vgg_sit_in_front_of_the_pools(depth, options, taps):
    with torch.device("meta"):
        model = backbones.VGG(depth, features_only=True, **options)
    assert model.feature_info.module_name() == [f"features.{i}" for i in taps]
    for index in taps[:5]:
        assert isinstance(model.features[index], nn.ReLU)
        assert isinstance(model.features[index + 1], nn.MaxPool2d)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg11_bn", "vgg11_lrn", "vgg16_c", "alexnet_2012"])
def test_common_face(name):
    size = (227, 229) if name == "alexnet_2012" else (64, 97)
    check_common_face(getattr(backbones, name), 1, 3, *size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["alexnet", "vgg11_lrn", "alexnet_2012"])
def test_tracing_of_the_classifier(name):
    size = (227, 227) if name == "alexnet_2012" else (64, 64)
    check_tracing(backbones.create_model(name, num_classes=4).eval(), 2, 3, *size)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "vgg11_lrn", "alexnet_2012"])
def test_tracing_of_the_features(name):
    check_tracing(backbones.create_model(name, features_only=True).eval(), 2, 3, 99, 97)


def test_features_only_has_no_linear_layers():
    for build in (backbones.alexnet, backbones.alexnet_2012, backbones.vgg11):
        model = build(features_only=True)
        assert not any(isinstance(m, nn.Linear) for m in model.modules())
        assert isinstance(model.get_classifier(), nn.Identity)
        early = build(features_only=True, out_indices=(0,))
        assert len(list(early.parameters())) == 2 and early.num_features == early.feature_info[0]["num_chs"]


def test_a_whole_checkpoint_fits_models_without_parts():
    model = trained(backbones.alexnet(num_classes=4)).eval()
    x = image(2)
    features = model.forward_features(x)
    hidden = backbones.alexnet(num_classes=0)
    report = backbones.load_weights(hidden, model.state_dict())
    assert any("classifier.6" in note for note in report.notes) and hidden.num_features == 4096
    with torch.no_grad():
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, 4096) and torch.equal(hidden.eval().forward_modules(x), pooled)
        assert torch.equal(model.classifier[6](pooled), model.forward_modules(x))
    taps = backbones.alexnet(features_only=True, out_indices=(0, 2))
    backbones.load_weights(taps, model.state_dict())
    with torch.no_grad():
        assert torch.equal(taps.eval().forward_modules(x)[1], model.features[:12](x))


def test_dropout_acts_where_the_networks_have_it():
    alexnet = [type(m).__name__ for m in backbones.alexnet(num_classes=2).classifier]
    with torch.device("meta"):
        vgg = [type(m).__name__ for m in backbones.vgg11(num_classes=2, drop_rate=0.3).classifier]
    assert alexnet == ["Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert vgg == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    model = backbones.alexnet(num_classes=2)
    assert model.classifier[0].p == 0.5 and model.drop_rate == 0.5
    features = torch.rand(2, 256, 6, 6)
    with torch.no_grad():
        assert torch.equal(model.eval().forward_head(features), model.forward_head(features))
        assert not torch.equal(model.train().forward_head(features), model.forward_head(features))


# The same networks as torchvision's


@pytest.mark.peer
@pytest.mark.parametrize("name", TORCHVISION)
def test_state_dict_is_torchvisions(name):
    models = peer("torchvision").models
    with torch.device("meta"):
        assert described(getattr(models, name)()) == described(backbones.create_model(name))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg11_bn"])
def test_seeded_initialisation_is_torchvisions_to_the_bit(name):
    torch.manual_seed(7)
    theirs = getattr(peer("torchvision").models, name)(num_classes=10).state_dict()
    torch.manual_seed(7)
    ours = backbones.create_model(name, num_classes=10).state_dict()
    assert [k for k in theirs if not torch.equal(theirs[k], ours[k])] == []


@pytest.mark.peer
@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg11_bn"])
def test_network_equals_torchvision(name):
    theirs = getattr(peer("torchvision").models, name)(num_classes=9)
    ours = backbones.create_model(name, num_classes=9)
    check_same_network(ours, theirs, (1, 3, 64, 64), (3, 3, 65, 97))


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_network_equals_torchvision_at_the_default_size(name):
    theirs = getattr(peer("torchvision").models, name)()
    check_same_network(backbones.create_model(name), theirs, (1, 3, 224, 224), (3, 3, 193, 225))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn"])
def test_training_steps_equal_torchvision(name):
    theirs = getattr(peer("torchvision").models, name)(num_classes=2)
    check_training_step(backbones.create_model(name, num_classes=2), theirs, 2, 3, 64, 64, steps=1)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_features_equal_timms(name):
    theirs = trained(peer("timm").create_model(name, features_only=True)).eval()
    ours = backbones.create_model(name, features_only=True).eval()
    state = {k.replace("features_", "features.", 1): v for k, v in theirs.state_dict().items()}
    backbones.load_weights(ours, state)
    check_same_features(ours, theirs, (1, 3, 64, 64), (3, 3, 65, 97))


# VGG A-LRN and C


def test_vgg11_lrn_normalises_the_first_map():
    plain = backbones.vgg11(features_only=True).eval()
    model = backbones.vgg11_lrn(features_only=True).eval()
    assert described(model) == described(plain)
    model.load_state_dict(plain.state_dict())
    x = image(2, h=37)
    with torch.no_grad():
        (c1, c2, *_), (p1, *_) = model.forward_modules(x), plain.forward_modules(x)
        windows = F.pad(p1.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)  # 5 neighbouring channels
        want = p1 / (2 + 1e-4 * windows) ** 0.75
        torch.testing.assert_close(c1, want)
        torch.testing.assert_close(c2, model.features[3](F.max_pool2d(want, 2)).relu())


def test_vgg16_c_has_three_1x1():
    with torch.device("meta"):
        c, d = backbones.vgg16_c(), backbones.vgg16()
    assert list(c.state_dict()) == list(d.state_dict())
    small = [name for name, m in c.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert small == ["features.14", "features.21", "features.28"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11_lrn", "vgg16_c"])
def test_networks_without_a_peer(name):
    """The layers of the table one by one, in float32 and float64, at the default size and an odd one."""
    model = backbones.create_model(name, num_classes=5).eval()

    def plain(model, x):
        index = 0
        for count in (1, 1, 2, 2, 2) if name == "vgg11_lrn" else (2, 2, 3, 3, 3):
            for _ in range(count):
                layer = model.features[index]
                x = F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[2] // 2).relu()
                if name == "vgg11_lrn" and index == 0:
                    x = F.local_response_norm(x, 5, 5e-4, 0.75, 2.0)
                index += 2
            x, index = F.max_pool2d(x, 2), index + 1
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)
        for i in (0, 3):
            x = F.linear(x, model.classifier[i].weight, model.classifier[i].bias).relu()
        return F.linear(x, model.classifier[6].weight, model.classifier[6].bias)

    exact = copy.deepcopy(model).double()
    for shape in ((1, 3, 224, 224), (3, 3, 65, 97)):
        x = image(*shape)
        with torch.inference_mode():
            assert_as_accurate(model.forward_modules(x), plain(model, x), plain(exact, x.double()))
            assert_as_accurate(model(x), plain(model, x), plain(exact, x.double()))


@pytest.mark.parametrize("depth", [12, 0])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match="depth"):
        backbones.VGG(depth)


# AlexNet of 2012


def test_names_of_alexnet_2012():
    with torch.device("meta"):
        rows = described(backbones.alexnet_2012())
    shapes = [(k, shape) for k, shape, _ in rows if k.endswith("weight")]
    assert shapes == [
        ("conv1.weight", (96, 3, 11, 11)), ("conv2.weight", (256, 48, 5, 5)),
        ("conv3.weight", (384, 256, 3, 3)), ("conv4.weight", (384, 192, 3, 3)),
        ("conv5.weight", (256, 192, 3, 3)), ("fc6.weight", (4096, 9216)),
        ("fc7.weight", (4096, 4096)), ("fc8.weight", (1000, 4096)),
    ]  # fmt: skip
    assert [k for k, *_ in rows] == [f"{k[:-7]}.{part}" for k, _ in shapes for part in ("weight", "bias")]


def plain_2012(model, x, alpha=1e-4, offset=1.0):
    def lrn(x):
        windows = F.pad(x.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (offset + alpha / 5 * windows) ** 0.75

    def conv(layer, x, **how):
        return F.conv2d(x, layer.weight, layer.bias, **how).relu()

    taps = [lrn(conv(model.conv1, x, stride=4))]
    taps.append(lrn(conv(model.conv2, F.max_pool2d(taps[0], 3, 2), padding=2, groups=2)))
    x = conv(model.conv3, F.max_pool2d(taps[1], 3, 2), padding=1)
    x = conv(model.conv4, x, padding=1, groups=2)
    taps.append(conv(model.conv5, x, padding=1, groups=2))
    taps.append(F.max_pool2d(taps[2], 3, 2))
    return taps


@pytest.mark.parametrize("options", [{}, {"lrn": "paper"}], ids=["caffe", "paper"])
def test_features_of_alexnet_2012(options):
    model = backbones.alexnet_2012(features_only=True, **options).eval()
    constants = {"alpha": 5e-4, "offset": 2.0} if options else {}
    x = image(2, 3, 99, 132) * 50
    with torch.inference_mode():
        plain = plain_2012(model, x, **constants)
        exact = plain_2012(copy.deepcopy(model).double(), x.double(), **constants)
        for rows in zip(model.forward_modules(x), plain, exact):
            assert_as_accurate(*rows)
        for rows in zip(model(x), plain, exact):
            assert_as_accurate(*rows)


def test_logits_of_alexnet_2012():
    model = backbones.alexnet_2012(num_classes=5).eval()
    for shape in ((1, 3, 227, 227), (3, 3, 229, 258)):
        x = image(*shape) * 50
        with torch.inference_mode():
            y = plain_2012(model, x)[-1].flatten(1)
            for fc in (model.fc6, model.fc7):
                y = F.linear(y, fc.weight, fc.bias).relu()
            torch.testing.assert_close(model.forward_modules(x), model.fc8(y), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="227 to 258"):
        model.forward_modules(image(1, 3, 224, 224))


def test_initialisation_of_alexnet_2012():
    model = backbones.alexnet_2012(num_classes=100)
    layers = {name: m for name, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, layer in layers.items():
        deviation = 0.005 if name in ("fc6", "fc7") else 0.01
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02), name
        assert set(layer.bias.tolist()) == {float(name in ("conv2", "conv4", "conv5", "fc6", "fc7"))}, name


def test_bad_lrn():
    with pytest.raises(ValueError, match="lrn"):
        backbones.alexnet_2012(lrn="none")


def test_preprocessing():
    with torch.device("meta"):
        caffe, modern = backbones.alexnet_2012().default_cfg, backbones.vgg16().default_cfg
    assert (caffe["channel_order"], caffe["value_range"], caffe["mean"]) == ("bgr", 255.0, (104, 117, 123))
    assert caffe["std"] == (1, 1, 1) and round(227 / caffe["crop_pct"]) == 256
    assert (modern["channel_order"], modern["value_range"], modern["crop_pct"]) == ("rgb", 1.0, 0.875)
    assert (modern["first_conv"], modern["classifier"]) == ("features.0", "classifier.6")

"""Inception-ResNet v1, v2 and SE-Inception-ResNet v2: sizes, agreement with timm, names, heads, scales."""

import pytest
import torch
import torch.nn.functional as F
from inception_keys import gate, inception_resnet_v1_keys
from model_checks import (
    check_same_features,
    check_same_network,
    check_training_step,
    described,
    filled,
    image,
    peer,
    same,
    trained,
)
from torch import nn

from fast_backbones import backbones

V1, V2 = (64, 192, 256, 896, 1792), (64, 192, 320, 1088, 1536)
TABLE = [  # name               M params, GMACs, features, taps, image
    ("inception_resnet_v1", 23.48, 1.42, 512, V1, 160),
    ("inception_resnet_v2", 55.84, 13.16, 1536, V2, 299),
    ("se_inception_resnet_v2", 64.39, 13.16, 1536, V2, 299),
]
NAMES = [row[0] for row in TABLE]
V1_FIRST = [n if n == "inception_resnet_v1" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


def built(name: str, **options) -> nn.Module:
    return filled(lambda: backbones.create_model(name, **options))


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return backbones.create_model(name, **options)


# Sizes


@pytest.mark.parametrize("name, params, gmacs, features, taps, size", TABLE, ids=NAMES)
def test_sizes_equal_the_published_ones(name, params, gmacs, features, taps, size):
    info = backbones.model_info(name)
    assert (round(info.params / 1e6, 2), round(info.gmacs, 2)) == (params, gmacs)
    assert (info.name, info.input_size, info.num_features) == (name, (3, size, size), features)
    assert (info.tap_channels, info.tap_reductions) == (taps, (2, 4, 8, 16, 32))
    assert callable(getattr(backbones, name)) and name in backbones.__all__


@pytest.mark.parametrize(
    "name, size, maps",
    [
        ("inception_resnet_v1", 160, [77, 36, 17, 8, 3]),
        ("inception_resnet_v1", 299, [147, 71, 35, 17, 8]),
        ("inception_resnet_v2", 299, [147, 71, 35, 17, 8]),
    ],
)
def test_sizes_of_the_maps(name, size, maps):
    model = on_meta(name, features_only=True).eval()
    assert [t.shape[-1] for t in model(torch.empty(1, 3, size, size, device="meta"))] == maps


# The same network as timm's


@pytest.mark.peer
def test_v2_equals_timm():
    torch.manual_seed(7)
    theirs = peer("timm").create_model("inception_resnet_v2")
    torch.manual_seed(7)
    ours = backbones.inception_resnet_v2()
    assert [k for k, v in theirs.state_dict().items() if not torch.equal(v, ours.state_dict()[k])] == []
    check_same_network(ours, theirs, (3, 3, 97, 130))
    x = image(1, 3, 299, 299)
    with torch.inference_mode():
        assert torch.equal(ours.forward_modules(x), theirs(x))


@pytest.mark.peer
def test_training_step_of_v2_equals_timm():
    theirs = peer("timm").create_model("inception_resnet_v2", num_classes=5)
    check_training_step(backbones.inception_resnet_v2(num_classes=5), theirs, 2, 3, 107, 107, steps=1)


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"out_indices": (1, 2)}, {"in_chans": 1}], ids=str)
def test_features_of_v2_equal_timms(options):
    theirs = trained(peer("timm").create_model("inception_resnet_v2", features_only=True, **options)).eval()
    ours = backbones.inception_resnet_v2(features_only=True, **options).eval()
    state = theirs.state_dict()
    ours.load_state_dict({k: state[k] for k in ours.state_dict()}, strict=True)
    check_same_features(ours, theirs, (2, options.get("in_chans", 3), 97, 130))


# Layouts without a peer here


@pytest.mark.parametrize(
    "options, head, classes",
    [
        ({}, "embedding", 0),
        ({"classify": True}, "embedding", 8631),
        ({"num_classes": 7}, "embedding", 7),
        ({"head": "imagenet"}, "imagenet", 1000),
        ({"head": "imagenet", "num_classes": 7}, "imagenet", 7),
    ],
    ids=str,
)
def test_names_and_shapes_of_v1(options, head, classes):
    model = on_meta("inception_resnet_v1", **options)
    assert [(k, s) for k, s, _ in described(model)] == inception_resnet_v1_keys(head, classes)


def test_gates_of_se_inception_resnet_v2_are_all_it_adds():
    gated, plain = on_meta("se_inception_resnet_v2"), on_meta("inception_resnet_v2")
    blocks = [(f"repeat.{i}", 320, 20) for i in range(10)] + [(f"repeat_1.{i}", 1088, 68) for i in range(20)]
    blocks += [(f"repeat_2.{i}", 2080, 130) for i in range(9)] + [("block8", 2080, 130)]
    want = {key: shape for name, *sizes in blocks for key, shape in gate(f"{name}.se", *sizes)}
    ours, base = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (gated, plain))
    assert {k: s for k, s in ours.items() if k not in base} == want
    assert {k: s for k, s in ours.items() if k in base} == base


# What the models compute, against plain statements of it


class Statement:
    """Layers of a module from its state dict alone."""

    def __init__(self, module: nn.Module):
        self.state = module.state_dict()

    def conv(self, name: str, x: torch.Tensor, **window) -> torch.Tensor:
        """Convolution, batch norm with epsilon 1e-3, ReLU."""
        y = F.conv2d(x, self.state[f"{name}.conv.weight"], **window)
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(
            y, *(self.state[f"{name}.bn.{p}"] for p in parts), training=False, eps=1e-3
        ).relu()

    def up(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.state["conv2d.weight"], self.state["conv2d.bias"])
        if "se.fc1.weight" in self.state:
            hidden = F.conv2d(y.mean((2, 3), True), self.state["se.fc1.weight"], self.state["se.fc1.bias"])
            y = y * F.conv2d(hidden.relu(), self.state["se.fc2.weight"], self.state["se.fc2.bias"]).sigmoid()
        return y


def block35_of(module: nn.Module, x: torch.Tensor, scale: float) -> torch.Tensor:
    s = Statement(module)
    zero = s.conv("branch0", x)
    one = s.conv("branch1.1", s.conv("branch1.0", x), padding=1)
    two = s.conv("branch2.2", s.conv("branch2.1", s.conv("branch2.0", x), padding=1), padding=1)
    return F.relu(x + scale * s.up(torch.cat([zero, one, two], 1)))


def block17_of(module: nn.Module, x: torch.Tensor, scale: float) -> torch.Tensor:
    s = Statement(module)
    wide = s.conv("branch1.1", s.conv("branch1.0", x), padding=(0, 3))
    branches = [s.conv("branch0", x), s.conv("branch1.2", wide, padding=(3, 0))]
    return F.relu(x + scale * s.up(torch.cat(branches, 1)))


def block8_of(module: nn.Module, x: torch.Tensor, scale: float, relu: bool = True) -> torch.Tensor:
    s = Statement(module)
    wide = s.conv("branch1.1", s.conv("branch1.0", x), padding=(0, 1))
    branches = [s.conv("branch0", x), s.conv("branch1.2", wide, padding=(1, 0))]
    y = x + scale * s.up(torch.cat(branches, 1))
    return F.relu(y) if relu else y


@pytest.mark.parametrize("name", V1_FIRST)
def test_blocks_compute_what_is_written(name):
    model = built(name)
    first = "repeat_1" if name.endswith("v1") else "repeat"
    second = "repeat_2" if name.endswith("v1") else "repeat_1"
    third = "repeat_3" if name.endswith("v1") else "repeat_2"
    channels = {first: 256, second: 896, third: 1792} if name.endswith("v1") else {
        first: 320, second: 1088, third: 2080}  # fmt: skip
    cases = [(first, block35_of, 0.17), (second, block17_of, 0.10), (third, block8_of, 0.20)]
    with torch.inference_mode():
        for stage, statement, scale in cases:
            block, x = model.get_submodule(stage)[1], image(2, channels[stage], 5, 8).relu()
            torch.testing.assert_close(block(x), statement(block, x, scale), rtol=1e-4, atol=1e-4)
        x = image(2, channels[third], 5, 8).relu()
        want = block8_of(model.block8, x, 1.0, relu=False)
        torch.testing.assert_close(model.block8(x), want, rtol=1e-4, atol=1e-4)
        assert bool((want < 0).any())


@pytest.mark.parametrize("stage, channels", [("mixed_6a", 256), ("mixed_7a", 896)])
def test_reductions_of_v1_compute_what_is_written(stage, channels):
    module, x = built("inception_resnet_v1").get_submodule(stage), image(2, channels, 9, 12).relu()
    s = Statement(module)
    with torch.inference_mode():
        pooled = F.max_pool2d(x, 3, 2)
        if stage == "mixed_6a":
            long = s.conv("branch1.1", s.conv("branch1.0", x), padding=1)
            branches = [s.conv("branch0", x, stride=2), s.conv("branch1.2", long, stride=2)]
        else:
            long = s.conv("branch2.1", s.conv("branch2.0", x), padding=1)
            branches = [s.conv(f"branch{i}.1", s.conv(f"branch{i}.0", x), stride=2) for i in (0, 1)]
            branches.append(s.conv("branch2.2", long, stride=2))
        torch.testing.assert_close(module(x), torch.cat([*branches, pooled], 1), rtol=1e-4, atol=1e-4)


# Heads of v1


def test_the_embedding_has_unit_length_and_its_head_is_what_is_written():
    model, x = built("inception_resnet_v1"), image(3, 3, 80, 96)
    state = model.state_dict()
    with torch.inference_mode():
        embedding = model.forward_modules(x)
        features = model.forward_features(x).mean((2, 3)) @ state["last_linear.weight"].T
        parts = ("running_mean", "running_var", "weight", "bias")
        normed = F.batch_norm(features, *(state[f"last_bn.{p}"] for p in parts), training=False, eps=1e-3)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), normed,
                                   rtol=1e-3, atol=1e-4)  # fmt: skip
    assert embedding.shape == (3, 512) and model.last_linear.bias is None
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embedding, normed / normed.norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_a_classifier_stands_on_the_embedding_before_it_is_normalised():
    model, x = built("inception_resnet_v1", num_classes=4), image(2, 3, 80, 80)
    with torch.inference_mode():
        before = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(model.forward_modules(x), model.logits(before))


def test_the_imagenet_head():
    model, x = built("inception_resnet_v1", head="imagenet", num_classes=4), image(2, 3, 80, 80)
    with torch.inference_mode():
        want = model.last_linear(model.forward_features(x).mean((2, 3)))
        torch.testing.assert_close(model.forward_modules(x), want, rtol=1e-4, atol=1e-4)
    assert model.num_features == 1792 and model.drop_rate == 0.2
    assert model.default_cfg["input_size"] == (3, 299, 299) and model.default_cfg["mean"] == (0.5,) * 3


def test_a_checkpoint_with_people_serves_all_heads():
    state = built("inception_resnet_v1", num_classes=9).state_dict()
    embedding = on_meta("inception_resnet_v1", weights=state)
    assert embedding.num_classes == 0 and "logits.weight" not in embedding.state_dict()
    classifier = on_meta("inception_resnet_v1", classify=True, weights=state)
    assert classifier.num_classes == 9
    assert same(list(classifier.state_dict().values()), list(state.values()))


def test_reset_classifier_changes_between_embedding_and_logits():
    model, x = built("inception_resnet_v1"), image(2, 3, 80, 80)
    model.reset_classifier(3)
    with torch.inference_mode():
        assert model.forward_modules(x).shape == (2, 3)
        model.reset_classifier(0)
        torch.testing.assert_close(model.forward_modules(x).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": "faces"}, "head must be 'embedding' or 'imagenet', got 'faces'"),
        ({"head": "imagenet", "classify": True}, "classify belongs to head='embedding'"),
        ({"classify": True, "num_classes": 0}, "classify=True needs classes"),
        ({"residual_scale": (0.1, 0.2)}, "residual_scale must be one number or three, got 2"),
    ],
)
def test_bad_options_of_v1(options, message):
    with pytest.raises(ValueError, match=message):
        on_meta("inception_resnet_v1", **options)


# Options


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "given, scales", [(None, (0.17, 0.1, 0.2)), (0.3, (0.3, 0.3, 0.3)), ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3))]
)
def test_residual_scale(name, given, scales):
    model = on_meta(name, residual_scale=given)
    stages = (
        ("repeat_1", "repeat_2", "repeat_3") if name.endswith("t_v1") else ("repeat", "repeat_1", "repeat_2")
    )
    assert tuple({b.scale for b in model.get_submodule(stage)} for stage in stages) == tuple(
        {s} for s in scales
    )
    assert model.block8.scale == 1.0


@pytest.mark.parametrize("name", V1_FIRST)
def test_features_only_and_pruning(name):
    x = image(1, 3, 96, 112)
    everything = built(name, features_only=True)
    modules = everything.feature_info.module_name()
    seen = {}
    for module in modules:
        everything.get_submodule(module).register_forward_hook(
            lambda m, i, y, key=module: seen.update({key: y})
        )
    with torch.inference_mode():
        taps = everything.forward_modules(x)
        assert same(taps, [seen[module] for module in modules])
        two = built(name, features_only=True, out_indices=(0, 2))
        two.load_state_dict({k: v for k, v in everything.state_dict().items() if k in two.state_dict()})
        assert same(two.forward_modules(x), [taps[0], taps[2]])
    assert two.num_features == everything.feature_info.channels()[2]
    assert len(two.state_dict()) < len(everything.state_dict()) / 2
    assert not any(k.startswith(("last_", "logits", "classif")) for k in everything.state_dict())


def test_gate_options():
    options = {"se_reduction": 4, "se_bias": False, "se_squeeze": "max", "se_gate": "tanh"}
    found = [m.se for m in on_meta("se_inception_resnet_v2", **options).modules() if hasattr(m, "se")]
    assert len(found) == 40
    for made in found:
        assert made.fc1.out_channels == made.fc1.in_channels // 4 and made.fc1.bias is None
        assert made.squeeze == "max" and isinstance(made.gate, nn.Tanh)


@pytest.mark.parametrize("name", NAMES)
def test_batch_norms(name):
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    usual, changed = on_meta(name), on_meta(name, bn_eps=0.5, bn_momentum=0.0003)
    assert {(m.eps, m.momentum) for m in usual.modules() if isinstance(m, kinds)} == {(1e-3, 0.1)}
    assert {(m.eps, m.momentum) for m in changed.modules() if isinstance(m, kinds)} == {(0.5, 0.0003)}


def test_preprocessing_facts():
    faces, photographs = (on_meta(name).default_cfg for name in NAMES[:2])
    assert (faces["mean"], faces["std"], faces["value_range"]) == ((127.5,) * 3, (128.0,) * 3, 255.0)
    assert (faces["interpolation"], faces["crop_pct"]) == ("area", 1.0)
    assert (photographs["mean"], photographs["std"], photographs["value_range"]) == (
        (0.5,) * 3,
        (0.5,) * 3,
        1,
    )
    assert (photographs["interpolation"], photographs["crop_pct"]) == ("bicubic", 0.8975)


def test_dropout_defaults():
    assert on_meta("inception_resnet_v1").drop_rate == 0.6
    assert on_meta("inception_resnet_v2").drop_rate == 0.0
    assert on_meta("inception_resnet_v1", drop_rate=0.1).drop_rate == 0.1


# What PyTorch does to them


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_export_with_a_dynamic_batch(name):
    model, x = built(name), image(2, 3, 96, 112)
    shapes = ({0: torch.export.Dim("n", min=1, max=16)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(
        exported.module()(image(3, 3, 96, 112)), model.forward_modules(image(3, 3, 96, 112))
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 3}, {"head": "imagenet"}, {"features_only": True}], ids=str
)
def test_jit_script_of_v1(options):
    model, x = built("inception_resnet_v1", **options), image(2, 3, 96, 112)
    assert same(torch.jit.script(model)(x), model.forward_modules(x))

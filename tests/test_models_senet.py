"""SE-ResNet, SE-ResNeXt and SENet-154: sizes, agreement with timm, gates and where they sit."""

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.backbones.layers import SqueezeExcite
from fast_backbones.backbones.senet import SENet
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

BASIC, BOTTLENECK = (64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048)
TABLE = [  # name                   M params, GMACs, taps
    ("legacy_seresnet18", 11.78, 1.81, BASIC),
    ("legacy_seresnet34", 21.96, 3.66, BASIC),
    ("legacy_seresnet50", 28.09, 3.86, BOTTLENECK),
    ("legacy_seresnet101", 49.33, 7.57, BOTTLENECK),
    ("legacy_seresnet152", 66.82, 11.29, BOTTLENECK),
    ("legacy_seresnext26_32x4d", 16.79, 2.47, BOTTLENECK),
    ("legacy_seresnext50_32x4d", 27.56, 4.23, BOTTLENECK),
    ("legacy_seresnext101_32x4d", 48.96, 7.97, BOTTLENECK),
    ("legacy_senet154", 115.09, 20.69, (128, 256, 512, 1024, 2048)),
]
NAMES = [row[0] for row in TABLE]
KINDS = ("basic", "resnet", "resnext", "senet")


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return backbones.create_model(name, **options)


def small(kind: str, layers=(1, 1, 1, 1), **options) -> nn.Module:
    return filled(lambda: SENet(kind, layers, **options))


def millions(model: nn.Module) -> float:
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


# Sizes


@pytest.mark.parametrize("name, params, gmacs, taps", TABLE, ids=NAMES)
def test_sizes_equal_the_published_ones(name, params, gmacs, taps):
    info = backbones.model_info(name)
    assert (round(info.params / 1e6, 2), round(info.gmacs, 2)) == (params, gmacs)
    assert (info.name, info.input_size, info.num_features) == (name, (3, 224, 224), taps[-1])
    assert (info.tap_channels, info.tap_reductions) == (taps, (2, 4, 8, 16, 32))


def test_every_model_is_registered_and_exported_under_both_names():
    assert sorted(NAMES) == sorted(backbones.list_models(family="SENet"))
    for name in NAMES:
        alias = name.removeprefix("legacy_")
        assert getattr(backbones, alias) is getattr(backbones, name)
        assert backbones.model_info(alias).aliases == (alias,)
        assert alias in backbones.__all__ and name in backbones.__all__


@pytest.mark.parametrize(
    "reduction, params", [(2, 45.70), (4, 35.64), (8, 30.60), (16, 28.09), (32, 26.83), (None, 25.56)]
)
def test_sizes_of_the_papers_sweep_over_the_reduction(reduction, params):
    assert millions(on_meta("legacy_seresnet50", se_reduction=reduction)) == params


def test_gates_without_biases_have_the_papers_size():
    assert millions(on_meta("legacy_seresnet50", se_bias=False)) == 28.07


# The same networks as timm's


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_timms(name):
    timm = peer("timm")
    with torch.device("meta"):
        assert described(timm.create_model(name)) == described(backbones.create_model(name))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["legacy_seresnet18", "legacy_seresnet50", "legacy_seresnext26_32x4d"])
def test_seeded_initialisation_is_timms_to_the_bit(name):
    torch.manual_seed(7)
    theirs = peer("timm").create_model(name).state_dict()
    torch.manual_seed(7)
    ours = backbones.create_model(name).state_dict()
    assert [k for k in theirs if not torch.equal(theirs[k], ours[k])] == []


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    [n if "18" in n or "50" in n else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_eval_equals_timm(name):
    theirs, ours = peer("timm").create_model(name), backbones.create_model(name)
    check_same_network(ours, theirs, (3, 3, 75, 106))
    for x in (image(1, 3, 224, 224), image(2, 3, 75, 106)):
        with torch.inference_mode():
            assert torch.equal(ours.forward_modules(x), theirs(x))


@pytest.mark.peer
@pytest.mark.parametrize(
    "name", ["legacy_seresnet18", "legacy_seresnet50", "legacy_seresnext26_32x4d", "legacy_senet154"]
)
def test_training_step_equals_timm(name):
    theirs = peer("timm").create_model(name, num_classes=5, drop_rate=0.2)
    ours = backbones.create_model(name, num_classes=5, drop_rate=0.2)
    check_training_step(ours, theirs, 2, 3, 65, 74, steps=1 if "154" in name else 2)


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, options",
    [
        ("legacy_seresnet18", {"out_indices": (0, 1, 3)}),
        ("legacy_seresnet50", {}),
        ("legacy_seresnext26_32x4d", {"in_chans": 1}),
        ("legacy_senet154", {}),
    ],
    ids=str,
)
def test_features_equal_timms(name, options):
    theirs = trained(peer("timm").create_model(name, features_only=True, **options)).eval()
    ours = backbones.create_model(name, features_only=True, **options).eval()
    state = theirs.state_dict()
    ours.load_state_dict({k: state[k] for k in ours.state_dict()}, strict=True)
    check_same_features(ours, theirs, (2, options.get("in_chans", 3), 75, 106))


# What the blocks compute, against plain statements of it


def conv(state: dict, number: int, x: torch.Tensor, **window) -> torch.Tensor:
    """Convolution and batch norm of that number, without an activation."""
    parts = ("running_mean", "running_var", "weight", "bias")
    numbers = [state[f"bn{number}.{part}"] for part in parts]
    return F.batch_norm(F.conv2d(x, state[f"conv{number}.weight"], **window), *numbers, training=False)


def gated(state: dict, x: torch.Tensor) -> torch.Tensor:
    hidden = F.conv2d(x.mean((2, 3), True), state["se_module.fc1.weight"], state["se_module.fc1.bias"])
    return x * F.conv2d(hidden.relu(), state["se_module.fc2.weight"], state["se_module.fc2.bias"]).sigmoid()


def projected(state: dict, x: torch.Tensor, **window) -> torch.Tensor:
    y = F.conv2d(x, state["downsample.0.weight"], stride=2, **window)
    parts = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(y, *(state[f"downsample.1.{p}"] for p in parts), training=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_computes_what_is_written(kind):
    block = small(kind).layer2[0]
    state, x = block.state_dict(), image(2, 64 if kind == "basic" else 256, 9, 12).relu()
    with torch.inference_mode():
        if kind == "basic":
            y = conv(state, 2, conv(state, 1, x, stride=2, padding=1).relu(), padding=1).relu()
        else:
            first, second = (2, 1) if kind == "resnet" else (1, 2)
            groups = {"resnet": 1, "resnext": 32, "senet": 64}[kind]
            y = conv(state, 1, x, stride=first).relu()
            y = conv(state, 2, y, stride=second, padding=1, groups=groups).relu()
            y = conv(state, 3, y)
        shortcut = projected(state, x, padding=1) if kind == "senet" else projected(state, x)
        torch.testing.assert_close(block(x), F.relu(gated(state, y) + shortcut), rtol=1e-4, atol=1e-4)


def test_widths_of_senet154():
    model = small("senet")
    for number, planes in enumerate((64, 128, 256, 512), start=1):
        block = model.get_submodule(f"layer{number}")[0]
        assert (block.conv1.out_channels, block.conv2.out_channels) == (2 * planes, 4 * planes)
        assert block.downsample[0].kernel_size == ((1, 1) if number == 1 else (3, 3))
    assert [model.layer0.get_submodule(f"conv{i}").out_channels for i in (1, 2, 3)] == [64, 64, 128]


def test_the_stem_pool_rounds_up_without_padding():
    pool = small("basic").pool0
    assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 0, True)


@pytest.mark.parametrize(
    "options, squeeze, gate",
    [
        ({}, lambda x: x.mean((2, 3), True), torch.sigmoid),
        ({"squeeze": "max"}, lambda x: x.amax((2, 3), True), torch.sigmoid),
        ({"gate": "tanh"}, lambda x: x.mean((2, 3), True), torch.tanh),
        ({"gate": "relu"}, lambda x: x.mean((2, 3), True), torch.relu),
        ({"reduction": 2, "bias": False}, lambda x: x.mean((2, 3), True), torch.sigmoid),
    ],
    ids=["usual", "max", "tanh", "relu", "half, no bias"],
)
def test_gate_formula(options, squeeze, gate):
    module, x = SqueezeExcite(32, **options), image(3, 32, 5, 7)
    w1, w2 = module.fc1.weight[:, :, 0, 0], module.fc2.weight[:, :, 0, 0]
    b1, b2 = (0, 0) if module.fc1.bias is None else (module.fc1.bias, module.fc2.bias)
    assert w1.shape == (32 // options.get("reduction", 16), 32)
    hidden = torch.relu(squeeze(x)[:, :, 0, 0] @ w1.T + b1)
    torch.testing.assert_close(module(x), x * gate(hidden @ w2.T + b2)[:, :, None, None])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": 0}, "SE reduction must be at least 1, got 0"),
        ({"squeeze": "sum"}, "SE squeeze must be one of avg, max, got 'sum'"),
        ({"gate": "softmax"}, "SE gate must be one of sigmoid, tanh, relu, got 'softmax'"),
    ],
)
def test_bad_gates(options, message):
    with pytest.raises(ValueError, match=message):
        SqueezeExcite(32, **options)


# Where the gate sits


def parts_of(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return block.branch(x), block.downsample(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["standard", "pre", "identity", "post", "3x3"])
def test_positions_of_the_gate(kind, position):
    if kind == "basic" and position == "3x3":
        with pytest.raises(ValueError, match="se_position='3x3' is defined for bottlenecks"):
            small(kind, se_position=position)
        return
    block = small(kind, se_position=position).layer2[0]
    se, relu, x = block.se_module, torch.relu, image(2, 64 if kind == "basic" else 256, 8, 8).relu()
    with torch.inference_mode():
        branch, shortcut = parts_of(block, x)
        want = {
            "standard": lambda: relu(se(branch) + shortcut),
            "pre": lambda: relu(block.branch(se(x)) + shortcut),
            "identity": lambda: relu(branch + se(shortcut)),
            "post": lambda: se(relu(branch + shortcut)),
            "3x3": lambda: relu(branch + shortcut),
        }[position]()
        assert torch.equal(block(x), want)
        if position == "3x3":
            block.se_module = nn.Identity()
            inner = relu(block.bn2(block.conv2(relu(block.bn1(block.conv1(x))))))
            torch.testing.assert_close(branch, block.bn3(block.conv3(se(inner))))
    assert len([m for m in block.modules() if isinstance(m, SqueezeExcite)]) == (
        0 if position == "3x3" else 1
    )


def test_without_gates_the_position_does_not_matter():
    for position in ("standard", "post", "3x3"):
        model = on_meta("legacy_seresnet50", se_reduction=None, se_position=position)
        assert not any("se_module" in k for k in model.state_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "wide"}, "kind must be 'basic', 'resnet', 'resnext' or 'senet', got 'wide'"),
        (
            {"se_position": "after"},
            "se_position must be one of standard, pre, identity, post, 3x3, got 'after'",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SENet(**{"kind": "basic", "layers": (1, 1, 1, 1), **options})


# Options


@pytest.mark.parametrize("kind", KINDS)
def test_features_only_and_pruning(kind):
    x = image(2, 3, 65, 98)
    everything = small(kind, features_only=True)
    seen = {}
    for module in everything.feature_info.module_name():
        everything.get_submodule(module).register_forward_hook(
            lambda m, i, y, key=module: seen.update({key: y})
        )
    with torch.inference_mode():
        taps = everything.forward_modules(x)
        assert same(taps, list(seen.values())) and all(bool((t >= 0).all()) for t in taps)
        two = small(kind, features_only=True, out_indices=(0, 2))
        two.load_state_dict({k: v for k, v in everything.state_dict().items() if k in two.state_dict()})
        assert same(two.forward_modules(x), [taps[0], taps[2]])
    assert two.num_features == everything.feature_info.channels()[2]
    assert not any(k.startswith(("layer3", "layer4", "last_linear")) for k in two.state_dict())


def test_common_options():
    model = small("resnet", num_classes=0, in_chans=1)
    with torch.inference_mode():
        assert model(image(2, 1, 64, 64)).shape == (2, 2048)
        model.reset_classifier(4)
        x = model.forward_features(image(2, 1, 64, 64))
        assert model.forward_head(x).shape == (2, 4) and model.forward_head(x, pre_logits=True).shape == (
            2,
            2048,
        )
    assert model.get_classifier() is model.last_linear
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 1


@pytest.mark.parametrize("kind", ["basic", "resnext"])
def test_zero_init_residual(kind):
    model = SENet(kind, (1, 1, 1, 1), zero_init_residual=True)
    last = "bn2" if kind == "basic" else "bn3"
    norms = [b.get_submodule(last) for i in range(1, 5) for b in model.get_submodule(f"layer{i}")]
    assert len(norms) == 4 and all(bool((norm.weight == 0).all()) for norm in norms)


def test_preprocessing_facts_and_dropout():
    for name in NAMES:
        model = on_meta(name)
        bicubic = name in ("legacy_seresnet18", "legacy_seresnext26_32x4d")
        assert model.default_cfg["interpolation"] == ("bicubic" if bicubic else "bilinear")
        assert model.default_cfg["crop_pct"] == 0.875
        assert model.drop_rate == (0.2 if name == "legacy_senet154" else 0.0)


# What PyTorch does to them


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_agrees(kind):
    model, x = small(kind, num_classes=40), image(2, 3, 65, 98)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model.forward_modules(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["basic", "senet"])
def test_export_with_a_dynamic_batch(kind):
    model, x = small(kind, num_classes=5), image(2, 3, 65, 74)
    shapes = ({0: torch.export.Dim("n", min=1, max=16)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(
        exported.module()(image(3, 3, 65, 74)), model.forward_modules(image(3, 3, 65, 74))
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["standard", "pre", "identity", "post"])
def test_jit_script(kind, position):
    model = small(kind, num_classes=5, se_position=position)
    assert same(torch.jit.script(model)(image(2)), model.forward_modules(image(2)))

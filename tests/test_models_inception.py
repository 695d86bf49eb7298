"""GoogLeNet, BN-Inception, Inception v3 and v4 and their SE forms: sizes, agreement with the public networks,
auxiliary heads, options."""

import importlib

import pytest
import torch
from inception_keys import bninception_keys, inception_v3_gates, plain_googlenet_keys
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

from fast_backbones import backbones, backend

GOOGLE, BN = (64, 192, 480, 832, 1024), (64, 192, 320, 608, 1024)
V3, V4 = (64, 192, 288, 768, 2048), (64, 160, 384, 1024, 1536)
TABLE = [  # name            M params, with auxiliary heads, GMACs, taps, image
    ("googlenet", 6.62, 13.00, 1.50, GOOGLE, 224),
    ("googlenet_2014", 7.00, 13.38, 1.58, GOOGLE, 224),
    ("se_googlenet", 7.11, 13.48, 1.50, GOOGLE, 224),
    ("bninception", 11.30, None, 2.03, BN, 224),
    ("se_bninception", 11.93, None, 2.03, BN, 224),
    ("inception_v3", 23.83, 27.16, 5.71, V3, 299),
    ("se_inception_v3", 25.50, 28.82, 5.71, V3, 299),
    ("inception_v4", 42.68, None, 12.25, V4, 299),
]
NAMES = [row[0] for row in TABLE]
HEADS = {"googlenet": 2, "googlenet_2014": 2, "se_googlenet": 2, "inception_v3": 1, "se_inception_v3": 1}
SWEEP = [n if n in ("googlenet", "bninception") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
WITH_HEADS = [n if n == "googlenet" else pytest.param(n, marks=pytest.mark.slow) for n in HEADS]
SMALL = {"inception_v3": 80, "se_inception_v3": 80, "inception_v4": 80}  # smallest sensible image, else 64


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def small_image(name: str, n: int = 1, seed: int = 0) -> torch.Tensor:
    size = SMALL.get(name, 64)
    return image(n, 3, size, size + 32, seed)


def built(name: str, **options) -> nn.Module:
    return filled(lambda: backbones.create_model(name, **options))


def torchvisions(name: str, **options) -> nn.Module:
    return getattr(peer("torchvision").models, name)(init_weights=True, **options)


# Sizes


@pytest.mark.parametrize("name, params, with_heads, gmacs, taps, size", TABLE, ids=NAMES)
def test_sizes_equal_the_published_ones(name, params, with_heads, gmacs, taps, size):
    info = backbones.model_info(name)
    assert round(info.params / 1e6, 2) == (with_heads or params)
    assert round(info.gmacs, 2) == gmacs
    assert (info.name, info.input_size, info.num_features) == (name, (3, size, size), taps[-1])
    assert (info.tap_channels, info.tap_reductions) == (taps, (2, 4, 8, 16, 32))
    assert info.family in ("Inception", "SE-Inception") and info.paper.startswith("arXiv")
    if with_heads:
        with torch.device("meta"):
            assert round(millions(backbones.create_model(name, aux_logits=False)), 2) == params


def test_every_model_of_the_table_is_registered_and_exported():
    others = ["se_inception_resnet_v2"]
    families = [*backbones.list_models(family="Inception"), *backbones.list_models(family="SE-Inception")]
    assert sorted([*NAMES, *others]) == sorted(families)
    for name in (*NAMES, "inception_v1", "inception_v2", "bn_inception", "se_inception"):
        assert callable(getattr(backbones, name)) and name in backbones.__all__


@pytest.mark.parametrize(
    "alias, name",
    [
        ("inception_v1", "googlenet"),
        ("inception_v2", "bninception"),
        ("bn_inception", "bninception"),
        ("se_inception", "se_bninception"),
    ],
)
def test_aliases(alias, name):
    assert getattr(backbones, alias) is getattr(backbones, name)
    assert backbones.model_info(alias).name == name


# The same networks as torchvision's and timm's


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, different", [("googlenet", []), ("inception_v3", ["AuxLogits.conv1.conv.weight"])]
)
def test_seeded_initialisation_is_torchvisions_to_the_bit(name, different):
    """torchvision puts the 0.01 of v3's second auxiliary convolution where nothing reads it."""
    torch.manual_seed(7)
    theirs = torchvisions(name)
    torch.manual_seed(7)
    ours = backbones.create_model(name)
    assert described(theirs) == described(ours)
    states = theirs.state_dict(), ours.state_dict()
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == different
    for key in different:
        assert abs(states[1][key].std() - 0.01) < 1e-3


@pytest.mark.peer
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_state_dict_without_heads_is_torchvisions(name):
    theirs = torchvisions(name, aux_logits=False)
    with torch.device("meta"):
        ours = backbones.create_model(name, aux_logits=False)
    assert described(theirs) == described(ours)


@pytest.mark.peer
@pytest.mark.parametrize("transform_input", [False, True], ids=["plain input", "transformed input"])
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_eval_equals_torchvision(name, transform_input):
    theirs = torchvisions(name, transform_input=transform_input)
    ours = backbones.create_model(name, transform_input=transform_input)
    size = backbones.model_info(name).input_size[-1]
    shapes = [(1, 3, size, size)] if transform_input else [(3, 3, 97, 130), (1, 3, size, size)]
    check_same_network(ours, theirs, *shapes)
    x = image(1, 3, 97, 130)
    with torch.inference_mode():
        assert torch.equal(ours.forward_modules(x), theirs(x))


@pytest.mark.peer
@pytest.mark.parametrize("name, size", [("googlenet", 224), ("inception_v3", 299)])
def test_training_output_and_gradients_equal_torchvision(name, size):
    """Logits, auxiliary logits, gradients and running statistics, bit for bit, dropout included."""
    theirs = torchvisions(name, num_classes=5)
    ours = backbones.create_model(name, num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        with backend("reference"):
            outputs.append(model.train()(image(2, 3, size, size)))
        sum(logits.square().sum() for logits in outputs[-1]).backward()
    assert outputs[0]._fields == outputs[1]._fields
    assert same(list(outputs[0]), list(outputs[1]))
    for (name_a, a), (name_b, b) in zip(theirs.named_parameters(), ours.named_parameters()):
        assert name_a == name_b and torch.equal(a.grad, b.grad)
    assert [k for k, v in theirs.state_dict().items() if not torch.equal(v, ours.state_dict()[k])] == []


@pytest.mark.peer
@pytest.mark.parametrize("name", ["inception_v3", "inception_v4"])
def test_state_dict_and_eval_equal_timm(name):
    options = {"aux_logits": False} if name == "inception_v3" else {}
    theirs = peer("timm").create_model(name)
    ours = backbones.create_model(name, **options)
    check_same_network(ours, theirs, (2, 3, 97, 130))
    x = image(1, 3, 299, 299)
    with torch.inference_mode():
        assert torch.equal(ours.forward_modules(x), theirs(x))


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, options",
    [
        ("inception_v3", {"out_indices": (0, 1, 3)}),
        ("inception_v3", {"in_chans": 1}),
        ("inception_v4", {}),
        *(
            pytest.param(name, options, marks=pytest.mark.slow)
            for name, options in [
                ("inception_v3", {}),
                ("inception_v4", {"out_indices": (0, 1, 3)}),
                ("inception_v4", {"in_chans": 1}),
            ]
        ),
    ],
    ids=str,
)
def test_features_equal_timms(name, options):
    theirs = trained(peer("timm").create_model(name, features_only=True, **options)).eval()
    ours = backbones.create_model(name, features_only=True, **options).eval()
    wanted = {k.replace("features_", "features."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict({k: v for k, v in wanted.items() if k in ours.state_dict()}, strict=True)
    check_same_features(ours, theirs, (2, options.get("in_chans", 3), 97, 130))


@pytest.mark.peer
def test_training_step_of_inception_v4_equals_timm():
    theirs = peer("timm").create_model("inception_v4", num_classes=5)
    check_training_step(backbones.inception_v4(num_classes=5), theirs, 2, 3, 107, 107, steps=1)


@pytest.mark.peer
def test_timm_reads_our_preprocessing_facts():
    data = importlib.import_module(f"{peer('timm').__name__}.data")
    with torch.device("meta"):
        ours = data.resolve_model_data_config(backbones.inception_v4())
    facts = ours["input_size"], ours["interpolation"], ours["crop_pct"], ours["mean"], ours["std"]
    assert facts == ((3, 299, 299), "bicubic", 0.875, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# Layouts without a public peer here: a plain list of names and shapes


@pytest.mark.parametrize(
    "name, biased, gated", [("bninception", True, False), ("se_bninception", False, True)]
)
def test_names_and_shapes_of_bninception(name, biased, gated):
    with torch.device("meta"):
        model = backbones.create_model(name)
    assert [(k, s) for k, s, _ in described(model)] == bninception_keys(biased, gated)


def test_names_and_shapes_of_googlenet_2014():
    with torch.device("meta"):
        model = backbones.googlenet_2014()
    assert [(k, s) for k, s, _ in described(model)] == plain_googlenet_keys()


def test_gates_of_se_googlenet_are_all_it_adds():
    with torch.device("meta"):
        gated, plain = backbones.se_googlenet(), backbones.googlenet()
    outputs = {
        "3a": 256,
        "3b": 480,
        "4a": 512,
        "4b": 512,
        "4c": 512,
        "4d": 528,
        "4e": 832,
        "5a": 832,
        "5b": 1024,
    }
    want = {}
    for name, channels in outputs.items():
        want[f"inception{name}.se.fc1.weight"] = (channels // 16, channels, 1, 1)
        want[f"inception{name}.se.fc1.bias"] = (channels // 16,)
        want[f"inception{name}.se.fc2.weight"] = (channels, channels // 16, 1, 1)
        want[f"inception{name}.se.fc2.bias"] = (channels,)
    check_added(gated, plain, want)


def test_gates_of_se_inception_v3_are_all_it_adds():
    with torch.device("meta"):
        gated, plain = backbones.se_inception_v3(), backbones.inception_v3()
    check_added(gated, plain, inception_v3_gates())


def check_added(gated: nn.Module, plain: nn.Module, want: dict) -> None:
    ours, base = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (gated, plain))
    assert {k: s for k, s in ours.items() if k not in base} == want
    assert {k: s for k, s in ours.items() if k in base} == base


# What the models compute, against plain statements of it


def statement_of_googlenet_module(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """concat[1x1 | 1x1, k x k | 1x1, k x k | 3x3 max pool, 1x1] from the state dict alone."""
    state = module.state_dict()

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = state[f"{name}.conv.weight"]
        y = nn.functional.conv2d(x, weight, state.get(f"{name}.conv.bias"), padding=weight.shape[-1] // 2)
        if f"{name}.bn.weight" in state:
            bn = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            y = nn.functional.batch_norm(y, *bn, training=False, eps=1e-3)
        return y.relu()

    pooled = nn.functional.max_pool2d(x, 3, 1, 1)
    branches = [conv("branch1", x), conv("branch2.1", conv("branch2.0", x))]
    branches += [conv("branch3.1", conv("branch3.0", x)), conv("branch4.1", pooled)]
    y = torch.cat(branches, 1)
    if "se.fc1.weight" in state:
        hidden = (state["se.fc1.weight"][:, :, 0, 0] @ y.mean((2, 3)).T).T + state["se.fc1.bias"]
        gate = (state["se.fc2.weight"][:, :, 0, 0] @ hidden.relu().T).T + state["se.fc2.bias"]
        y = y * torch.sigmoid(gate)[:, :, None, None]
    return y


@pytest.mark.parametrize("name", ["googlenet", "googlenet_2014", "se_googlenet"])
def test_a_googlenet_module_computes_what_is_written(name):
    model = built(name, aux_logits=False)
    x = image(2, 192, 9, 11).relu()
    with torch.inference_mode():
        want = statement_of_googlenet_module(model.inception3a, x)
        torch.testing.assert_close(model.inception3a(x), want, rtol=1e-4, atol=1e-4)
    third = model.inception3a.branch3[1].conv.kernel_size
    assert third == ((5, 5) if name == "googlenet_2014" else (3, 3))


def test_googlenet_2014_pools_and_normalises_as_the_paper():
    model = built("googlenet_2014")
    names = [name for name in model.stages if not name.startswith("inception")]
    assert names == [
        "conv1",
        "maxpool1",
        "lrn1",
        "conv2",
        "conv3",
        "lrn2",
        "maxpool2",
        "maxpool3",
        "maxpool4",
    ]
    for number in (1, 2, 3, 4):
        pool = model.get_submodule(f"maxpool{number}")
        assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 0, True)
    lrn = model.lrn1
    assert (lrn.size, lrn.alpha, lrn.beta, lrn.k) == (5, 1e-4, 0.75, 1.0)
    assert (model.aux1.pool.kernel_size, model.aux1.pool.stride) == (5, 3)


@pytest.mark.parametrize("name", ["3a", "3c", "5b"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_bninception_module_computes_what_is_written(name, gated):
    model = built("se_bninception" if gated else "bninception")
    state = {k.split(f"inception_{name}_", 1)[1]: v for k, v in model.state_dict().items() if name in k}

    def conv(part: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight, bn = state[f"{part}.weight"], f"{part}_bn."
        y = nn.functional.conv2d(x, weight, state.get(f"{part}.bias"), stride, weight.shape[-1] // 2)
        numbers = [state[bn + k] for k in ("running_mean", "running_var", "weight", "bias")]
        return nn.functional.batch_norm(y, *numbers, training=False, eps=1e-5).relu()

    x = image(2, {"3a": 192, "3c": 320, "5b": 1024}[name], 8, 12).relu()
    stride = 2 if name == "3c" else 1
    with torch.inference_mode():
        three = conv("3x3", conv("3x3_reduce", x), stride)
        double = conv("double_3x3_2", conv("double_3x3_1", conv("double_3x3_reduce", x)), stride)
        if name == "3c":
            y = torch.cat([three, double, nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)], 1)
        else:
            average = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=True)
            pooled = nn.functional.max_pool2d(x, 3, 1, 1) if name == "5b" else average
            y = torch.cat([conv("1x1", x), three, double, conv("pool_proj", pooled)], 1)
        if gated:
            hidden = nn.functional.conv2d(y.mean((2, 3), True), state["se.fc1.weight"], state["se.fc1.bias"])
            y = (
                y
                * nn.functional.conv2d(hidden.relu(), state["se.fc2.weight"], state["se.fc2.bias"]).sigmoid()
            )
        torch.testing.assert_close(model.inception(f"inception_{name}", x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_gates_of_se_inception_v3_sit_behind_the_concatenation():
    model = built("se_inception_v3", aux_logits=False)
    for name, size in (
        ("Mixed_5b", 192),
        ("Mixed_6a", 288),
        ("Mixed_6b", 768),
        ("Mixed_7a", 768),
        ("Mixed_7b", 1280),
    ):
        module, x = model.get_submodule(name), image(1, size, 17, 17).relu()
        gate, module.se = module.se, nn.Identity()
        with torch.inference_mode():
            y = module(x)
            module.se = gate
            assert torch.equal(module(x), gate(y))


# Auxiliary heads


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_run_in_training_only(name):
    model = built(name, num_classes=3)
    size = backbones.model_info(name).input_size[-1]
    calls = []
    for head in set(model.auxiliary_heads.values()):
        model.get_submodule(head).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        output = model.train()(image(2, 3, size, size))
    assert isinstance(output, tuple) and all(logits.shape == (2, 3) for logits in output)
    assert len(calls) == len(output) - 1 == HEADS[name]
    assert output._fields[0] == "logits"
    with torch.inference_mode():
        assert model.eval().forward_modules(small_image(name)).shape == (1, 3)
    assert len(calls) == HEADS[name]


def test_googlenets_deeper_head_comes_first():
    model = built("googlenet", num_classes=2).train()
    for head, value in ((model.aux1, 1.0), (model.aux2, 2.0)):
        nn.init.zeros_(head.fc2.weight)
        nn.init.constant_(head.fc2.bias, value)
    with torch.no_grad():
        output = model(image(2, 3, 64, 64))
    assert bool((output.aux_logits1 == 1).all()) and bool((output.aux_logits2 == 2).all())


@pytest.mark.parametrize(
    "options", [{"aux_logits": False}, {"num_classes": 0}, {"features_only": True}], ids=str
)
@pytest.mark.parametrize("name", WITH_HEADS)
def test_models_without_heads_load_checkpoints_that_have_them(name, options):
    with torch.device("meta"):
        full = backbones.create_model(name)
    state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in full.state_dict().items()}
    model = built(name, **options)
    assert not model.aux_logits and not any("aux" in k.lower() for k in model.state_dict())
    backbones.load_weights(model, state)
    with torch.no_grad():
        output = model.train()(small_image(name, 2))
    assert isinstance(output, list if "features_only" in options else torch.Tensor)


@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_another_number_of_classes_goes_to_the_heads_too(name):
    state = built(name, num_classes=4).state_dict()
    with torch.device("meta"):
        adopted = backbones.create_model(name, weights=state)
    assert adopted.num_classes == 4 and same(list(adopted.state_dict().values()), list(state.values()))
    kept = built(name, num_classes=6)
    backbones.load_weights(kept, state)
    for head in (kept.default_cfg["classifier"], *kept.auxiliary_classifiers):
        assert kept.get_submodule(head).weight.shape[0] == 6
    kept.reset_classifier(2)
    size = 75 if name == "inception_v3" else 64
    with torch.no_grad():
        if name == "googlenet":
            assert {logits.shape for logits in kept.train()(image(2, 3, size, size))} == {(2, 2)}
        kept.reset_classifier(0)
        assert kept.train()(image(2, 3, size, size)).shape == (2, kept.num_features)


def test_heads_of_the_paper_say_which_images_they_need():
    model = built("googlenet_2014", num_classes=2).train()
    with pytest.raises(ValueError, match=r"made for 224x224 images .*feature map has 2x2 pixels, not 4x4"):
        model(image(2, 3, 160, 160))


# Options


@pytest.mark.parametrize("name", SWEEP)
def test_features_only_and_pruning(name):
    x = small_image(name)
    everything = built(name, features_only=True)
    with torch.inference_mode():
        taps = everything.forward_modules(x)
        assert [t.shape[1] for t in taps] == everything.feature_info.channels()
        assert all(bool((t >= 0).all()) for t in taps)
        two = built(name, features_only=True, out_indices=(0, 2))
        two.load_state_dict({k: v for k, v in everything.state_dict().items() if k in two.state_dict()})
        assert same(two.forward_modules(x), [taps[0], taps[2]])
    assert two.num_features == everything.feature_info.channels()[2]
    assert millions(two) < millions(everything) / 2
    assert not any(k.startswith(two.default_cfg["classifier"]) for k in two.state_dict())


@pytest.mark.parametrize("name", SWEEP)
def test_common_options(name):
    model = built(name, num_classes=0, in_chans=1)
    size = SMALL.get(name, 64)
    with torch.inference_mode():
        pooled = model.forward_modules(image(1, 1, size, size))
        assert pooled.shape == (1, model.num_features)
        assert torch.equal(model.forward_head(model.forward_features(image(1, 1, size, size))), pooled)
    model.reset_classifier(4)
    assert model.get_classifier().out_features == 4
    assert model.default_cfg["input_size"][0] == 1
    first = model.get_submodule(model.default_cfg["first_conv"])
    assert isinstance(first, nn.Conv2d) and first.in_channels == 1


@pytest.mark.parametrize("name", SWEEP)
def test_taps_are_the_outputs_of_the_modules_named(name):
    model = built(name, features_only=True)
    seen = {}
    for module in model.feature_info.module_name():
        model.get_submodule(module).register_forward_hook(lambda m, i, y, key=module: seen.update({key: y}))
    with torch.inference_mode():
        taps = model.forward_modules(small_image(name))
    assert same(taps, [seen[module] for module in model.feature_info.module_name()])


@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_transform_input_changes_one_normalisation_into_the_other(name):
    model = built(name, aux_logits=False)
    raw = torch.rand(1, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        want = model.forward_modules((raw - 0.5) / 0.5)
        model.transform_input = True
        torch.testing.assert_close(model.forward_modules((raw - mean) / std), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="transform_input"):
        backbones.create_model(name, transform_input=True, in_chans=1)


@pytest.mark.parametrize(
    "options, size, reductions",
    [
        ({}, 299, [2, 4, 8, 16, 32]),
        ({"input_stride": 1}, 151, [1, 2, 4, 8, 16]),
        ({"input_stride": 1, "stem_pool": False}, 79, [1, 1, 2, 4, 8]),
    ],
    ids=["299", "151", "79"],
)
def test_low_resolution_inception_v3_has_equal_maps(options, size, reductions):
    with torch.device("meta"):
        model = backbones.inception_v3(features_only=True, **options).eval()
        taps = model(torch.empty(1, 3, *model.default_cfg["input_size"][1:]))
    assert model.default_cfg["input_size"] == (3, size, size)
    assert model.feature_info.reduction() == reductions
    assert [t.shape[-1] for t in taps][2:] == ([36, 17, 8] if size == 79 else [35, 17, 8])


def test_input_stride_is_checked():
    with pytest.raises(ValueError, match="input_stride must be 1 or 2, got 3"):
        backbones.inception_v3(input_stride=3)


@pytest.mark.parametrize("name", ["googlenet", "bninception", "inception_v3", "inception_v4"])
def test_batch_norm_options(name):
    with torch.device("meta"):
        model = backbones.create_model(name, bn_momentum=0.0003, bn_eps=0.5)
        usual = backbones.create_model(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((m.eps, m.momentum) == (0.5, 0.0003) for m in norms)
    eps = 1e-5 if name == "bninception" else 1e-3
    assert {(m.eps, m.momentum) for m in usual.modules() if isinstance(m, nn.BatchNorm2d)} == {(eps, 0.1)}


@pytest.mark.parametrize("name", ["se_googlenet", "se_bninception", "se_inception_v3"])
def test_gate_options(name):
    with torch.device("meta"):
        model = backbones.create_model(name, se_reduction=4, se_bias=False, se_squeeze="max", se_gate="tanh")
    found = [m for m in model.modules() if type(m).__name__ == "SqueezeExcite"]
    assert len(found) == {"se_googlenet": 9, "se_bninception": 10, "se_inception_v3": 11}[name]
    for gate in found:
        assert gate.fc1.out_channels == gate.fc1.in_channels // 4 and gate.fc1.bias is None
        assert gate.squeeze == "max" and isinstance(gate.gate, nn.Tanh)


def test_dropout_defaults():
    rates = {
        "googlenet": 0.2,
        "googlenet_2014": 0.4,
        "inception_v3": 0.5,
        "inception_v4": 0,
        "bninception": 0,
    }
    with torch.device("meta"):
        for name, rate in rates.items():
            assert backbones.create_model(name).drop_rate == rate
            assert backbones.create_model(name, drop_rate=0.7).drop_rate == 0.7


@pytest.mark.parametrize(
    "name, mean, order, value_range",
    [
        ("bninception", (104, 117, 128), "bgr", 255),
        ("se_bninception", (104, 117, 123), "bgr", 255),
        ("googlenet_2014", (104, 117, 123), "bgr", 255),
        ("googlenet", (0.485, 0.456, 0.406), "rgb", 1),
        ("inception_v4", (0.5, 0.5, 0.5), "rgb", 1),
    ],
)
def test_preprocessing_facts(name, mean, order, value_range):
    with torch.device("meta"):
        cfg = backbones.create_model(name).default_cfg
    assert (cfg["mean"], cfg["channel_order"], cfg["value_range"]) == (mean, order, value_range)
    assert order == "rgb" or cfg["std"] == (1, 1, 1)


# What PyTorch does to them


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_export_with_a_dynamic_batch(name):
    model, x = built(name, num_classes=5), small_image(name, 2)
    shapes = ({0: torch.export.Dim("n", min=1, max=16)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    got = exported.module()(small_image(name, 3))
    torch.testing.assert_close(got, model.forward_modules(small_image(name, 3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "se_googlenet", "inception_v3", "inception_v4"])
def test_jit_script(name):
    for options in ({"num_classes": 5}, {"features_only": True}):
        model = built(name, **options)
        assert same(torch.jit.script(model)(small_image(name)), model.forward_modules(small_image(name)))

"""The models: sizes, agreement with torchvision and timm, options, and what PyTorch does to them."""

import copy
import importlib
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from model_checks import described, image, peer, same, trained
from torch import nn

import fast_backbones as fb
from fast_backbones import backbones
from fast_backbones.backbones import _base, _registry, resnet

BASIC, BOTTLENECK = (64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048)
TABLE = [  # name                M params  GMACs  taps
    ("resnet18", 11.69, 1.81, BASIC),
    ("resnet34", 21.80, 3.66, BASIC),
    ("resnet50", 25.56, 4.09, BOTTLENECK),
    ("resnet101", 44.55, 7.80, BOTTLENECK),
    ("resnet152", 60.19, 11.51, BOTTLENECK),
    ("resnext50_32x4d", 25.03, 4.23, BOTTLENECK),
    ("resnext50_2x40d", 25.43, 4.12, BOTTLENECK),
    ("resnext50_4x24d", 25.29, 4.16, BOTTLENECK),
    ("resnext50_8x14d", 25.60, 4.27, BOTTLENECK),
    ("resnext101_32x4d", 44.18, 7.97, BOTTLENECK),
    ("resnext101_32x8d", 88.79, 16.41, BOTTLENECK),
    ("resnext101_64x4d", 83.46, 15.46, BOTTLENECK),
    ("resnext101_2x40d", 44.46, 7.84, BOTTLENECK),
    ("resnext101_4x24d", 44.36, 7.89, BOTTLENECK),
    ("resnext101_8x14d", 45.10, 8.08, BOTTLENECK),
    ("resnext101_2x64d", 84.20, 15.12, BOTTLENECK),
]
NAMES = [row[0] for row in TABLE]
TORCHVISION = [n for n in NAMES if n.startswith("resnet")]
TORCHVISION += ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
TIMM = [*TORCHVISION, "resnext101_32x4d"]
SWEEP = [(n, int(n.split("_")[1].split("x")[0]), int(n.split("x")[-1][:-1])) for n in NAMES if "_" in n]


@pytest.fixture
def no_engine(monkeypatch):
    """A model that calls the engine in this test fails."""

    def refuse(model, x, plain):
        raise AssertionError("the engine was called while the model was being traced")

    monkeypatch.setattr(_base.engine, "forward", refuse)


# The registry


@pytest.mark.parametrize("name, params, gmacs, taps", TABLE, ids=NAMES)
def test_sizes_equal_the_published_ones(name, params, gmacs, taps):
    info = backbones.model_info(name)
    assert round(info.params / 1e6, 2) == params
    assert abs(info.gmacs - gmacs) < 0.0051  # the table is rounded to 0.01
    assert (info.name, info.input_size, info.num_features) == (name, (3, 224, 224), taps[-1])
    assert (info.tap_channels, info.tap_reductions) == (taps, (2, 4, 8, 16, 32))
    assert info.family in ("ResNet", "ResNeXt") and info.paper.startswith("arXiv") and info.compatible_with


def test_every_model_of_the_table_is_registered_and_exported():
    listed = backbones.list_models(family="ResNet") + backbones.list_models(family="ResNeXt")
    assert sorted(NAMES) == sorted(listed)
    for name in (*NAMES, "resnext50", "resnext101"):
        assert callable(getattr(backbones, name)) and name in backbones.__all__


def test_aliases():
    assert backbones.resnext50 is backbones.resnext50_32x4d
    assert backbones.resnext101 is backbones.resnext101_32x8d
    assert backbones.model_info("resnext50").name == "resnext50_32x4d"
    assert backbones.model_info("resnext101").aliases == ("resnext101",)
    with torch.device("meta"):
        assert backbones.create_model("resnext50").default_cfg["architecture"] == "resnext50_32x4d"


def test_list_models_is_a_filter_in_natural_order():
    assert backbones.list_models("resnet*") == ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert backbones.list_models("*50_*x4d") == ["legacy_seresnext50_32x4d", "resnext50_32x4d"]
    assert backbones.list_models("resnext50") == ["resnext50"]  # an alias, since no name matches
    assert backbones.list_models("vit*") == []
    assert len(backbones.list_models(family="ResNeXt")) == 11


@pytest.mark.parametrize("asked, close", [("resnet5", "resnet50"), ("resnext50-32x4d", "resnext50_32x4d")])
def test_unknown_names_raise_with_close_ones(asked, close):
    for call in (backbones.create_model, backbones.model_info):
        with pytest.raises(ValueError, match=f"{asked}.*did you mean.*{close}"):
            call(asked)
    with pytest.raises(ValueError, match="list_models"):
        backbones.create_model("zzz")


def test_register_model(monkeypatch):
    monkeypatch.setattr(_registry, "_entries", dict(_registry._entries))
    monkeypatch.setattr(_registry, "_aliases", dict(_registry._aliases))

    @backbones.register_model
    def tiny(**options):
        return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), **options)

    assert backbones.create_model("tiny", num_classes=3)(image(1)).shape == (1, 3)
    assert backbones.model_info("tiny").family == "custom"
    assert "tiny" in backbones.list_models("t*")
    assert backbones.register_model(tiny) is tiny  # again: the same function
    for taken in ("resnet18", "resnext50"):

        def other(**options):
            return tiny(**options)

        other.__name__ = taken
        with pytest.raises(ValueError, match=taken):
            backbones.register_model(other)
    with pytest.raises(ValueError, match="resnet34"):
        backbones.register_model(aliases=("resnet34",))(lambda: None)


def test_model_info_draws_no_random_numbers_and_keeps_no_memory():
    _registry._measure.cache_clear()
    before = torch.random.get_rng_state()
    info = backbones.model_info("resnet18")
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(not isinstance(v, torch.Tensor) for v in vars(info).values())


# The same network as torchvision's and timm's


@pytest.mark.peer
@pytest.mark.parametrize("name", TORCHVISION)
def test_state_dict_is_torchvisions(name):
    models = peer("torchvision").models
    with torch.device("meta"):
        assert described(getattr(models, name)()) == described(backbones.create_model(name))


@pytest.mark.peer
@pytest.mark.parametrize("name, cardinality, width", SWEEP, ids=[row[0] for row in SWEEP])
def test_state_dict_of_the_sweep_is_that_of_torchvisions_class(name, cardinality, width):
    from_class = peer("torchvision").models.resnet
    layers = [3, 4, 6, 3] if "50" in name else [3, 4, 23, 3]
    with torch.device("meta"):
        theirs = from_class.ResNet(from_class.Bottleneck, layers, groups=cardinality, width_per_group=width)
        assert described(theirs) == described(backbones.create_model(name))


@pytest.mark.peer
@pytest.mark.parametrize("name", TIMM)
def test_state_dict_is_timms(name):
    timm = peer("timm")
    with torch.device("meta"):
        assert described(timm.create_model(name)) == described(backbones.create_model(name))


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, options",
    [("resnet18", {}), ("resnet50", {"zero_init_residual": True}), ("resnext50_32x4d", {}), ("resnet34", {})],
    ids=["basic", "zero-init bottleneck", "grouped", "deeper basic"],
)
def test_seeded_initialisation_is_torchvisions_to_the_bit(name, options):
    models = peer("torchvision").models
    torch.manual_seed(7)
    theirs = getattr(models, name)(**options).state_dict()
    torch.manual_seed(7)
    ours = backbones.create_model(name, **options).state_dict()
    assert list(theirs) == list(ours)
    assert [k for k in theirs if not torch.equal(theirs[k], ours[k])] == []


@pytest.mark.peer
@pytest.mark.parametrize("size", [(2, 64, 64), (3, 65, 97)], ids=["even", "odd, batch 3"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_eval_equals_torchvision(name, size):
    n, h, w = size
    theirs = trained(getattr(peer("torchvision").models, name)()).eval()
    ours = backbones.create_model(name).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = image(n, 3, h, w)
    with torch.inference_mode():
        plain = theirs(x)
        assert torch.equal(ours.forward_modules(x), plain)
        assert_as_accurate(ours(x), plain, copy.deepcopy(theirs).double()(x.double()))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_training_step_equals_torchvision(name):
    """Logits, gradients and running statistics of two steps of SGD, bit for bit."""
    theirs = getattr(peer("torchvision").models, name)(num_classes=5).train()
    ours = backbones.create_model(name, num_classes=5).train()
    ours.load_state_dict(theirs.state_dict())
    for step in range(2):
        for model in (theirs, ours):
            sgd = torch.optim.SGD(model.parameters(), lr=0.01)
            with fb.backend("reference"):
                loss = F.cross_entropy(model(image(4, seed=step)), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            sgd.step()
            sgd.zero_grad()
    assert [k for k, v in theirs.state_dict().items() if not torch.equal(v, ours.state_dict()[k])] == []


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet50", {}),
        ("resnext50_32x4d", {"out_indices": (1, 2, 3, 4)}),
        ("resnet18", {"out_indices": (-1, -3)}),
        ("resnet18", {"out_indices": 2}),
        ("resnet18", {"in_chans": 1}),
        ("resnet18", {"output_stride": 8}),
        ("resnet50", {"output_stride": 16}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={o}" for k, o in v.items()) or "all taps",
)
def test_features_equal_timms(name, options):
    theirs = trained(peer("timm").create_model(name, features_only=True, **options)).eval()
    ours = backbones.create_model(name, features_only=True, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    info, timms = ours.feature_info, theirs.feature_info
    assert (info.channels(), info.reduction()) == (sorted(timms.channels()), sorted(timms.reduction()))
    x = image(2, options.get("in_chans", 3), 64, 97)
    with torch.inference_mode():
        plain = theirs(x)
        assert same(ours.forward_modules(x), plain)
        exact = copy.deepcopy(theirs).double()(x.double())
        for fast, slow, true in zip(ours(x), plain, exact):
            assert_as_accurate(fast, slow, true)


@pytest.mark.peer
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_equals_torchvision(output_stride):
    theirs = peer("torchvision").models.resnet50(
        replace_stride_with_dilation=[False, output_stride == 8, True]
    )
    ours = backbones.resnet50(output_stride=output_stride)
    ours.load_state_dict(trained(theirs).state_dict(), strict=True)
    x = image(1, h=65, w=65)
    with torch.inference_mode():
        assert torch.equal(ours.eval().forward_modules(x), theirs.eval()(x))


@pytest.mark.peer
def test_timm_reads_our_preprocessing_facts():
    data = importlib.import_module(f"{peer('timm').__name__}.data")
    for name in ("resnet50", "resnext101_64x4d"):
        with torch.device("meta"):
            ours = data.resolve_model_data_config(backbones.create_model(name))
        cfg = ours["input_size"], ours["interpolation"], ours["crop_pct"], ours["mean"], ours["std"]
        crop = 0.965 if name == "resnext101_64x4d" else 0.875
        assert cfg == ((3, 224, 224), "bilinear", crop, data.IMAGENET_DEFAULT_MEAN, data.IMAGENET_DEFAULT_STD)


# Options


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_features_only_gives_every_tap(name):
    model = trained(backbones.create_model(name, features_only=True)).eval()
    x = image(1, h=64, w=97)
    with torch.inference_mode():
        taps = model(x)
    assert isinstance(taps, list)
    want = [
        (1, c, -(-64 // r), -(-97 // r)) for c, r in zip(model.feature_info.channels(), (2, 4, 8, 16, 32))
    ]
    assert [tuple(t.shape) for t in taps] == want
    assert all(bool((t >= 0).all()) for t in taps)  # after the activation
    assert not any(k.startswith("fc") for k in model.state_dict())


def test_taps_are_the_tensors_of_the_classifier_model():
    full = trained(backbones.resnet18(num_classes=4)).eval()
    some = backbones.resnet18(features_only=True, out_indices=(-1, 1)).eval()
    backbones.load_weights(some, full.state_dict())
    x, seen = image(), {}
    for tap in full.feature_info:
        full.get_submodule(tap["module"]).register_forward_hook(
            lambda module, inputs, y, i=tap["index"]: seen.setdefault(i, y.clone())
        )
    full.forward_modules(x)
    assert same(some.forward_modules(x), [seen[1], seen[4]])
    assert (some.out_indices, some.feature_info.out_indices) == ([1, 4], (1, 4))
    assert some.feature_info.get_dicts(["module"]) == [{"module": "layer1"}, {"module": "layer4"}]
    assert some.feature_info.get_dicts(idx=0) == {"num_chs": 64, "reduction": 2, "module": "relu", "index": 0}
    assert some.feature_info.channels(0) == 64 and some.feature_info.reduction([0, 4]) == [2, 32]


def test_stages_behind_the_last_tap_are_not_kept():
    model = backbones.resnet50(features_only=True, out_indices=(0, 2))
    assert {k.split(".")[0] for k in model.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}
    assert [t.shape[1] for t in model.eval()(image(1))] == [64, 512] and model.num_features == 512


@pytest.mark.parametrize("output_stride, reductions", [(8, [2, 4, 8, 8, 8]), (16, [2, 4, 8, 16, 16])])
def test_output_stride(output_stride, reductions):
    for name in ("resnet18", "resnet50"):
        model = backbones.create_model(name, features_only=True, output_stride=output_stride).eval()
        assert model.feature_info.reduction() == reductions
        assert [64 // t.shape[-1] for t in model(image(1))] == reductions


@pytest.mark.parametrize("depth, gmacs", [(50, 3.858), (101, 7.570), (152, 11.282)])
def test_stride_in_1x1_is_the_papers_first_version(depth, gmacs):
    with torch.device("meta"):
        model = backbones.create_model(f"resnet{depth}", stride_in_1x1=True).eval()
        assert round(_registry.count_macs(model, torch.empty(1, 3, 224, 224)) / 1e9, 3) == gmacs
        assert described(model) == described(backbones.create_model(f"resnet{depth}"))


def test_shortcuts():
    with torch.device("meta"):
        a, b, c = (backbones.resnet18(shortcut=kind) for kind in "ABC")
    projections = [[k for k in m.state_dict() if k.endswith("downsample.0.weight")] for m in (a, b, c)]
    assert [len(p) for p in projections] == [0, 3, 8]
    with torch.device("meta"):
        deep = backbones.resnet50(shortcut="A")  # layer1 widens at stride 1
    assert [k for k in deep.state_dict() if "downsample" in k] == []


def test_zero_padded_shortcut_is_the_strided_identity():
    x = image(2, 64, 9, 9)
    y = resnet.ZeroPadShortcut(64, 2)(x)
    assert y.shape == (2, 128, 5, 5)
    assert torch.equal(y[:, :64], x[:, :, ::2, ::2]) and y[:, 64:].abs().sum() == 0
    block = backbones.resnet18(shortcut="A", zero_init_residual=True).eval().layer2[0]
    assert torch.equal(block(x), y.relu())  # the residual branch starts at zero


@pytest.mark.parametrize(
    "cardinality, width, name",
    [
        (1, None, "resnet50"),
        (2, None, "resnext50_2x40d"),
        (32, None, "resnext50_32x4d"),
        (8, 14, "resnext50_8x14d"),
    ],
)
def test_resnext_constructor(cardinality, width, name):
    with torch.device("meta"):
        assert described(backbones.resnext(50, cardinality, width)) == described(backbones.create_model(name))


def test_inputs_without_classifier_and_with_other_channels():
    x = image(2, 5)
    model = backbones.resnet18(num_classes=0, in_chans=5).eval()
    assert model(x).shape == (2, 512) and isinstance(model.get_classifier(), nn.Identity)
    assert not any(k.startswith("fc") for k in model.state_dict())
    assert model.default_cfg["input_size"] == (5, 224, 224) and len(model.default_cfg["mean"]) == 5
    grey = backbones.resnet18(in_chans=1, features_only=True, out_indices=(0,))
    assert grey.conv1.weight.shape == (64, 1, 7, 7)
    assert grey.default_cfg["mean"] == pytest.approx((0.449,))


def test_drop_rate_acts_in_training_only():
    model = backbones.resnet18(num_classes=6, drop_rate=0.5)
    features = model.eval().forward_features(image())
    with torch.no_grad():
        assert torch.equal(model.forward_head(features), model.forward_head(features))
        model.train()
        assert not torch.equal(model.forward_head(features), model.forward_head(features))
        dropped = model.forward_head(features, pre_logits=True) == 0
        assert 0.2 < dropped.float().mean() < 0.8


def test_features_then_head_is_the_model():
    model = trained(backbones.resnet18(num_classes=6)).eval()
    x = image()
    features = model.forward_features(x)
    assert features.shape == (2, 512, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, F.adaptive_avg_pool2d(features, 1).flatten(1))
    assert torch.equal(model.fc(pooled), model.forward_modules(x))


def test_reset_classifier():
    model = backbones.resnet18(num_classes=10).double().eval()
    assert model.get_classifier() is model.fc
    model.reset_classifier(3)
    assert (model.num_classes, model.default_cfg["num_classes"]) == (3, 3)
    assert model.fc.weight.dtype is torch.float64 and not model.fc.training
    assert model(image().double()).shape == (2, 3)
    model.reset_classifier(0)
    assert model(image().double()).shape == (2, 512)
    model.reset_classifier(2)
    assert model(image().double()).shape == (2, 2)
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


def test_reset_classifier_between_calls():
    model, x = trained(backbones.resnet18(num_classes=10)).eval(), image()
    for classes in (10, 3, 0, 7):
        model.reset_classifier(classes)
        with torch.inference_mode():
            y = model(x)
            assert y.shape == (2, classes or 512)
            torch.testing.assert_close(y, model.forward_modules(x), rtol=1e-4, atol=1e-4)


def test_features_only_has_no_classifier_to_reset():
    with pytest.raises(RuntimeError, match="features_only"):
        backbones.resnet18(features_only=True, out_indices=1).reset_classifier(3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": -1}, "num_classes"),
        ({"in_chans": 0}, "in_chans"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"output_stride": 4}, "output_stride"),
        ({"shortcut": "D"}, "shortcut"),
        ({"stride_in_1x1": True}, "basic block"),
        ({"out_indices": (1,)}, "features_only"),
        ({"features_only": True, "out_indices": (5,)}, "out_indices"),
        ({"features_only": True, "out_indices": (1, -4)}, "out_indices"),
        ({"features_only": True, "out_indices": ()}, "out_indices"),
        ({"features_only": True, "out_indices": 6}, "out_indices"),
    ],
)
def test_bad_options(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        backbones.resnet18(**options)


@pytest.mark.parametrize(
    "arguments, message", [((18, 2), "depth"), ((50, 3), "width"), ((50, 0, 4), "positive")]
)
def test_bad_resnext(arguments, message):
    with pytest.raises(ValueError, match=message):
        backbones.resnext(*arguments)


def test_unknown_option():
    with pytest.raises(TypeError, match="pretrained"):
        backbones.resnet18(pretrained=True)


# What PyTorch does to models


@pytest.fixture(scope="module", params=["logits", "features"])
def model(request):
    options = {"features_only": True, "out_indices": (-1, 1)} if request.param == "features" else {}
    return trained(backbones.resnet18(**options)).eval()


def test_a_call_goes_through_the_engine(monkeypatch):
    model, x = backbones.resnet18(num_classes=2).eval(), image(1)
    calls = []
    monkeypatch.setattr(_base.engine, "forward", lambda m, x, plain: calls.append((m, x, plain)) or plain(x))
    y = model(x)
    assert calls == [(model, x, model.forward_modules)] and torch.equal(y, model.forward_modules(x))


def test_deepcopy_and_pickle(model):
    x = image()
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(twin(x), model(x)) and twin.feature_info == model.feature_info
        next(twin.parameters()).data.zero_()
        assert not same(twin.forward_modules(x), model.forward_modules(x))


def test_whole_model_through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False)(image()), model(image()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_script(model, no_engine):
    scripted = torch.jit.script(model)
    assert same(scripted(image()), model.forward_modules(image()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Encountering a list:torch.jit.TracerWarning")
def test_jit_trace(model, no_engine):
    traced = torch.jit.trace(model, image(), check_trace=False)  # the check calls the model itself
    assert same(traced(image(seed=1)), model.forward_modules(image(seed=1)))


def test_fx(model, no_engine):
    traced = torch.fx.symbolic_trace(model)
    assert same(traced(image(3)), model.forward_modules(image(3)))


def test_compile(model, no_engine):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert same(compiled(image()), model.forward_modules(image()))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_batch(model, no_engine, strict):
    shapes = ({0: torch.export.Dim("n", min=1, max=16)},)
    exported = torch.export.export(model, (image(2),), dynamic_shapes=shapes, strict=strict)
    for got, want in zip(exported.module()(image(3)), model.forward_modules(image(3))):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_and_channels_last(model, dtype):
    other = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    x = image().to(dtype=dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        outputs = other(x)
    for y in outputs if isinstance(outputs, list) else [outputs]:
        assert y.dtype is dtype and bool(y.isfinite().all())


def test_construction_on_the_meta_device():
    with torch.device("meta"):
        model = backbones.resnet18(num_classes=3)
    assert all(t.is_meta for t in model.state_dict().values())
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 3)


def test_construction_in_inference_mode():
    """Its parameters are inference tensors, which have no version counter."""
    with torch.inference_mode():
        model = backbones.resnet18(num_classes=3).eval()
        for _ in range(2):
            torch.testing.assert_close(model(image()), model.forward_modules(image()), rtol=1e-4, atol=1e-4)


def test_the_facade_exports_the_models():
    for name in (
        *NAMES,
        "resnext50",
        "resnext101",
        "create_model",
        "list_models",
        "model_info",
        "register_model",
    ):
        assert getattr(fb, name) is getattr(backbones, name)

"""Checkpoints of other libraries: written here in their layout, read back, same outputs."""

import re
import sys

import numpy
import pytest
import torch
from helpers import one_thread as one_thread
from model_checks import image, peer, trained
from torch import nn
from weights_checks import refused, sha256

from fast_backbones import backbones
from fast_backbones.backbones import WeightsError, _remap, create_model, load_weights

TENSORFLOW = {"pad_type": "same", "bn_eps": 1e-3}


def source(name: str, **options) -> nn.Module:
    """A model none of whose numbers are those of a fresh one."""
    torch.manual_seed(1)
    return trained(create_model(name, **options)).eval()


def loaded(name: str, weights, **options) -> nn.Module:
    """A model with these weights; built on the meta device, so that nothing else can be left in it."""
    with torch.device("meta"):
        model = create_model(name, **options)
    load_weights(model, weights, head="strict")
    return model


def check(model: nn.Module, theirs: nn.Module, size: int) -> None:
    """The same entries, bit for bit, and the same outputs."""
    ours, expected = model.state_dict(), theirs.state_dict()
    assert list(ours) == list(expected)
    assert [k for k in ours if "batches" not in k and not torch.equal(ours[k], expected[k])] == []
    x = image(1, theirs.default_cfg["input_size"][0], size, size)
    with torch.inference_mode():
        assert torch.equal(model.eval().forward_modules(x), theirs.forward_modules(x))


def renamed(model: nn.Module, *changes: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The state dict with regular expressions applied to its names."""
    state = {}
    for key, value in model.state_dict().items():
        for pattern, replacement in changes:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    assert list(state) != list(model.state_dict())
    return state


# PyTorch


def test_densenet_files_of_2017():
    small = (8, (2, 3, 2, 2), 16)
    torch.manual_seed(1)
    theirs = trained(backbones.densenet(*small, num_classes=7)).eval()
    old = renamed(theirs, (r"\.(norm|conv)([12])\.", r".\1.\2."))
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    with torch.device("meta"):
        ours = backbones.densenet(*small, num_classes=7)
    load_weights(ours, old)
    check(ours, theirs, 64)


def timm_vgg_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    state = {names.get(k[:12], k[:12]) + k[12:]: v for k, v in state.items()}
    for name, size in (("pre_logits.fc1", 7), ("pre_logits.fc2", 1)):
        state[f"{name}.weight"] = state[f"{name}.weight"].unflatten(1, (-1, size, size))
    return state


def test_timm_vgg_in_small():
    own = {"features.0.weight": torch.ones(2, 3, 3, 3)}
    for i, shape in {0: (4, 2 * 49), 3: (4, 4), 6: (5, 4)}.items():
        own |= {f"classifier.{i}.weight": torch.randn(shape), f"classifier.{i}.bias": torch.randn(shape[0])}
    foreign = timm_vgg_layout(own)
    assert foreign["pre_logits.fc1.weight"].shape == (4, 2, 7, 7) and "head.fc.bias" in foreign
    found = _remap.remap(foreign, _remap.Target("x", nn.Identity(), own))
    assert found.keys() == own.keys() and all(torch.equal(found[k], own[k]) for k in own)


@pytest.mark.slow
def test_timm_vgg():
    theirs = source("vgg11_bn", num_classes=7)
    check(loaded("vgg11_bn", timm_vgg_layout(theirs.state_dict()), num_classes=7), theirs, 64)


@pytest.mark.slow
@pytest.mark.peer
def test_timm_vgg_from_timm():
    torch.manual_seed(0)
    theirs = trained(peer("timm").create_model("vgg11_bn", num_classes=7)).eval()
    ours = loaded("vgg11_bn", theirs.state_dict(), num_classes=7).eval()
    x = image(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours.forward_modules(x), theirs(x), rtol=1e-4, atol=1e-5)


# Keras


def keras_layers(model: nn.Module, names: dict[str, str]) -> dict[str, numpy.ndarray]:
    """`layer/variable` -> array, from the modules in `names`, which gives the layer of each."""
    arrays = {}
    for module, layer in names.items():
        part = model.get_submodule(module)
        if isinstance(part, nn.BatchNorm2d):
            arrays |= {
                f"{layer}/gamma": part.weight,
                f"{layer}/beta": part.bias,
                f"{layer}/moving_mean": part.running_mean,
                f"{layer}/moving_variance": part.running_var,
            }
        elif isinstance(part, nn.Linear):
            arrays |= {f"{layer}/kernel": part.weight.permute(1, 0), f"{layer}/bias": part.bias}
        elif part.groups > 1:
            arrays[f"{layer}/depthwise_kernel"] = part.weight.permute(2, 3, 0, 1)
        else:
            arrays[f"{layer}/kernel"] = part.weight.permute(2, 3, 1, 0)
    return {name: value.detach().numpy() for name, value in arrays.items()}


MOBILENET_BLOCKS = ("0.0", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "3.2", "3.3", "3.4", "3.5", "4.0", "4.1")


def keras_mobilenet(model: nn.Module) -> dict[str, numpy.ndarray]:
    names = {"conv_stem": "conv1", "bn1": "conv1_bn", "classifier": "conv_preds"}
    for number, block in enumerate(MOBILENET_BLOCKS, 1):
        for ours, layer in {"conv_dw": "dw", "bn1": "dw", "conv_pw": "pw", "bn2": "pw"}.items():
            suffix = "_bn" if ours.startswith("bn") else ""
            names[f"blocks.{block}.{ours}"] = f"conv_{layer}_{number}{suffix}"
    arrays = keras_layers(model, names)
    arrays["conv_preds/kernel"] = arrays["conv_preds/kernel"][None, None]  # there it is a convolution
    return arrays


def keras_xception(model: nn.Module) -> dict[str, numpy.ndarray]:
    names = {"fc": "predictions"}
    for i in (1, 2):
        names |= {f"conv{i}": f"block1_conv{i}", f"bn{i}": f"block1_conv{i}_bn"}
    arrays = {}
    separable = {"conv3": "block14_sepconv1", "conv4": "block14_sepconv2"}
    names |= {"bn3": "block14_sepconv1_bn", "bn4": "block14_sepconv2_bn"}
    for block in range(1, 13):
        rep = model.get_submodule(f"block{block}.rep")
        kinds = [type(part).__name__ for part in rep]
        for j, index in enumerate((i for i, kind in enumerate(kinds) if kind == "SeparableConv2d"), 1):
            separable[f"block{block}.rep.{index}"] = f"block{block + 1}_sepconv{j}"
            names[f"block{block}.rep.{index + 1}"] = f"block{block + 1}_sepconv{j}_bn"
    for suffix, block in zip(("_9", "_10", "_11", "_12"), (1, 2, 3, 12)):  # sorted as text, 10 is before 9
        names[f"block{block}.skip"] = f"conv2d{suffix}"
        names[f"block{block}.skipbn"] = f"batch_normalization{suffix}"
    for module, layer in separable.items():
        arrays |= keras_layers(model, {f"{module}.conv1": layer})
        kernel = keras_layers(model, {f"{module}.pointwise": layer})[f"{layer}/kernel"]
        arrays[f"{layer}/pointwise_kernel"] = kernel
    return {**arrays, **keras_layers(model, names)}


KERAS = {
    "mobilenetv1_025": (keras_mobilenet, "conv_dw_13/depthwise_kernel", (3, 3, 256, 1)),
    "legacy_xception": (keras_xception, "block13_sepconv2/pointwise_kernel", (1, 1, 728, 1024)),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras(name):
    writer, layer, shape = KERAS[name]
    theirs = source(name, num_classes=7, **TENSORFLOW)
    foreign = writer(theirs)
    assert foreign[layer].shape == shape
    check(loaded(name, foreign, num_classes=7, **TENSORFLOW), theirs, 72)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "h5"])
def test_keras_files(suffix, tmp_path):
    theirs = source("mobilenetv1_025", num_classes=7, **TENSORFLOW)
    arrays = keras_mobilenet(theirs)
    path = tmp_path / f"mobilenet.{suffix}"
    if suffix == "npz":
        numpy.savez(path, **{f"{name}:0": value for name, value in arrays.items()})
    elif suffix == "safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, path)
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            for name, value in arrays.items():
                file[f"{name.split('/')[0]}/{name}:0"] = value
    check(loaded("mobilenetv1_025", path, num_classes=7, **TENSORFLOW), theirs, 64)
    assert backbones.mobilenetv1_025(weights=path, **TENSORFLOW).num_classes == 7


@pytest.mark.parametrize("missing", TENSORFLOW)
def test_keras_needs_its_options(missing):
    options = {k: v for k, v in TENSORFLOW.items() if k != missing}
    foreign = keras_mobilenet(source("mobilenetv1_025", num_classes=7, **TENSORFLOW))
    model = create_model("mobilenetv1_025", num_classes=7, **options)
    with refused(model, r"build the model with pad_type='same', bn_eps=1e-3"):
        load_weights(model, foreign)


def test_keras_checkpoints_that_do_not_fit():
    foreign = keras_mobilenet(source("mobilenetv1_025", num_classes=7, **TENSORFLOW))
    model = create_model("mobilenetv1_025", num_classes=7, **TENSORFLOW)
    with refused(model, r"1 of 164 entries are missing .*; 1 are unexpected \(conv_dw_14/depthwise_kernel\)"):
        kernel = foreign["conv_dw_13/depthwise_kernel"]
        rest = {k: v for k, v in foreign.items() if v is not kernel}
        load_weights(model, {**rest, "conv_dw_14/depthwise_kernel": kernel})
    with refused(model, r"conv1/kernel is \[8, 3\], expected 4 axes"):
        load_weights(model, {**foreign, "conv1/kernel": numpy.ones((8, 3), numpy.float32)})
    with refused(model, "1 have another shape"):
        load_weights(model, {**foreign, "conv1/kernel": numpy.ones((3, 3, 3, 9), numpy.float32)})
    grouped = create_model("mobilenetv1_050", num_classes=7, **TENSORFLOW)
    with refused(grouped, "have another shape"):
        load_weights(grouped, foreign)


def test_keras_with_other_options_of_ours():
    theirs = source("mobilenetv1_025", num_classes=7, **TENSORFLOW)
    foreign = keras_mobilenet(theirs)
    wanted = {"features_only": True, "out_indices": (0, 1), **TENSORFLOW}
    taps = create_model("mobilenetv1_025", weights=foreign, **wanted)
    assert torch.equal(taps.blocks[1][1].conv_pw.weight, theirs.blocks[1][1].conv_pw.weight)
    bare = create_model("mobilenetv1_025", weights=foreign, num_classes=0, **TENSORFLOW)
    assert torch.equal(bare.blocks[4][1].bn2.running_var, theirs.blocks[4][1].bn2.running_var)
    grey = create_model("mobilenetv1_025", weights=foreign, in_chans=1, **TENSORFLOW)
    torch.testing.assert_close(grey.conv_stem.weight, theirs.conv_stem.weight.sum(1, keepdim=True))


# Caffe


def caffe_blobs(model: nn.Module, names: dict[str, str], factor: float = 999.5) -> dict[str, list]:
    """Layer -> blobs, as pycaffe's `net.params`; batch norms in two layers, their statistics as sums."""
    blobs: dict[str, list] = {}
    for module, layer in names.items():
        part = model.get_submodule(module)
        if isinstance(part, nn.BatchNorm2d):
            sums = [part.running_mean * factor, part.running_var * factor, torch.tensor([factor])]
            blobs[layer], blobs[f"{layer}/scale"] = sums, [part.weight, part.bias]
        else:
            blobs[layer] = [part.weight, *([part.bias] if part.bias is not None else [])]
    return {layer: [blob.detach().numpy() for blob in group] for layer, group in blobs.items()}


@pytest.mark.parametrize("old", [False, True], ids=["new", "four axes"])
def test_caffe_alexnet(old):
    theirs = source("alexnet_2012", num_classes=7)
    layers = [f"conv{i}" for i in range(1, 6)] + ["fc6", "fc7", "fc8"]
    foreign = caffe_blobs(theirs, dict(zip(layers, layers)))
    if old:
        for blobs in foreign.values():
            blobs[:] = [blob.reshape((1,) * (4 - blob.ndim) + blob.shape) for blob in blobs]
        assert foreign["fc8"][1].shape == (1, 1, 1, 7)
    check(loaded("alexnet_2012", foreign, num_classes=7), theirs, 227)


GOOGLENET_BRANCHES = {
    "branch1": "1x1",
    "branch2.0": "3x3_reduce",
    "branch2.1": "3x3",
    "branch3.0": "5x5_reduce",
    "branch3.1": "5x5",
    "branch4.1": "pool_proj",
}


def test_caffe_googlenet():
    theirs = source("googlenet_2014", num_classes=7)
    names = {"conv1.conv": "conv1/7x7_s2", "conv2.conv": "conv2/3x3_reduce", "conv3.conv": "conv2/3x3"}
    for module in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        for ours, layer in GOOGLENET_BRANCHES.items():
            names[f"inception{module}.{ours}.conv"] = f"inception_{module}/{layer}"
    for i in (1, 2):
        heads = {"conv.conv": "conv", "fc1": "fc", "fc2": "classifier"}
        names |= {f"aux{i}.{ours}": f"loss{i}/{layer}" for ours, layer in heads.items()}
    foreign = caffe_blobs(theirs, {**names, "fc": "loss3/classifier"})
    assert foreign["inception_3a/5x5"][0].shape == (32, 16, 5, 5)
    check(loaded("googlenet_2014", foreign, num_classes=7), theirs, 224)
    bare = loaded("googlenet_2014", foreign, num_classes=7, aux_logits=False)
    assert torch.equal(bare.fc.weight, theirs.fc.weight) and "aux1" not in str(list(bare.state_dict()))


def se_bninception_layer(module: str) -> str:
    """`inception_3a_double_3x3_1_bn` -> `inception_3a/double3x3a/bn`, as the published prototxt has it."""
    found = re.fullmatch(r"inception_(\w\w)_se\.fc([12])", module)
    if found:
        return f"inception_{found[1]}_1x1_{'down' if found[2] == '1' else 'up'}"
    name, bn, _ = module.partition("_bn")
    for ours, layer in {"double_3x3_reduce": "double3x3_reduce", "_3x3_1": "3x3a", "_3x3_2": "3x3b"}.items():
        name = name.replace(ours, layer) if "double" in name else name
    name = re.sub(r"^(conv\d|inception_\w\w)_", r"\1/", name).replace("last_linear", "classifier")
    return name + ("/bn" if bn else "")


def test_caffe_se_bninception(tmp_path):
    theirs = source("se_bninception", num_classes=7)
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    names = {n: se_bninception_layer(n) for n, m in theirs.named_modules() if isinstance(m, kinds)}
    for layer in ("conv1/7x7_s2/bn", "inception_3c/double3x3b", "inception_5b_1x1_up", "classifier"):
        assert layer in names.values()
    foreign = caffe_blobs(theirs, names, factor=1.0)
    check(loaded("se_bninception", foreign, num_classes=7), theirs, 64)
    path = tmp_path / "blobs.npz"
    numpy.savez(path, **{f"{k}/{i}": blob for k, blobs in foreign.items() for i, blob in enumerate(blobs)})
    check(loaded("se_bninception", path, num_classes=7), theirs, 64)


def test_caffe_statistics_are_sums():
    model = create_model("se_bninception", num_classes=7)
    norm, key = model.inception_3a_1x1_bn, "inception_3a/1x1/bn"
    norm.running_mean.uniform_(-1, 1)
    found = {}
    for factor in (999.5, 0.0):
        blobs = caffe_blobs(model, {"inception_3a_1x1_bn": key}, factor)
        flat = {f"{k}/{i}": torch.from_numpy(b) for k, group in blobs.items() for i, b in enumerate(group)}
        found[factor] = _remap.caffe(flat, _remap.Target("x", model, model.state_dict()))
    mean = found[999.5]["inception_3a_1x1_bn.running_mean"]
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-6, atol=1e-7)
    assert not found[0.0]["inception_3a_1x1_bn.running_mean"].any()  # never trained: Caffe takes zeros
    assert torch.equal(found[0.0]["inception_3a_1x1_bn.weight"], norm.weight)


# pretrained-models.pytorch, TensorFlow's background class


@pytest.mark.parametrize(
    "name, classifier",
    [("legacy_xception", "fc"), ("inception_v4", "last_linear"), ("inception_resnet_v2", "classif")],
)
def test_cadene_names_and_the_background_class(name, classifier):
    theirs = source(name)
    foreign = {k.replace(f"{classifier}.", "last_linear."): v for k, v in theirs.state_dict().items()}
    assert "last_linear.bias" in foreign
    check(loaded(name, foreign), theirs, 96)
    for part in ("weight", "bias"):
        rows = foreign[f"last_linear.{part}"]
        foreign[f"last_linear.{part}"] = torch.cat([torch.full_like(rows[:1], 9.0), rows])
    check(loaded(name, foreign), theirs, 96)
    kept = loaded(name, foreign, num_classes=1001).get_submodule(classifier)
    assert kept.out_features == 1001 and kept.bias[0] == 9.0
    with torch.device("meta"):
        adopted = create_model(name)
    report = load_weights(adopted, foreign, head="adopt")
    assert adopted.num_classes == 1000 and "the background, left out" in report.notes[0]
    for declared, expected in ((None, 1000), (1000, 1000), (1001, 1001)):  # what a hub's config.json says
        target = _remap.Target("x", adopted, adopted.state_dict(), classes=declared)
        assert len(_remap.remap(foreign, target)[f"{classifier}.bias"]) == expected


def test_other_networks_with_1001_classes_keep_them():
    theirs = create_model("mobilenetv1_025", num_classes=1001)
    ours = create_model("mobilenetv1_025", weights=theirs.state_dict())
    assert ours.num_classes == 1001 and torch.equal(ours.classifier.bias, theirs.classifier.bias)


# timm's other SE networks


@pytest.mark.parametrize("name", ["legacy_seresnet18", "legacy_seresnext26_32x4d"])
def test_timm_seresnet_is_refused_with_the_reason(name):
    model = create_model(name, num_classes=3)
    foreign = renamed(model, (r"^layer0\.", ""), (r"\.se_module\.", ".se."), ("last_linear", "fc"))
    assert "layer1.0.se.fc1.weight" in foreign
    with refused(model, f"without 'legacy_': .* is another network .* weights of timm's {name}$"):
        load_weights(model, foreign)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", ["seresnet50", "seresnext50_32x4d", "senet154"])
def test_timm_seresnet_from_timm_is_refused(name):
    with torch.device("meta"):
        foreign = peer("timm").create_model(name).state_dict()
        model = create_model(f"legacy_{name}")
    foreign = {key: torch.zeros_like(value, device="cpu") for key, value in foreign.items()}
    with pytest.raises(WeightsError, match="is another network"):
        load_weights(model, foreign)


# torchvision: auxiliary heads and the mapping of the input


@pytest.fixture(scope="module")
def inception() -> nn.Module:
    return source("googlenet", num_classes=5)


def test_auxiliary_heads_are_dropped_where_the_model_has_none(inception):
    bare = loaded("googlenet", inception.state_dict(), num_classes=5, aux_logits=False)
    x = image(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(bare.eval().forward_modules(x), inception.forward_modules(x))
    with refused(create_model("googlenet", num_classes=5), "no auxiliary heads: .* aux_logits=False") as _:
        load_weights(create_model("googlenet", num_classes=5), bare.state_dict())


def test_auxiliary_heads_follow_the_classifier(inception):
    adopted = create_model("googlenet", weights=inception.state_dict())
    assert adopted.num_classes == adopted.aux1.fc2.out_features == 5
    assert torch.equal(adopted.aux2.fc2.weight, inception.aux2.fc2.weight)
    tuned = dict(inception.state_dict())  # somebody trained another classifier and kept the heads
    tuned |= {"fc.weight": torch.randn(9, 1024), "fc.bias": torch.randn(9)}
    model = create_model("googlenet", num_classes=5)
    report = load_weights(model, tuned, head="adopt")
    assert model.num_classes == 9 and model.aux1.fc2.out_features == 9
    assert torch.equal(model.fc.bias, tuned["fc.bias"]) and len(report.notes) == 3
    assert torch.equal(model.aux1.fc1.weight, inception.aux1.fc1.weight)


def test_torchvision_files_set_the_mapping_of_the_input(inception, tmp_path, monkeypatch):
    torch.save(inception.state_dict(), tmp_path / "x.pth")
    digest = sha256(tmp_path / "x.pth")
    published = tmp_path / f"googlenet-{digest[:8]}.pth"
    (tmp_path / "x.pth").rename(published)

    def maps(weights, **options) -> bool:
        return create_model("googlenet", weights=weights, num_classes=5, **options).transform_input

    assert maps(published) and maps(published, transform_input=True)
    assert not maps(published, transform_input=False) and not maps(published, in_chans=1)
    renamed = published.rename(tmp_path / "mine.pth")
    assert not maps(renamed) and not maps(inception.state_dict())
    monkeypatch.setattr(_remap, "_MAPPED_DIGESTS", (digest[:8],))
    assert maps(renamed)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name, stem", [("googlenet", "googlenet"), ("inception_v3", "inception_v3_google")])
def test_torchvision_files_give_torchvision_outputs(name, stem, tmp_path):
    build = getattr(peer("torchvision").models, name)
    theirs = trained(build(weights=None, init_weights=False, aux_logits=True, transform_input=True)).eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    path = (tmp_path / "x.pth").rename(tmp_path / f"{stem}-{sha256(tmp_path / 'x.pth')[:8]}.pth")
    x = image(1, 3, 299, 299)
    for options in ({}, {"aux_logits": False}):
        ours = create_model(name, weights=path, **options).eval()
        with torch.inference_mode():
            torch.testing.assert_close(ours.forward_modules(x), theirs(x), rtol=1e-4, atol=1e-5)


# Containers


def test_damaged_and_dangerous_npz(tmp_path):
    model = create_model("mobilenetv1_025", num_classes=7, **TENSORFLOW)
    path = tmp_path / "x.npz"
    numpy.savez(path, **{"conv1/kernel": numpy.array([print, 1], dtype=object)})
    with refused(model, "holds pickled code and was refused"):
        load_weights(model, path)
    numpy.savez(path, **keras_mobilenet(source("mobilenetv1_025", num_classes=7, **TENSORFLOW)))
    data = path.read_bytes()
    for keep in (10, 5000, len(data) - 1):
        path.write_bytes(data[:keep])
        with refused(model, "is not a complete .npz file"):
            load_weights(model, path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path.write_bytes(flipped)
    with refused(model, "is not a complete .npz file .*damaged"):
        load_weights(model, path)
    path.write_bytes(b"no archive")
    with refused(model, "is not a complete .npz file"):
        load_weights(model, path)
    numpy.savez(path, **{"conv1/kernel": numpy.array(["text"])})
    with refused(model, "entries that are no tensors: conv1/kernel"):
        load_weights(model, path)


def test_h5_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    model = create_model("mobilenetv1_025", num_classes=7, **TENSORFLOW)
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with refused(model, "reading .h5 needs `pip install h5py`"):
        load_weights(model, tmp_path / "x.h5")


def test_truncated_h5(tmp_path):
    pytest.importorskip("h5py")
    model = create_model("mobilenetv1_025", num_classes=7, **TENSORFLOW)
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with refused(model, "is not a complete .h5 file"):
        load_weights(model, tmp_path / "x.h5")


def test_arrays_of_numpy_are_taken_as_they_are():
    model = nn.Sequential(nn.Linear(2, 3))
    weight = numpy.arange(6, dtype=">f4").reshape(3, 2)
    bias = numpy.ones(3, numpy.float32)
    bias.flags.writeable = False
    load_weights(model, {"0.weight": weight[:, ::-1], "0.bias": bias})
    assert model[0].weight.tolist() == [[1, 0], [3, 2], [5, 4]] and model[0].bias.tolist() == [1, 1, 1]

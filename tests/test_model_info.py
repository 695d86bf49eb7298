"""The registry as a whole: public names have docstrings, models have facts, pages have them too."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch

import fast_backbones as fb
from fast_backbones import backbones, model_tables

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("README.md", "docs/models.md")
NAMES = backbones.list_models()


@pytest.mark.parametrize("name", backbones.__all__)
def test_public_names_explain_themselves(name):
    thing = getattr(backbones, name)
    assert getattr(fb, name) is thing
    text = inspect.getdoc(thing)
    assert text and len(text) > 20 and text[0].isupper(), f"{name} has no docstring of its own"
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        assert not text.startswith(f"{name}("), f"{name} has only the docstring that dataclasses make"


def test_every_model_and_alias_is_public():
    for name in NAMES:
        info = backbones.model_info(name)
        for public in (name, *info.aliases):
            assert public in backbones.__all__, f"{public} is registered and not exported"
            assert getattr(backbones, public) is getattr(backbones, name)


@pytest.mark.parametrize("name", NAMES)
def test_facts(name):
    info = backbones.model_info(name)
    assert info.name == name and info.family in backbones.list_families() and info.family != "custom"
    assert info.paper and info.compatible_with
    assert info.params > 50_000 and 0 <= info.aux_params < info.params and info.macs > 100_000
    assert info.input_size == (
        info.preprocessing.channels,
        info.preprocessing.height,
        info.preprocessing.width,
    )
    assert len(info.tap_channels) == len(info.tap_reductions) == len(info.tap_modules) >= 3
    assert list(info.tap_reductions) == sorted(info.tap_reductions)
    assert json.loads(json.dumps(dataclasses.asdict(info)))["name"] == name
    assert all(backbones.model_info(alias) is info for alias in info.aliases)


@pytest.mark.parametrize("name", NAMES)
def test_functions_take_the_common_options(name):
    function = getattr(backbones, name)
    assert next(iter(inspect.signature(function).parameters)) == "weights"
    with torch.device("meta"):
        model = function(features_only=True, out_indices=(0,), in_chans=2)
        assert model.default_cfg["architecture"] == name
        with pytest.raises(TypeError):
            function(no_such_option=1)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
VGG = [name for name in NAMES if name.startswith("vgg")]
PUBLISHED = {  # what the public checkpoint of each was evaluated with: resize, crop, filter, mean and std
    **dict.fromkeys(("alexnet", *VGG, "googlenet"), (256, 224, "bilinear", *IMAGENET)),
    **dict.fromkeys(
        ("resnet18", "resnet34", "densenet121", "densenet161"), (256, 224, "bilinear", *IMAGENET)
    ),
    **dict.fromkeys(("legacy_seresnet50", "legacy_senet154"), (256, 224, "bilinear", *IMAGENET)),
    **dict.fromkeys(("legacy_seresnet18", "legacy_seresnext26_32x4d"), (256, 224, "bicubic", *IMAGENET)),
    "resnext101_32x4d": (256, 224, "bilinear", *IMAGENET),
    "resnext101_64x4d": (232, 224, "bilinear", *IMAGENET),
    "inception_v3": (342, 299, "bilinear", *IMAGENET),
    "inception_v4": (342, 299, "bicubic", *HALF),
    "inception_resnet_v2": (333, 299, "bicubic", *HALF),
    "legacy_xception": (333, 299, "bicubic", *HALF),
    "mobilenetv1_100": (256, 224, "bicubic", *HALF),
    "inception_resnet_v1": (160, 160, "area", (127.5,) * 3, (128.0,) * 3),
    "bninception": (256, 224, "bilinear", (104.0, 117.0, 128.0), (1.0,) * 3),
    "alexnet_2012": (256, 227, "bilinear", (104.0, 117.0, 123.0), (1.0,) * 3),
    "googlenet_2014": (256, 224, "bilinear", (104.0, 117.0, 123.0), (1.0,) * 3),
    "se_bninception": (256, 224, "bilinear", (104.0, 117.0, 123.0), (1.0,) * 3),
}
CAFFE = ("bninception", "alexnet_2012", "googlenet_2014", "se_bninception")


@pytest.mark.parametrize("name", PUBLISHED)
def test_preprocessing_is_the_published_one(name):
    facts = backbones.model_info(name).preprocessing
    found = (facts.resize, facts.width, facts.interpolation, facts.mean, facts.std)
    assert found == PUBLISHED[name] and facts.height == facts.width
    assert facts.channel_order == ("bgr" if name in CAFFE else "rgb")
    assert facts.value_range == (255.0 if name in (*CAFFE, "inception_resnet_v1") else 1.0)


@pytest.mark.parametrize("page", TABLES)
def test_pages_have_the_current_table(page):
    table = model_tables.markdown([backbones.model_info(name) for name in NAMES])
    assert f"{model_tables.BEGIN}\n{table}\n{model_tables.END}" in (ROOT / page).read_text(), (
        f"python -m fast_backbones list --into {page} puts it there"
    )

"""Every registered model through the engine: exact, as accurate as PyTorch, every step by a kernel.

The quick tests take one variant of each family on small images; the slow ones take every name of the
registry at its default size, at an odd size and with three images.
"""

import pytest
import torch
from fast_backbones.bench.exact import float64
from fast_backbones.bench.subject import calibrate, input_size
from helpers import assert_as_accurate, assert_bit_equal, assert_equal, needs_native
from integer_nets import assert_exactly_representable, integer_image, integers_in

import fast_backbones as fb
from fast_backbones import engine

pytestmark = needs_native

# One variant of each family, and those with options that checkpoints need (behind a comma); an image small
# enough for a quick test, whose last map has 1, 2, 4 ... pixels: an exact mean.
QUICK = {
    "lenet5": 32, "lenet5_1998": 32, "alexnet": 65, "alexnet_2012": 227, "vgg11_bn": 64, "vgg11_lrn": 64,
    "vgg16_c": 64, "googlenet": 64, "googlenet_2014": 64, "bninception": 64, "inception_v3": 107,
    "inception_v4": 107, "inception_resnet_v1": 107, "inception_resnet_v2": 107, "resnet18": 64,
    "resnet50": 64, "resnext50_32x4d": 64, "resnext50_8x14d": 64, "legacy_xception": 64, "densenet121": 64,
    "mobilenetv1_025": 64, "legacy_seresnet18": 64, "legacy_seresnet50": 64, "legacy_seresnext26_32x4d": 64,
    "legacy_senet154": 64, "se_bninception": 64, "se_googlenet": 64, "se_inception_v3": 107,
    "se_inception_resnet_v2": 107, "se_mobilenetv1_100": 64,
    "inception_resnet_v1, embedding": 107, "mobilenetv1_025, same": 64, "legacy_xception, same": 64,
}  # fmt: skip
# Large, and made of what others have.
LARGE = {"inception_resnet_v2", "se_inception_resnet_v2", "legacy_senet154"}
# These read a fixed number of pixels: another size is an error in the reference, too.
FIXED_SIZE = {"lenet5", "lenet5_1998", "alexnet_2012"}
# Squashing functions and square roots: no arithmetic of theirs is exact.
INEXACT = {"lenet5_1998", "inception_resnet_v1, embedding"}
# These concatenate a convolution and a pool that round odd sizes differently: sides are multiples of 32.
EVEN_MAPS = {"bninception", "se_bninception"}
OPTIONS = {
    "inception_resnet_v1": {"classify": True, "num_classes": 100},
    "inception_v3": {"aux_logits": False},
    "se_inception_v3": {"aux_logits": False},
    "mobilenetv1_025, same": {"pad_type": "same", "bn_eps": 1e-3},
    "mobilenetv1_100, same": {"pad_type": "same", "bn_eps": 1e-3},
    "legacy_xception, same": {"pad_type": "same", "bn_eps": 1e-3},
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode(False), torch.no_grad():
        yield


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return fb.create_model(name.split(",")[0], **OPTIONS.get(name, {}), **options).eval()


def as_taps(name, model):
    """The same model that returns its feature maps."""
    taps = build(name, features_only=True)
    state = model.state_dict()
    taps.load_state_dict({key: state[key] for key in taps.state_dict()})
    for ours, theirs in zip(taps.modules(), model.modules(), strict=False):
        assert type(ours) is type(theirs) or isinstance(ours, torch.nn.Identity)
    return taps.eval()


def image(model, batch=1, size=None, seed=1):
    channels, height, width = input_size(model)
    height, width = size if size is not None else (height, width)
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def planned(model, x):
    """model(x), certain that a plan ran and that kernels did all of it."""
    assert engine.why_not(model, x) is None
    result = model(x)
    steps = [s for s in engine.plan_for(model, x).steps if not s.native]
    left = [f"{s.name} ({s.op}): {s.refusals}" for s in steps]
    assert not left, f"steps left to PyTorch: {left}"
    return result


def compare(model, x, what):
    """The 2x rule for every output, and the same through the reference backend."""
    ours, plain = planned(model, x), model.forward_modules(x)
    with fb.backend("reference"):
        reference = model(x)
    as_lists = [[y] if isinstance(y, torch.Tensor) else list(y) for y in (ours, plain, reference)]
    engine.refresh(model)
    exact = float64(model.double().forward_modules, x)
    model.float()
    exact = [exact] if isinstance(exact, torch.Tensor) else list(exact)
    for level, (a, b, c, d) in enumerate(zip(*as_lists, exact, strict=True)):
        assert a.stride() == b.stride()
        assert_bit_equal(c, b, f"{what} output {level}, reference backend")
        assert_as_accurate(a, b, d, f"{what} output {level}")


def quick(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in names]


@pytest.mark.parametrize("name", quick(QUICK))
def test_family_is_as_accurate_as_pytorch(name):
    model = build(name)
    x = image(model, 2, (QUICK[name] + 3, QUICK[name] + 2) if name not in FIXED_SIZE else None)
    calibrate(model, x)
    compare(model, x, name)


@pytest.mark.parametrize("name", quick(n for n in QUICK if n not in INEXACT))
def test_family_is_exact_on_integers(name):
    """Bit for bit what float64 modules compute: one wrong index in the network changes the result."""
    model = integers_in(build(name), seed=1)
    size = (input_size(model)[1:]) if name in FIXED_SIZE else (QUICK[name], QUICK[name])
    x = integer_image(2, model.in_chans, *size)
    ours = planned(model, x)
    taps = as_taps(name, model)
    maps = planned(integers_in(taps, seed=1), x)
    exact, exact_maps = (float64(m.double().forward_modules, x) for m in (model, taps))
    for level, (a, b) in enumerate(zip([ours, *maps], [exact, *exact_maps], strict=True)):
        assert_exactly_representable(b, f"{name} output {level}")
        assert b.unique().numel() > 3, "the numbers must not have died on their way"
        assert_equal(a.double(), b, f"{name} output {level}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*fb.list_models(), "mobilenetv1_100, same", "legacy_xception, same"])
def test_every_model_is_as_accurate_as_pytorch(name):
    model = build(name)
    calibrate(model, image(model, 2))
    taps = as_taps(name, model)
    _, height, width = input_size(model)
    odd = (height - 32, width + 32) if name in EVEN_MAPS else (height - 31, width + 14)
    odd = None if name in FIXED_SIZE else odd
    for batch, size in ((1, None), (1, odd), (3, None)):
        x = image(model, batch, size)
        compare(model, x, f"{name}, {tuple(x.shape)}")
        compare(taps, x, f"{name} taps, {tuple(x.shape)}")

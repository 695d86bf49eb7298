"""Preprocessing: by hand, by torchvision's own classes, and by both backends of ours, which must agree."""

import pickle
import sys

import numpy
import pytest
import torch
from fast_backbones.backbones.transforms import preprocessing_for, random_box, transforms_for
from model_checks import peer

from fast_backbones import backbones
from fast_backbones.backbones import transforms

Image = pytest.importorskip("PIL.Image")

CFG = {"input_size": (3, 24, 24), "crop_pct": 0.75, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
CAFFE = {**CFG, "channel_order": "bgr", "value_range": 255.0, "mean": (104.0, 117.0, 128.0), "std": (1, 1, 1)}
FACE = {**CFG, "value_range": 255.0, "mean": (127.5,) * 3, "std": (128.0,) * 3, "interpolation": "area"}
GREY = {**CFG, "input_size": (1, 24, 24), "mean": (0.1,), "std": (0.3,)}
CFGS = {
    "imagenet": CFG,
    "bicubic": {**CFG, "interpolation": "bicubic"},
    "lanczos": {**CFG, "interpolation": "lanczos"},
    "caffe": CAFFE,
    "face": FACE,
    "grey": GREY,
    "odd": {**CFG, "input_size": (3, 23, 19), "crop_pct": 1.0},
}
SIZES = [(60, 41), (41, 60), (33, 33), (20, 90)]  # width, height; smaller and larger than the target
each_cfg = pytest.mark.parametrize("cfg", CFGS.values(), ids=CFGS)


def photo(width=60, height=41, channels=3, seed=0):
    """Noise on a coarse pattern: hard edges, and nothing symmetric."""
    dice = numpy.random.default_rng(seed)
    coarse = dice.integers(0, 256, (height // 5 + 1, width // 5 + 1, channels), dtype=numpy.uint8)
    wide = coarse.repeat(5, 0).repeat(5, 1)[:height, :width].astype(int)
    pixels = (wide + dice.integers(-20, 20, wide.shape)).clip(0, 255).astype(numpy.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def tensor(picture) -> torch.Tensor:
    pixels = numpy.array(picture)
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def levels(x: torch.Tensor, cfg) -> torch.Tensor:
    """The grey levels 0..255 that were normalised into x."""
    facts = preprocessing_for(cfg)
    shape = (facts.channels, 1, 1)
    return x * torch.tensor(facts.scale).view(shape) + torch.tensor(facts.offset).view(shape)


# By hand


def test_a_constant_image_gives_the_formula():
    x = transforms_for(CFG)(Image.new("RGB", (50, 40), (255, 0, 51)))
    assert x.shape == (3, 24, 24) and x.dtype is torch.float32 and x.is_contiguous()
    expected = torch.tensor([(1 - 0.4) / 0.2, (0 - 0.5) / 0.25, (0.2 - 0.6) / 0.3])
    torch.testing.assert_close(x[:, 7, 3], expected)


def test_caffe_wants_blue_first_and_values_to_255():
    x = transforms_for(CAFFE)(Image.new("RGB", (50, 40), (200, 100, 30)))
    assert x[:, 0, 0].tolist() == [30.0 - 104, 100.0 - 117, 200.0 - 128]


def test_a_face_network_has_its_own_range():
    x = transforms_for(FACE)(Image.new("RGB", (50, 40), (255, 0, 100)))
    assert x[:, 0, 0].tolist() == [127.5 / 128, -127.5 / 128, -27.5 / 128]


def test_the_centre_is_cut_out_at_its_own_scale():
    cfg = {**CFG, "crop_pct": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    picture = photo(24, 30)
    expected = tensor(picture)[:, 3:27] / 255
    torch.testing.assert_close(transforms_for(cfg)(picture), expected)


def test_area_averages_rectangles():
    cfg = {**FACE, "input_size": (3, 8, 8), "crop_pct": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    picture = photo(32, 32)
    mean = torch.nn.functional.avg_pool2d(tensor(picture).float(), 4)
    assert (
        transforms_for(cfg)(picture) - mean
    ).abs().max() <= 1.0  # Pillow rounds after rows and after columns


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 0.965, 1.0])
def test_every_size_gives_the_input_size(size, crop_pct):
    cfg = {**CFG, "input_size": (3, 22, 31), "crop_pct": crop_pct}
    assert transforms_for(cfg)(photo(*size)).shape == (3, 22, 31)


def test_resize_is_the_published_one():
    def resize(size, crop_pct):
        return preprocessing_for({**CFG, "input_size": (3, size, size), "crop_pct": crop_pct}).resize

    published = (
        (224, 0.875, 256),
        (224, 0.965, 232),
        (299, 0.875, 342),
        (299, 0.8975, 333),
        (256, 0.95, 269),
    )
    for size, crop_pct, expected in published:
        assert resize(size, crop_pct) == expected


# Kinds of images


@each_cfg
def test_kinds_of_images_give_the_same_bits(cfg):
    to_input, picture = transforms_for(cfg), photo()
    expected = to_input(picture)
    assert torch.equal(to_input(numpy.array(picture)), expected)
    assert torch.equal(to_input(numpy.array(picture)[:, ::-1][:, ::-1]), expected)
    assert torch.equal(to_input(tensor(picture)), expected)
    both = to_input(torch.stack([tensor(picture), tensor(photo(seed=1))]))
    assert torch.equal(both[0], expected) and torch.equal(both[1], to_input(photo(seed=1)))


def test_grey_and_colour_meet():
    grey = photo(channels=1)
    x = transforms_for(CFG)(grey)
    assert torch.equal(x, transforms_for(CFG)(grey.convert("RGB")))
    for same in (numpy.array(grey), numpy.array(grey)[:, :, None], tensor(grey)):
        assert torch.equal(transforms_for(CFG)(same), x)
    colour = photo()
    assert torch.equal(transforms_for(GREY)(colour), transforms_for(GREY)(colour.convert("L")))


def test_other_modes_of_pillow():
    colour = photo()
    opaque = colour.copy()
    opaque.putalpha(255)
    assert torch.equal(transforms_for(CFG)(opaque), transforms_for(CFG)(colour))
    bits = photo(channels=1).convert("1")
    assert torch.equal(transforms_for(GREY)(bits), transforms_for(GREY)(bits.convert("L")))


@pytest.mark.parametrize("backend", ["pillow", pytest.param("torchvision", marks=pytest.mark.peer)])
@pytest.mark.parametrize(
    "image, error, message",
    [
        (torch.zeros(3, 8, 8), TypeError, "holds uint8, got float32"),
        (numpy.zeros((8, 8, 3)), TypeError, "holds uint8, got float64"),
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"\[C, H, W\] or \[N, C, H, W\], got \[8, 8\]"),
        (torch.zeros(5, 8, 8, dtype=torch.uint8), ValueError, "got .*8, 8"),
        (numpy.zeros((8, 8, 4), numpy.uint8), ValueError, r"got \[8, 8, 4\]"),
        (Image.new("I", (9, 9)), ValueError, "mode 'I'"),
        (Image.new("F", (9, 9)), ValueError, "mode 'F'"),
        ("cat.jpg", TypeError, "PIL image, a numpy array or a tensor, got str"),
    ],
    ids=["float", "double", "flat", "five", "four", "I", "F", "path"],
)
def test_other_images_are_refused(image, error, message, backend):
    if backend == "torchvision":
        peer("torchvision")
    with pytest.raises(error, match=message):
        transforms_for(CFG, backend=backend)(image)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"interpolation": "cubic"}, "interpolation must be 'bilinear' or .*, got 'cubic'"),
        ({"channel_order": "gbr"}, "channel_order must be 'rgb' or 'bgr'"),
        ({"value_range": 2.0}, "value_range"),
        ({"crop_mode": "border"}, "crop_mode"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"std": (1, 0, 1)}, "none of std zero"),
        ({"mean": (0.5,)}, "must give 3 values"),
        ({"input_size": (4, 24, 24)}, "wants 4 channels; an image gives 1 or 3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_nonsense_in_the_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        transforms_for({**CFG, **change})


def test_models_and_other_backends():
    with torch.device("meta"):
        model = backbones.resnet18(in_chans=1)
    x = transforms_for(model)(photo())
    assert x.shape == (1, 224, 224)
    with pytest.raises(ValueError, match="backend must be 'pillow' or 'torchvision', got 'cv2'"):
        transforms_for(model, backend="cv2")
    with pytest.raises(ValueError, match="Linear has no default_cfg"):
        transforms_for(torch.nn.Linear(1, 1))


def test_the_transform_travels_to_workers_and_explains_itself():
    to_input = transforms_for(CAFFE, train=True)
    again = pickle.loads(pickle.dumps(to_input))
    torch.manual_seed(3)
    expected = to_input(photo())
    torch.manual_seed(3)
    assert torch.equal(again(photo()), expected)
    text = repr(to_input)
    assert "random crop and flip" in text and "BGR 0..255, mean (104, 117, 128)" in text
    assert "shorter side to 32 (bilinear), centre 24 x 24" in text


def test_pillow_alone_is_enough(monkeypatch):
    for module in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    assert transforms_for(CFG, train=True)(photo()).shape == (3, 24, 24)
    with pytest.raises(ImportError):
        transforms_for(CFG, backend="torchvision")


# Training


def test_random_crops_stay_inside_and_within_their_limits():
    areas, aspects = [], []
    for _ in range(500):
        left, top, width, height = random_box(120, 90)
        assert min(left, top) >= 0 and left + width <= 120 and top + height <= 90
        areas.append(width * height / (120 * 90))
        aspects.append(width / height)
    assert 0.06 < min(areas) < 0.12 and 0.8 < max(areas) <= 1.0
    assert 0.7 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.4


@pytest.mark.parametrize("size, box", [((400, 3), (198, 0, 4, 3)), ((3, 400), (0, 198, 3, 4))], ids=str)
def test_extreme_images_get_the_centre(size, box, monkeypatch):
    monkeypatch.setattr(transforms, "_ATTEMPTS", 0)
    assert random_box(*size) == box
    assert random_box(50, 50) == (0, 0, 50, 50)


def test_a_flip_comes_half_of_the_time():
    cfg = {**CFG, "mean": (0, 0, 0), "std": (1, 1, 1)}
    ramp = Image.fromarray(numpy.tile(numpy.arange(0, 240, 4, dtype=numpy.uint8), (60, 1)))
    to_input = transforms_for(cfg, train=True)
    flipped = sum(bool(x[0, 0, 0] > x[0, 0, -1]) for x in (to_input(ramp) for _ in range(200)))
    assert 70 < flipped < 130


# Against torchvision


@pytest.mark.peer
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_cfg
def test_both_backends_give_the_same_bits(cfg, size):
    peer("torchvision")
    ours, theirs = transforms_for(cfg), transforms_for(cfg, backend="torchvision")
    picture = photo(*size)
    for image in (picture, numpy.array(picture), photo(*size, channels=1)):
        a, b = ours(image), theirs(image)
        assert torch.equal(a, b) and type(b) is torch.Tensor


@pytest.mark.peer
@each_cfg
def test_both_backends_draw_the_same_crops(cfg):
    peer("torchvision")
    ours, theirs = (transforms_for(cfg, train=True, backend=b) for b in ("pillow", "torchvision"))
    for seed in range(30):
        torch.manual_seed(seed)
        a = ours(photo(*SIZES[seed % 4]))
        torch.manual_seed(seed)
        assert torch.equal(a, theirs(photo(*SIZES[seed % 4])))


@pytest.mark.peer
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_cfg
def test_tensors_agree_within_a_grey_level(cfg, size):
    peer("torchvision")
    image = tensor(photo(*size))
    a, b = (levels(transforms_for(cfg, backend=backend)(image), cfg) for backend in ("pillow", "torchvision"))
    assert (a - b).abs().max() < 1.01
    if cfg.get("interpolation") not in ("lanczos", "area"):
        batch = transforms_for(cfg, backend="torchvision")(torch.stack([image, image]))
        assert (levels(batch[1], cfg) - a).abs().max() < 1.01


@pytest.mark.peer
@pytest.mark.parametrize("name", ["resnet18", "resnext101_64x4d"])
def test_torchvision_presets_agree(name):
    """torchvision's own evaluation transform of these weights: same pixels, arithmetic in another order."""
    vision = peer("torchvision")
    preset = vision.models.get_model_weights(name)["DEFAULT"].transforms()
    with torch.device("meta"):
        model = backbones.create_model(name)
    picture = photo(310, 280)
    torch.testing.assert_close(transforms_for(model)(picture), preset(picture), rtol=1e-6, atol=2e-6)

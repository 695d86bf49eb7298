"""A photograph as a model wants it: size, crop, channel order, range and mean from its `default_cfg`.

    to_input = transforms_for(model)
    x = to_input(Image.open("cat.jpg")).unsqueeze(0)        # [1, C, H, W] float32

Pillow and numpy do the work; `backend="torchvision"` gives the same steps as a `torchvision.transforms.v2`
pipeline, which also takes batches and tensors on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._base import IMAGENET_MEAN, IMAGENET_STD

FILTERS = {
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "lanczos",
    "area": "box",  # each output pixel averages the rectangle that it covers
}
_WITHOUT_TENSORS = ("lanczos", "area")  # torchvision has these for PIL images only

# Training crops of GoogLeNet (arXiv 1409.4842, section 6), since then everybody's: area, aspect ratio.
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of an image.

    The shorter side becomes `resize` pixels (antialiased `interpolation`), the centre [height, width] is cut
    out, channels go to `channel_order`, values from 0..255 to 0..`value_range`, then
    y[c] = (x[c] - mean[c]) / std[c]. `mean` and `std` are in `channel_order`, and in units of `value_range`.
    """

    channels: int
    height: int
    width: int
    resize: int
    interpolation: str
    channel_order: str
    value_range: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def offset(self) -> list[float]:
        """What is subtracted from the values 0..255."""
        return [value * 255 / self.value_range for value in self.mean]

    @property
    def scale(self) -> list[float]:
        """What the difference is divided by."""
        return [value * 255 / self.value_range for value in self.std]

    def __str__(self) -> str:
        order, mean, std = self.channel_order.upper(), _numbers(self.mean), _numbers(self.std)
        values = f"{order} " if self.channels == 3 else ""
        return (
            f"shorter side to {self.resize} ({self.interpolation}), centre {self.height} x {self.width}, "
            f"{values}0..{self.value_range:g}, mean {mean}, std {std}"
        )


def preprocessing_for(model: nn.Module | Mapping[str, Any]) -> Preprocessing:
    """The preprocessing facts of a model, from its `default_cfg` (or of such a dict), checked.

    Absent keys mean what ImageNet classifiers have: bilinear, crop_pct 0.875, RGB, 0..1, mean and std. Raises
    ValueError for a value that makes no sense or that this module does not know.
    """
    cfg = _cfg(model)
    channels, height, width = cfg["input_size"]
    crop_pct, crop_mode = float(cfg.get("crop_pct", 0.875)), cfg.get("crop_mode", "center")
    facts = Preprocessing(
        channels=channels,
        height=height,
        width=width,
        resize=round(max(height, width) / crop_pct) if crop_pct > 0 else 0,
        interpolation=cfg.get("interpolation", "bilinear"),
        channel_order=cfg.get("channel_order", "rgb"),
        value_range=float(cfg.get("value_range", 1.0)),
        mean=tuple(map(float, cfg.get("mean", IMAGENET_MEAN))),
        std=tuple(map(float, cfg.get("std", IMAGENET_STD))),
    )
    _check(facts, crop_pct, crop_mode)
    return facts


def _cfg(model: nn.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    cfg: Any = model if isinstance(model, Mapping) else getattr(model, "default_cfg", None)
    if cfg is None:
        raise ValueError(f"{type(model).__name__} has no default_cfg: hand in a dict with its keys")
    return cfg


def _check(facts: Preprocessing, crop_pct: float, crop_mode: str) -> None:
    known: dict[str, tuple[Any, Any]] = {
        "interpolation": (facts.interpolation, tuple(FILTERS)),
        "channel_order": (facts.channel_order, ("rgb", "bgr")),
        "value_range": (facts.value_range, (1.0, 255.0)),
        "crop_mode": (crop_mode, ("center",)),
    }
    for key, (value, allowed) in known.items():
        if value not in allowed:
            raise ValueError(f"{key} must be {' or '.join(map(repr, allowed))}, got {value!r}")
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
    if min(facts.height, facts.width) < 1:
        raise ValueError(f"input_size must give at least one pixel, got {facts.height} x {facts.width}")
    if not all(map(math.isfinite, (*facts.mean, *facts.std))):
        raise ValueError(f"mean {facts.mean} and std {facts.std} must be finite")
    if len(facts.mean) != facts.channels or len(facts.std) != facts.channels or 0.0 in facts.std:
        raise ValueError(
            f"mean {facts.mean} and std {facts.std} must give {facts.channels} values, none of std zero"
        )


def transforms_for(
    model: nn.Module | Mapping[str, Any], *, train: bool = False, backend: str = "pillow"
) -> Callable[[Any], Tensor]:
    """A function from an image to the [C, H, W] float32 tensor that `model` was made for.

    Args:
        model: a backbone, or a dict with the keys of its `default_cfg`.
        train: a random crop (8 to 100 % of the area, aspect 3/4 to 4/3) and a random flip, drawn from
            PyTorch's generator, instead of the centre crop.
        backend: "pillow" needs Pillow and numpy; "torchvision" returns a `torchvision.transforms.v2.Compose`.
    Input: a PIL image (grey or colour, 8 bits a channel; transparency is dropped), numpy uint8 [H, W] or
        [H, W, C], uint8 tensor [C, H, W] or [N, C, H, W], C = 1 or 3 in RGB order. A grey image is repeated
        for a model of three channels, a colour image gives its luminance to a model of one.
    Both backends give the same bits for PIL images and numpy arrays, and draw the same random crops from the
    same seed. A tensor is resized by PyTorch in "torchvision": there it may differ by one of 255 levels
    (bicubic: few, at sharp edges); a batch gets one random crop there and one for each image in "pillow".

    Raises ValueError for models of other than 1 or 3 channels and images of other shapes, TypeError for
    other kinds of images and numbers.
    """
    channels = _cfg(model)["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"the model wants {channels} channels; an image gives 1 or 3")
    facts = preprocessing_for(model)
    if backend == "pillow":
        return PillowTransform(facts, train)
    if backend == "torchvision":
        return _torchvision_pipeline(facts, train)
    raise ValueError(f"backend must be 'pillow' or 'torchvision', got {backend!r}")


class PillowTransform:
    """The transform of one model by Pillow and numpy; see `transforms_for`. It can be pickled."""

    def __init__(self, facts: Preprocessing, train: bool):
        self.facts, self.train = facts, train

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'train: random crop and flip; ' if self.train else ''}{self.facts})"

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, Tensor) and image.dim() == 4:
            return torch.stack([self(one) for one in image])
        device = image.device if isinstance(image, Tensor) else None
        picture = _picture(image, self.facts.channels)
        picture = self._random(picture) if self.train else self._centre(picture)
        return _normalised(picture, self.facts).to(device)

    def _centre(self, picture: Any) -> Any:
        f = self.facts
        shorter, longer = min(picture.size), max(picture.size)
        size = [f.resize if side == shorter else int(f.resize * longer / shorter) for side in picture.size]
        resized = picture.resize(size, _pillow_filter(f.interpolation))
        left, top = (round((have - want) / 2) for have, want in zip(size, (f.width, f.height)))
        return resized.crop((left, top, left + f.width, top + f.height))

    def _random(self, picture: Any) -> Any:
        from PIL import Image

        f = self.facts
        left, top, width, height = random_box(*picture.size)
        cut = picture.crop((left, top, left + width, top + height))
        resized = cut.resize((f.width, f.height), _pillow_filter(f.interpolation))
        flip = torch.rand(1).item() < 0.5
        return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop inside the image, of CROP_AREA and CROP_ASPECT.

    Where ten draws find none that fits: the largest centred box whose aspect is allowed.
    """
    low, high = (math.log(aspect) for aspect in CROP_ASPECT)
    for _ in range(_ATTEMPTS):
        area = width * height * torch.empty(1).uniform_(*CROP_AREA).item()
        aspect = torch.empty(1).uniform_(low, high).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)).item())
            left = int(torch.randint(0, width - w + 1, (1,)).item())
            return left, top, w, h
    narrowest, widest = CROP_ASPECT
    if width / height < narrowest:
        w, h = width, round(width / narrowest)
    elif width / height > widest:
        w, h = round(height * widest), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def _picture(image: Any, channels: int) -> Any:
    """The image as a PIL image of one or three channels."""
    import numpy
    from PIL import Image

    if isinstance(image, Tensor):
        if image.dim() != 3:
            raise ValueError(f"an image tensor is [C, H, W] or [N, C, H, W], got {list(image.shape)}")
        if image.dtype is not torch.uint8:
            raise TypeError(f"an image tensor holds uint8, got {str(image.dtype).removeprefix('torch.')}")
        image = image.detach().permute(1, 2, 0).cpu().numpy()
    if isinstance(image, numpy.ndarray):
        if image.dtype != numpy.uint8:
            raise TypeError(f"an image array holds uint8, got {image.dtype}")
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
            raise ValueError(f"an image is [H, W] or [H, W, C] with C 1 or 3, got {list(image.shape)}")
        grey = image.ndim == 3 and image.shape[2] == 1
        image = Image.fromarray(numpy.ascontiguousarray(image[:, :, 0] if grey else image))
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is a PIL image, a numpy array or a tensor, got {type(image).__name__}")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"PIL image of mode {image.mode!r}: only 8 bits a channel have a known range")
    return image.convert("L" if channels == 1 else "RGB")


def _normalised(picture: Any, facts: Preprocessing) -> Tensor:
    import numpy

    pixels = numpy.asarray(picture, dtype=numpy.float32).reshape(facts.height, facts.width, facts.channels)
    if facts.channel_order == "bgr":
        pixels = pixels[:, :, ::-1]
    offset, scale = (numpy.asarray(v, dtype=numpy.float32) for v in (facts.offset, facts.scale))
    return torch.from_numpy(numpy.ascontiguousarray(((pixels - offset) / scale).transpose(2, 0, 1)))


def _pillow_filter(interpolation: str) -> Any:
    from PIL import Image

    return getattr(Image.Resampling, FILTERS[interpolation].upper())


def _torchvision_pipeline(facts: Preprocessing, train: bool) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    how = {"interpolation": v2.InterpolationMode(FILTERS[facts.interpolation]), "antialias": True}
    size = (facts.height, facts.width)
    steps: list[Any] = [_Opened(facts.channels, tensors=facts.interpolation not in _WITHOUT_TENSORS)]
    if train:
        steps += [v2.RandomResizedCrop(size, CROP_AREA, CROP_ASPECT, **how), v2.RandomHorizontalFlip()]
    else:
        steps += [v2.Resize(facts.resize, **how), v2.CenterCrop(size)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32)]
    if facts.channel_order == "bgr" and facts.channels == 3:
        steps.append(_Reversed())
    steps += [v2.Normalize(facts.offset, facts.scale), v2.ToPureTensor()]
    return v2.Compose(steps)


class _Opened(nn.Module):
    """First step of a torchvision pipeline: a PIL image or uint8 tensor of the right number of channels."""

    def __init__(self, channels: int, tensors: bool):
        super().__init__()
        self.channels, self.tensors = channels, tensors

    def forward(self, image: Any) -> Any:
        if not isinstance(image, Tensor) or not self.tensors:
            return _picture(image, self.channels)
        if image.dim() not in (3, 4) or image.shape[-3] not in (1, 3):
            raise ValueError(f"an image tensor is [C, H, W] or [N, C, H, W], got {list(image.shape)}")
        if image.dtype is not torch.uint8:
            raise TypeError(f"an image tensor holds uint8, got {str(image.dtype).removeprefix('torch.')}")
        if image.shape[-3] == self.channels:
            return image
        return _luminance(image) if self.channels == 1 else image.repeat_interleave(3, -3)


def _luminance(image: Tensor) -> Tensor:
    """0.299 R + 0.587 G + 0.114 B in Pillow's integers: [..., 3, H, W] -> [..., 1, H, W]."""
    red, green, blue = image.to(torch.int32).split(1, -3)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)


class _Reversed(nn.Module):
    """RGB to BGR."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flip(-3)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"

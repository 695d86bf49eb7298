"""A photograph as a model wants it: load, resize, crop, normalise (Pillow and numpy).

image = load_image("sample:china")                    scikit-learn ships china and flower
x = preprocess(load_image("cat.jpg"), model.default_cfg)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLES = ("china", "flower")


class ImageError(Exception):
    """The image cannot be had; the message says why and what to do."""


def load_image(source: str) -> Any:
    """An RGB `PIL.Image` from a file, or from "sample:china" and "sample:flower". Raises ImageError.

    Files are turned upright as their EXIF data say.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if source.startswith("sample:"):
        return Image.fromarray(_sample(source.removeprefix("sample:")))
    path = Path(source).expanduser()
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as missing:
        known = ", ".join(f"sample:{name}" for name in SAMPLES)
        raise ImageError(f"there is no image {source}; samples that need no file: {known}") from missing
    except UnidentifiedImageError as unknown:
        raise ImageError(f"{source} is not an image that Pillow can read") from unknown
    except (OSError, Image.DecompressionBombError) as broken:  # truncated, no permission, a folder, huge
        raise ImageError(f"cannot read {source}: {broken}") from broken


def _sample(name: str) -> Any:
    if name not in SAMPLES:
        raise ImageError(f"there is no sample {name!r}, only {' and '.join(SAMPLES)}")
    try:
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError as missing:
        raise ImageError("sample images come with scikit-learn: pip install scikit-learn") from missing
    return load_sample_image(f"{name}.jpg")


def preprocess(image: Any, config: dict[str, Any]) -> Tensor:
    """The image as [1, C, H, W] float32, by the facts of a model's `default_cfg`.

    The shorter side becomes input size / crop_pct (antialiased), the centre is cropped, values go to 0 .. 1,
    mean and std are applied. One channel takes the luminance. Raises ImageError for other channel counts.
    """
    import numpy
    from PIL import Image

    channels, height, width = config.get("input_size", (3, 224, 224))
    if channels not in (1, 3):
        raise ImageError(f"the model wants {channels} channels; a photograph gives 1 or 3")
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    scale = max(height, width) / config.get("crop_pct", 0.875) / min(image.size)
    size = [max(round(side * scale), least) for side, least in zip(image.size, (width, height), strict=True)]
    resized = image.resize(size, filters[config.get("interpolation", "bilinear")])
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cropped = resized.crop((left, top, left + width, top + height)).convert("L" if channels == 1 else "RGB")

    pixels = numpy.asarray(cropped, dtype=numpy.float32).reshape(height, width, channels) / 255
    mean = numpy.asarray(config.get("mean", (0.485, 0.456, 0.406)), dtype=numpy.float32)
    std = numpy.asarray(config.get("std", (0.229, 0.224, 0.225)), dtype=numpy.float32)
    normalised = ((pixels - mean) / std).transpose(2, 0, 1)
    return torch.from_numpy(numpy.ascontiguousarray(normalised)).unsqueeze(0)

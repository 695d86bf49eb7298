"""A photograph from a file or a sample, as a model wants it.

image = load_image("sample:china")                    scikit-learn ships china and flower
x = preprocess(load_image("cat.jpg"), model.default_cfg)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    """The image as [1, C, H, W] float32, by `transforms_for` of a model's `default_cfg`.

    Raises ImageError where that has no way from a photograph to the model's input.
    """
    import fast_backbones as fb

    try:
        return fb.transforms_for(config)(image).unsqueeze(0)
    except ValueError as problem:
        raise ImageError(str(problem)) from problem

"""Embeddings of all images of a folder, as a matrix (.npy) or a table (.parquet).

A file appears under its name when it is complete: rows are written beside it first, and what is left of an
interrupted run is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDINGS = (".npy", ".parquet")
ROWS_PER_GROUP = 1024  # of a Parquet file


class Refused(Exception):
    """What was asked for cannot be done here; the message says why and what to do."""


class Unreadable(Exception):
    """An image cannot be read; the message says which and why."""


@dataclass
class Extracted:
    """What became of the images: their paths in the order of the rows, and why the others have none."""

    paths: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    dimension: int = 0


def images_in(folder: Path) -> list[Path]:
    """Files below the folder with the ending of an image format, relative to it, sorted by path."""
    from PIL import Image

    endings = Image.registered_extensions()
    found = (path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    return sorted((path.relative_to(folder) for path in found), key=lambda path: path.as_posix())


def name_of(path: Path) -> str:
    """With slashes; bytes of a name that are no UTF-8 as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def read(path: Path, transform: Any) -> Any:
    """The image, turned upright as its EXIF data say, as the model wants it: [C, H, W] float32."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return transform(ImageOps.exif_transpose(image))
    except Exception as problem:  # Pillow's plugins raise what they like; the caller tells it by name
        raise Unreadable(f"{type(problem).__name__}: {problem}") from problem


def read_ahead(folder: Path, paths: list[Path], transform: Any, ahead: int) -> Iterator[tuple[Path, Any]]:
    """(path, image or Unreadable) in order; a thread reads at most so many ahead."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[tuple[Path, Any]] = deque()
        try:
            for path in paths:
                waiting.append((path, pool.submit(read, folder / path, transform)))
                if len(waiting) > ahead:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()


def _result(path: Path, future: Any) -> tuple[Path, Any]:
    problem = future.exception()
    if problem is not None and not isinstance(problem, Unreadable):
        raise problem
    return path, problem if problem is not None else future.result()


def extract(
    network: Any, folder: Path, paths: list[Path], out: Path, facts: dict[str, Any], batch: int, strict: bool,
    tell: Any,
) -> Extracted:  # fmt: skip
    """Run a network with pooled features over the images and write one row for each that can be read.

    By a plan the row of an image has the same bits whatever batch it is in.

    Args:
        network: in eval mode, [N, C, H, W] -> [N, features]. paths: relative to the folder; rows keep their
            order. out: ends with .npy or .parquet. facts: kept with the rows. batch: images of a call.
        strict: raise Unreadable at the first image that cannot be read. tell(count): called for each image.
    Raises Unreadable also where no image can be read, OSError where the output cannot be written, and Refused
    where .parquet needs pyarrow, which is absent, or no image can be an input. Then there is no output.
    """
    import torch

    import fast_backbones as fb

    try:
        transform = fb.transforms_for(network)
    except ValueError as problem:
        raise Refused(str(problem)) from problem
    done = Extracted()
    reader = read_ahead(folder, paths, transform, 2 * batch)
    writer = {".npy": Matrix, ".parquet": Table}[out.suffix](out, facts)
    images: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            features = network(torch.stack(images))
        done.dimension = features.shape[1]
        writer.add(done.paths[-len(images) :], features.numpy())
        images.clear()

    try:
        for path, image in reader:
            if isinstance(image, Unreadable):
                if strict:
                    raise Unreadable(f"{name_of(path)}: {image}")
                done.unreadable[name_of(path)] = str(image)
            else:
                done.paths.append(name_of(path))
                images.append(image)
                if len(images) == batch:
                    run()
            tell(1)
        if images:
            run()
        if not done.paths:
            raise Unreadable(f"none of the {len(paths)} images can be read")
        writer.finish(done)
    finally:
        reader.close()
        writer.remove()
    return done


def partial(path: Path) -> Path:
    """Where a file is written before it has its name: in the same folder, so that renaming is one step."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


class Matrix:
    """A float32 matrix [images, features] as .npy, and the paths of its rows in a .json beside it."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out, self.facts, self.rows = out, facts, 0
        self.beside = out.with_suffix(".json")
        self.file = partial(out).open("wb")
        self.dimension = 0

    def header(self) -> None:
        """numpy leaves room in it for any number of rows: a longer matrix has one of the same length."""
        from numpy.lib import format

        shape = {"shape": (self.rows, self.dimension), "fortran_order": False, "descr": "<f4"}
        format.write_array_header_1_0(self.file, shape)

    def add(self, paths: list[str], features: Any) -> None:
        if not self.rows:
            self.dimension = features.shape[1]
            self.header()
        self.file.write(features.astype("<f4", order="C").tobytes())
        self.rows += len(paths)

    def finish(self, done: Extracted) -> None:
        start = self.file.tell() - 4 * self.rows * self.dimension
        self.file.seek(0)
        self.header()
        if self.file.tell() != start:
            raise AssertionError(f"the header of {self.out} has {self.file.tell()} bytes, not {start}")
        self.file.close()
        content = {**self.facts, "paths": done.paths, "unreadable": done.unreadable}
        partial(self.beside).write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial(self.beside), self.beside)
        os.replace(partial(self.out), self.out)

    def remove(self) -> None:
        self.file.close()
        for path in (partial(self.out), partial(self.beside)):
            path.unlink(missing_ok=True)


class Table:
    """Columns `path` (string) and `embedding` (list of float32, of one length) as Parquet."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as missing:
            raise Refused(
                f"{out.name} needs pyarrow: pip install 'fast-backbones[parquet]', or choose a name.npy"
            ) from missing
        self.arrow, self.out, self.facts = pyarrow, out, facts
        self.writer: Any = None
        self.paths: list[str] = []
        self.features: list[Any] = []
        partial(out).open("wb").close()  # says now whether it can be written

    def add(self, paths: list[str], features: Any) -> None:
        self.paths += paths
        self.features.append(features)
        if len(self.paths) >= ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        import numpy

        arrow, matrix = self.arrow, numpy.concatenate(self.features)
        embedding = arrow.FixedSizeListArray.from_arrays(arrow.array(matrix.ravel()), matrix.shape[1])
        columns = {"path": arrow.array(self.paths, arrow.string()), "embedding": embedding}
        table = arrow.table(columns).replace_schema_metadata(
            {key: json.dumps(value) for key, value in self.facts.items()}
        )
        if self.writer is None:
            self.writer = arrow.parquet.ParquetWriter(partial(self.out), table.schema)
        self.writer.write_table(table)
        self.paths, self.features = [], []

    def finish(self, done: Extracted) -> None:
        if self.paths:
            self.flush()
        self.writer.close()
        os.replace(partial(self.out), self.out)

    def remove(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported by the write before
                self.writer.close()
        partial(self.out).unlink(missing_ok=True)

"""Folders of images, one a class, and batches of them that depend on (seed, epoch, index) alone.

A sample's crop and flip are drawn from a generator that is seeded by these three numbers, and an epoch's
order by the first two. So a run that goes on in the middle of an epoch sees what it would have seen, whatever
the number of loader workers.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import Refused
from .processes import Processes

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

GRACE = 30  # seconds in which the main process may save after SIGTERM; torchrun waits as long

Key = tuple[int, int]  # epoch and index of a sample


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images below `root`, whose folders are the classes. Indexed by (epoch, index).

    Args:
        classes: names in order of their numbers; None takes the folders in alphabetical order.
        seed: of the random part of `transform`, which draws from PyTorch's CPU generator.
    """

    def __init__(
        self, root: Path, transform: Callable[[Any], Tensor], *, classes: list[str] | None = None, seed: int
    ):
        self.root, self.transform, self.seed = root, transform, seed
        self.classes = class_folders(root)
        if classes is not None:
            unknown = sorted(set(self.classes) - set(classes))
            if unknown:
                raise Refused(f"DATA: {root} has classes that training has not: {', '.join(unknown)}")
            self.classes = classes
        self.samples: list[tuple[str, int]] = []
        for number, name in enumerate(self.classes):
            found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in ENDINGS)
            if not found and classes is None:
                raise Refused(f"DATA: {root / name} has no image ({' '.join(sorted(ENDINGS))})")
            self.samples += [(str(path.relative_to(root)), number) for path in found]
        if not self.samples:
            raise Refused(f"DATA: {root} has no image ({' '.join(sorted(ENDINGS))})")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        name, label = self.samples[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            try:
                with Image.open(self.root / name) as picture:
                    return self.transform(picture), label
            except (OSError, ValueError) as problem:
                raise Refused(f"DATA: {self.root / name} is no usable image: {problem}") from problem

    def digest(self) -> str:
        """Of the names in their order: what an index means."""
        return hashlib.sha256("\n".join(name for name, _ in self.samples).encode()).hexdigest()


def class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise Refused(f"DATA: there is no folder {root}; DATA/train and DATA/val hold one folder a class")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not names:
        raise Refused(f"DATA: {root} has no folders; it should hold one for each class")
    return names


def seed_of(*numbers: int) -> int:
    """A seed that has nothing to do with that of the neighbours."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


class TrainingBatches:
    """The batches of one process: `epoch` and `start`, its first step, are set before each epoch.

    Every step takes `batch` images for each process from one permutation of all; what is left at the end of
    an epoch and fills no step is left out.
    """

    def __init__(self, images: int, batch: int, processes: Processes, seed: int):
        self.images, self.batch, self.processes, self.seed = images, batch, processes, seed
        self.steps = images // (batch * processes.count)
        self.epoch = self.start = 0
        if self.steps == 0:
            raise Refused(
                f"--batch {batch}: a step of {processes.count} processes takes {batch * processes.count} "
                f"images, DATA/train has {images}"
            )

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(
            self.images, generator=torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        )
        for step in range(self.start, self.steps):
            first = (step * self.processes.count + self.processes.rank) * self.batch
            yield [(self.epoch, i) for i in order[first : first + self.batch].tolist()]


def validation_batches(images: int, batch: int, processes: Processes) -> list[list[Key]]:
    """Every image once, on one of the processes."""
    mine = [(0, i) for i in range(processes.rank, images, processes.count)]
    return [mine[i : i + batch] for i in range(0, len(mine), batch)]


def make_loader(dataset: ImageFolder, batches: Any, workers: int, device: torch.device) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_outlive_first_sigterm,
        generator=torch.Generator(),  # else each epoch takes a number from the generator that dropout uses
    )


def _outlive_first_sigterm(_worker: int) -> None:
    """A SIGTERM to the whole group is for the main process, which saves and then ends its workers.

    The alarm ends them where it does not get that far.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def end_workers(loader: DataLoader[Any]) -> None:
    """Now, and not when the program ends: a traceback may keep the loader until then."""
    iterator = getattr(loader, "_iterator", None)  # of persistent workers
    if iterator is not None:
        iterator._shutdown_workers()

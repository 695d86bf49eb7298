"""What a run says: a bar on a terminal, plain lines elsewhere, TensorBoard if asked. By rank 0 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import Refused


def make_writer(folder: Path | None, step: int) -> Any:
    """A TensorBoard writer whose entries from `step` on, of a run that was killed, are void."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise Refused(
            f"--log-dir needs the package tensorboard (pip install tensorboard): {problem}"
        ) from None
    return SummaryWriter(folder, purge_step=step)


class Show:
    """Progress of an epoch and lines between epochs; silent where `loud` is False."""

    def __init__(self, loud: bool, writer: Any = None):
        self.loud, self.writer = loud, writer
        self.console = Console(stderr=True, quiet=not loud)
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def line(self, text: str) -> None:
        if self.loud:
            print(text, flush=True)

    def begin(self, name: str, done: int, total: int) -> None:
        self.name, self.total = name, total
        if self.loud and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.task = self.bar.add_task(name, total=total, completed=done)
            self.bar.start()

    def step(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def log(self, done: int, at: int, loss: float, rate: float, images_per_second: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=f"{self.name}  loss {loss:.3f}")
        else:
            speed = f"{images_per_second:.0f} images/s"
            self.line(f"{self.name} step {done}/{self.total}  loss {loss:.4f}  lr {rate:.3g}  {speed}")
        self.scalars(at, {"train/loss": loss, "train/lr": rate, "train/images_per_second": images_per_second})

    def scalars(self, at: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, at)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def close(self) -> None:
        self.end()
        if self.writer is not None:
            self.writer.close()

"""Train LeNet-5 on handwritten digits in seconds, save it, load it again, and run it as one fused plan.

    python examples/digits.py                                  # writes lenet5_digits.safetensors
    python examples/digits.py --output lenet5.pth --epochs 10 --seed 1
    python examples/digits.py --split last                     # the last fifth of the file as the test

The data are scikit-learn's `load_digits`: 1797 images of 8x8 pixels, values 0 to 16, no download. A fifth of
them is set aside for the test, looked at once, after the last epoch. By default it is drawn at random, each
digit in proportion; `--split last` takes the last fifth of the file instead. That is harder: 13 people wrote
these digits, and neighbours in the file seem to be by the same hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fast_backbones as fb
from fast_backbones import engine, training

BACKGROUND, INK = -0.1, 1.175  # LeCun et al. 1998: mean near 0 and variance near 1
CHARACTER, IMAGE = 20, 32  # the paper's digits fill a box of 20x20 in an image of 32x32
SHIFT = 2  # training images move by up to this many pixels
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Data:
    """Images [N, 1, 32, 32] and labels [N] of the two parts, which share no image."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Result:
    """What a run measured. `why_not` is None when the fused plan made the predictions of `fused_*`."""

    accuracy: float
    train_accuracy: float
    seconds: float
    checkpoint: str
    why_not: str | None
    fused_predictions_equal: bool
    fused_largest_difference: float


def as_lenet_images(pixels: Tensor) -> Tensor:
    """[N, 8, 8] values from 0 (background) to 16 (ink) -> [N, 1, 32, 32], as the paper prepares its digits.

    Bilinear to 20x20, padded by 6 on every side with background, 0 -> -0.1 and 16 -> 1.175.
    """
    x = F.interpolate(pixels.unsqueeze(1) / 16.0, size=(CHARACTER, CHARACTER), mode="bilinear")
    x = BACKGROUND + (INK - BACKGROUND) * x
    return F.pad(x, [(IMAGE - CHARACTER) // 2] * 4, value=BACKGROUND)


def load_data(split: str, seed: int) -> Data:
    digits = load_digits()
    images = as_lenet_images(torch.from_numpy(digits.images).float())
    labels = torch.from_numpy(digits.target).long()
    if split == "random":
        parts = train_test_split(
            range(len(labels)), test_size=TEST_SHARE, stratify=digits.target, random_state=seed
        )
        train, test = (torch.tensor(part) for part in parts)
    else:
        border = len(labels) - round(TEST_SHARE * len(labels))
        train, test = torch.arange(border), torch.arange(border, len(labels))
    return Data(images[train], labels[train], images[test], labels[test])


def shifted(images: Tensor) -> Tensor:
    """The batch moved by one random offset, background where nothing was."""
    wide = F.pad(images, [SHIFT] * 4, value=BACKGROUND)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    return wide[:, :, down : down + IMAGE, right : right + IMAGE]


def train(data: Data, epochs: int, batch: int, progress: Progress) -> nn.Module:
    """SGD with Nesterov momentum, a tenth of the rate after 60 and 85 % of the epochs, label smoothing."""
    model = fb.lenet5().train()
    groups = training.parameter_groups(model, weight_decay=1e-4, biases=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    milestones = sorted({max(1, epochs * 60 // 100), max(2, epochs * 85 // 100)})
    schedule = training.step_schedule(optimizer, milestones=milestones)
    loss_of = training.LabelSmoothingCrossEntropy(0.1)
    task = progress.add_task("training", total=epochs, loss="")
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(data.train_labels)).split(batch):
            loss = loss_of(model(shifted(data.train_images[chosen])), data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        schedule.step()
        progress.update(task, advance=1, loss=f"loss {total / len(data.train_labels):.3f}")
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def save(model: nn.Module, path: Path) -> None:
    """A .safetensors file, or with any other ending what torch.save writes."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


@torch.inference_mode()
def compare(model: nn.Module, images: Tensor) -> tuple[str | None, bool, float]:
    """The fused engine against the plain modules: why not fused, equal predictions?, largest difference."""
    fused, plain = model(images), model.forward_modules(images)
    equal = torch.equal(fused.argmax(1), plain.argmax(1))
    return engine.why_not(model, images), equal, (fused - plain).abs().max().item()


def run(options: argparse.Namespace, console: Console) -> Result:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = load_data(options.split, options.seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        model = train(data, options.epochs, options.batch, progress)
    seconds = time.perf_counter() - start

    save(model, options.output)
    loaded = fb.lenet5(weights=options.output).eval()
    why_not, equal, difference = compare(loaded, data.test_images)
    return Result(
        accuracy=accuracy(loaded, data.test_images, data.test_labels),
        train_accuracy=accuracy(loaded, data.train_images, data.train_labels),
        seconds=round(seconds, 2),
        checkpoint=str(options.output),
        why_not=why_not,
        fused_predictions_equal=equal,
        fused_largest_difference=difference,
    )


def report(result: Result, options: argparse.Namespace) -> None:
    print(f"test accuracy   {result.accuracy:.2%}  (train {result.train_accuracy:.2%})")
    print(f"training        {result.seconds:.1f} s, {options.epochs} epochs, seed {options.seed}")
    print(f"checkpoint      {result.checkpoint}")
    how = "one fused plan" if result.why_not is None else f"plain modules, because {result.why_not}"
    same = "the same predictions" if result.fused_predictions_equal else "OTHER PREDICTIONS"
    print(f"loaded again    {how}: {same}, largest difference {result.fused_largest_difference:.1e}")
    if options.explain:
        model = fb.lenet5(weights=options.output).eval()
        with torch.inference_mode():
            print(fb.explain(model, load_data(options.split, options.seed).test_images[:1]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="at least 1 [%(default)s]")
    parser.add_argument("--batch", type=int, default=32, help="images of a step [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of everything random [%(default)s]")
    parser.add_argument(
        "--split", choices=("random", "last"), default="random", help="the test fifth [%(default)s]"
    )
    parser.add_argument("--output", type=Path, default=Path("lenet5_digits.safetensors"), help="checkpoint")
    parser.add_argument(
        "--threads", type=int, default=1, help="more cost more than they gain, LeNet-5 is small [%(default)s]"
    )
    parser.add_argument("--explain", action="store_true", help="print each step of the fused plan")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    if min(options.epochs, options.batch, options.threads) < 1:
        parser.error("--epochs, --batch and --threads must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when the loaded model predicts something else than its modules do."""
    options = parse(arguments)
    result = run(options, Console(stderr=True))
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        report(result, options)
    return 0 if result.fused_predictions_equal else 1


if __name__ == "__main__":
    sys.exit(main())

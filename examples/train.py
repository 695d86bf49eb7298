"""Train a backbone on a folder of images, on one process or many, and go on after any interruption.

    python examples/train.py DATA --model resnet18 --output trained
    torchrun --nproc-per-node 2 examples/train.py DATA --model resnet18 --output trained --resume auto

DATA holds train/ and val/, and in each of them one folder of images for each class. OUTPUT/last.pt is the
whole state of the run, OUTPUT/best.safetensors the weights, or their moving average, with the best top-1:

    model = fb.resnet18(num_classes=10, weights="trained/best.safetensors").eval()

SIGTERM saves and ends the run; `--resume auto` goes on from the last checkpoint, after SIGTERM as after
kill -9. The same command on as many processes then gives the same weights to the bit as a run that was never
stopped (on a GPU with --deterministic). docs/training.md has the commands for many machines.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

import torch
from train import Refused
from train.loop import Diverged, Run, Stopped
from train.processes import finish, start
from train.settings import parse


def prepare(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = not options.deterministic
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def say(words: object) -> None:
    """On stderr, once for each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train: {words}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 also after SIGTERM, 1 when the loss diverges, 2 when what was asked for makes no sense."""
    options = parse(__doc__.split("\n\n")[0], arguments)
    prepare(options)
    before = signal.getsignal(signal.SIGTERM)
    try:
        processes = start(options.device)
        run = Run(options, processes)
        signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop_asked", True))
        try:
            run.train()
        except Stopped as stopped:
            say(f"{stopped}; --resume auto goes on")
        finish(processes)
    except Refused as refused:
        say(str(refused).rsplit("Refused: ", 1)[-1].strip())  # a loader worker adds its traceback in front
        return 2
    except Diverged as diverged:
        say(diverged)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())

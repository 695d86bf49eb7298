"""The command line and what follows from it: model, optimiser and schedule, by default or by their paper."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

import fast_backbones as fb
from fast_backbones import training

from . import Refused
from .processes import Processes

BASE_RATE, BASE_BATCH = 0.1, 256  # a common rate of SGD for a step of this many images; others in proportion
DEFAULTS: dict[str, Any] = {
    "epochs": 90,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "label_smoothing": 0.1,
    "average_decay": 0.9999,
    "clip_norm": 0.0,
}
# What makes a training: a checkpoint goes on only in a run that agrees in all of it.
TOLD_BY_OPTIONS = (
    *("model", "batch", "seed", "size", "epochs", "recipe", "lr", "momentum", "weight_decay", "warmup"),
    *("label_smoothing", "average_decay", "clip_norm", "drop_rate", "amp", "layout"),
    *("frozen_batch_norm", "sync_batch_norm"),
)


def default(name: str) -> str:
    return f"by default {DEFAULTS[name]:g}"


def parse(description: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "data", type=Path, metavar="DATA", help="folder with train/ and val/, in each a folder for each class"
    )
    add("--model", default="resnet18", help="a name from `fast-backbones list`")
    add("--output", type=Path, default=Path("trained"), help="folder for last.pt and best.safetensors")
    add("--weights", type=Path, help="checkpoint file to start from; another number of classes is fine")
    add("--resume", metavar="auto|FILE", help="go on from a checkpoint; auto: from OUTPUT/last.pt, if there")
    add("--save-every", type=int, default=500, help="steps between checkpoints inside an epoch")
    add("--seed", type=int, default=0, help="of everything random")
    add(
        "--deterministic",
        action="store_true",
        help="algorithms that give the same bits each time, on a GPU too",
    )

    what = parser.add_argument_group("training", "with --recipe, what is not given is the paper's")
    add = what.add_argument
    add("--recipe", action="store_true", help="optimiser, schedule and numbers of the model's paper")
    add("--epochs", type=int, help=default("epochs"))
    add("--batch", type=int, default=32, help="images of a step on each process")
    add("--size", type=int, help="side of the images in pixels; by default the model's own")
    add("--lr", type=float, help=f"by default {BASE_RATE} for {BASE_BATCH} images a step, in proportion")
    add("--momentum", type=float, help=default("momentum"))
    add(
        "--weight-decay",
        type=float,
        help=f"of filters; norms and biases have none, but with --recipe; {default('weight_decay')}",
    )
    add(
        "--warmup",
        type=float,
        default=0.05,
        help="share of the steps in which the rate rises; not with --recipe",
    )
    add("--label-smoothing", type=float, help=default("label_smoothing"))
    add(
        "--average-decay",
        type=float,
        help=f"of the moving average of the weights; 0: no average; {default('average_decay')}",
    )
    add("--clip-norm", type=float, help="largest norm of the gradient; 0: any")
    add("--drop-rate", type=float, help="dropout before the classifier; by default the model's own")
    add("--frozen-batch-norm", action="store_true", help="statistics, scales and shifts stay as they are")
    add("--sync-batch-norm", action="store_true", help="statistics over all processes (GPUs)")

    add = parser.add_argument_group("machine").add_argument
    add("--amp", choices=("bfloat16", "float16", "none"), default="none", help="autocast")
    add("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--workers", type=int, default=4, help="loader processes of each process; 0: none")
    add("--threads", type=int, help="of each process; by default what PyTorch takes")
    add("--log-every", type=int, default=20, help="steps between two reports of the loss")
    add("--log-dir", type=Path, help="folder for TensorBoard")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch", "size", "threads", "save_every", "log_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= options.warmup < 1 or options.workers < 0 or options.seed < 0:
        parser.error("--warmup must be in [0, 1), --workers and --seed not negative")
    if options.frozen_batch_norm and options.sync_batch_norm:
        parser.error("--frozen-batch-norm has no statistics that --sync-batch-norm could share")
    return options


def settle(options: argparse.Namespace, processes: Processes) -> training.Recipe | None:
    """Fill in what the command line left open, from the recipe or the defaults; returns the recipe."""
    recipe = None
    known = dict(DEFAULTS)
    if options.recipe:
        try:
            recipe = training.recipe(options.model)
        except ValueError as problem:
            raise Refused(f"--recipe: {problem}") from None
        known = {name: getattr(recipe, name) for name in DEFAULTS}
        known["average_decay"] = known["average_decay"] or 0.0
        known["clip_norm"] = known["clip_norm"] or 0.0
        known.update(lr=recipe.learning_rate, drop_rate=recipe.drop_rate)
    else:
        known["lr"] = BASE_RATE * options.batch * processes.count / BASE_BATCH
    for name, value in known.items():
        if getattr(options, name) is None:
            if value is None:
                raise Refused(
                    f"--recipe: the {recipe.name} paper names no {name}: give --{name.replace('_', '-')}"
                )
            setattr(options, name, value)
    if options.sync_batch_norm and processes.device.type != "cuda":
        raise Refused("--sync-batch-norm: PyTorch has it for GPUs only, and this runs on the CPU")
    return recipe


def make_model(options: argparse.Namespace, classes: int, processes: Processes) -> nn.Module:
    """The network on its device, with `options.size` filled in; the same weights on every process."""
    torch.manual_seed(options.seed)
    extra = {} if options.drop_rate is None else {"drop_rate": options.drop_rate}
    try:
        model = fb.create_model(options.model, num_classes=classes, weights=options.weights, **extra)
    except (fb.WeightsError, FileNotFoundError) as problem:
        raise Refused(f"--weights: {problem}") from problem
    except ValueError as problem:
        raise Refused(f"--model: {problem}") from problem
    channels, height, width = model.default_cfg["input_size"]
    options.size = options.size or max(height, width)
    model.default_cfg["input_size"] = (channels, options.size, options.size)
    if options.sync_batch_norm and processes.many:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if options.frozen_batch_norm:
        for norm in batch_norms(model):
            norm.requires_grad_(False)
    return model.to(processes.device, memory_format=memory_format(options))


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def memory_format(options: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if options.layout == "channels_last" else torch.contiguous_format


def make_optimizer(
    options: argparse.Namespace, model: nn.Module, recipe: training.Recipe | None
) -> Optimizer:
    """SGD with momentum and no weight decay on norms and biases, or what the paper had."""
    if recipe is not None:
        if recipe.batch_norm_momentum is not None:
            training.set_batch_norm_momentum(model, recipe.batch_norm_momentum)
        numbers = {name: getattr(options, name) for name in ("momentum", "weight_decay")}
        return recipe.replace(learning_rate=options.lr, **numbers).make_optimizer(model)
    groups = training.parameter_groups(model, options.weight_decay, biases=0.0, norms=0.0)
    return torch.optim.SGD(groups, options.lr, momentum=options.momentum)


class CosineSchedule:
    """lr(step) = base * (step + 1) / warmup at first, then base * (1 + cos(pi t)) / 2 with t from 0 to 1."""

    def __init__(self, optimizer: Optimizer, steps: int, warmup: int):
        self.optimizer, self.steps, self.warmup = optimizer, steps, warmup
        self.bases = [group["lr"] for group in optimizer.param_groups]
        self.load_state_dict({"step": 0})

    def factor(self) -> float:
        if self.at < self.warmup:
            return (self.at + 1) / self.warmup
        done = (self.at - self.warmup) / max(1, self.steps - self.warmup)
        return (1 + math.cos(math.pi * done)) / 2

    def step(self) -> None:
        self.load_state_dict({"step": self.at + 1})

    def state_dict(self) -> dict[str, int]:
        return {"step": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["step"]
        for group, base in zip(self.optimizer.param_groups, self.bases):
            group["lr"] = base * self.factor()

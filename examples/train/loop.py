"""Training and validation of one model on one process or many, from any step on."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fast_backbones import training, transforms_for

from . import Refused, checkpoint
from .data import ImageFolder, TrainingBatches, class_folders, end_workers, make_loader, validation_batches
from .processes import Processes
from .settings import (
    TOLD_BY_OPTIONS,
    CosineSchedule,
    batch_norms,
    make_model,
    make_optimizer,
    memory_format,
    settle,
)
from .show import Show, make_writer


class Stopped(Exception):
    """SIGTERM came, and everything is saved."""


class Diverged(Exception):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Scores:
    """Of the validation images: mean cross entropy, shares whose class came first or among five."""

    loss: float
    top1: float
    top5: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} top-1 {self.top1:.2%} top-5 {self.top5:.2%}"


class Run:
    """A training and all of its state. `stop_asked` may be set at any time, by a signal handler for one."""

    def __init__(self, options: argparse.Namespace, processes: Processes):
        self.options, self.processes, self.device = options, processes, processes.device
        self.stop_asked = False
        recipe = settle(options, processes)
        classes = class_folders(options.data / "train")
        self.model: Any = make_model(options, len(classes), processes)
        self._load(classes)
        self.optimizer = make_optimizer(options, self.model, recipe)
        total = options.epochs * self.steps
        self.schedule: Any = (
            CosineSchedule(self.optimizer, total, round(total * options.warmup))
            if recipe is None
            else recipe.make_schedule(self.optimizer)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "float16")
        self.network = self._wrapped()
        self.average = None
        if options.average_decay > 0:
            self.average = training.ExponentialMovingAverage(self.model, options.average_decay, warmup=True)
        self.epoch, self.step, self.best = 0, 0, -1.0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        checkpoint.seed_all(options.seed + 1 + processes.rank)  # dropout: other units on each process
        self._resume()
        self.show = Show(
            processes.first, make_writer(options.log_dir, self.steps_done) if processes.first else None
        )

    def _load(self, classes: list[str]) -> None:
        o, processes = self.options, self.processes
        make = transforms_for(self.model, train=True), transforms_for(self.model)
        self.images = ImageFolder(o.data / "train", make[0], seed=o.seed)
        held_out = ImageFolder(o.data / "val", make[1], classes=classes, seed=o.seed)
        self.batches = TrainingBatches(len(self.images), o.batch, processes, o.seed)
        self.steps = self.batches.steps
        self.loader = make_loader(self.images, self.batches, o.workers, self.device)
        mine = validation_batches(len(held_out), o.batch, processes)
        self.held_out = make_loader(held_out, mine, o.workers, self.device)

    def _wrapped(self) -> Any:
        """The model as the loop calls it: data parallel over many processes, compiled if asked."""
        network: Any = self.model
        if self.processes.many:
            ids = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(self.model, device_ids=ids)
        if self.options.compile:
            network = torch.compile(network)
        if self.processes.many:
            self._settle_buckets(network)
        return network

    def _settle_buckets(self, network: Any) -> None:
        """One pass of which nothing is kept.

        DDP sorts its buckets anew after its first backward pass, and sums over more than two processes depend
        on where in a bucket a number lies. So a run that goes on has the order of one that never stopped.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self._train_mode()
        channels = self.model.default_cfg["input_size"][0]
        images = torch.zeros(self.options.batch, channels, self.options.size, self.options.size)
        self._loss(network, images, torch.zeros(self.options.batch, dtype=torch.long)).backward()
        self.optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), buffers):
            buffer.copy_(before)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps + self.step

    # ---- training ----

    def train(self) -> None:
        o = self.options
        where = f"{self.processes.count} process{'es' if self.processes.many else ''}, {self.device.type}"
        data = f"{len(self.images)} images of {len(self.images.classes)} classes"
        self.show.line(f"{o.model}: {data}, {self.steps} steps an epoch, {where}")
        try:
            while self.epoch < o.epochs:
                self._train_epoch()
                self._end_epoch()
            self.show.line(f"best top-1 {self.best:.2%}: {o.output / checkpoint.BEST}")
        finally:
            self.show.close()
            end_workers(self.loader)
            end_workers(self.held_out)

    def _train_epoch(self) -> None:
        o = self.options
        self._train_mode()
        self.batches.epoch, self.batches.start = self.epoch, self.step
        self.show.begin(f"epoch {self.epoch + 1}/{o.epochs}", self.step, self.steps)
        since, reported = time.perf_counter(), self.step
        for images, labels in self.loader:
            loss = self._one_step(images, labels)
            self.step += 1
            self.show.step(self.step)
            if self.step % o.log_every == 0:
                mean = self._finite(self.processes.sum(loss) / self.processes.count)
                seconds, count = time.perf_counter() - since, self.step - reported
                speed = count * o.batch * self.processes.count / seconds
                rate = self.optimizer.param_groups[0]["lr"]
                self.show.log(self.step, self.steps_done, mean, rate, speed)
                since, reported = time.perf_counter(), self.step
            if self.processes.any(self.stop_asked):
                self.save()
                raise Stopped(f"stopped by SIGTERM in epoch {self.epoch + 1} after step {self.step}")
            if self.step % o.save_every == 0 and self.step < self.steps:
                self.save()
        self.show.end()

    def _train_mode(self) -> None:
        self.model.train()
        if self.options.frozen_batch_norm:
            for norm in batch_norms(self.model):
                norm.eval()

    def _one_step(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = self._loss(self.network, images, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.options.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        if isinstance(self.schedule, CosineSchedule):
            self.schedule.step()
        loss = loss.detach().double()
        self.loss_sum += loss
        return loss

    def _loss(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """With auxiliary heads, where the network has them."""
        with self._autocast():
            outputs = network(self._input(images))
            labels = labels.to(self.device, non_blocking=True)
            return training.auxiliary_loss(outputs, labels, label_smoothing=self.options.label_smoothing)

    def _input(self, images: Tensor) -> Tensor:
        return images.to(self.device, memory_format=memory_format(self.options), non_blocking=True)

    def _autocast(self) -> torch.autocast:
        amp = self.options.amp
        dtype = None if amp == "none" else getattr(torch, amp)
        return torch.autocast(self.device.type, dtype=dtype, enabled=amp != "none")

    def _finite(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} in epoch {self.epoch + 1}, step {self.step}: try a smaller --lr, a "
                "longer --warmup or --clip-norm"
            )
        return value

    # ---- the end of an epoch ----

    def _end_epoch(self) -> None:
        loss = self._finite(self.processes.sum(self.loss_sum) / (self.processes.count * self.steps))
        scores = self._validate_both()
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(1 - scores["weights"].top1)
        elif not isinstance(self.schedule, CosineSchedule):  # that one steps with the optimiser
            self.schedule.step()
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()
        said = "  ".join(f"{name}: {score}" for name, score in scores.items())
        self.show.line(f"epoch {self.epoch}/{self.options.epochs}  train loss {loss:.4f}  {said}")
        values = {f"{name}/{key}": v for name, score in scores.items() for key, v in vars(score).items()}
        self.show.scalars(self.steps_done, {"train/epoch_loss": loss, **values})
        self._keep_best(scores)
        self.save()

    def _validate_both(self) -> dict[str, Scores]:
        """Of the weights, and of their average. The statistics of batch norms are those of rank 0."""
        self.processes.from_first(self.model)
        random = checkpoint.random_state(self.device)
        scores = {"weights": self._validate()}
        if self.average is not None:
            for name, buffer in self.model.named_buffers():
                self.average.average[name].copy_(buffer)
            with self.average.applied():
                scores["average"] = self._validate()
        checkpoint.set_random_state(random, self.device)
        return scores

    def _validate(self) -> Scores:
        """Without gradients and in eval(): on the CPU, in float32, as one fused plan."""
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            for images, labels in self.held_out:
                labels = labels.to(self.device, non_blocking=True)
                with self._autocast():
                    logits = self.model(self._input(images)).float()
                five = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss, five[:, 0].sum(), five.sum(), labels.new_tensor(len(labels))])
        loss, top1, top5, count = self.processes.sum(sums).tolist()
        return Scores(loss / count, top1 / count, top5 / count)

    def _keep_best(self, scores: dict[str, Scores]) -> None:
        which = max(scores, key=lambda name: scores[name].top1)
        if scores[which].top1 <= self.best:
            return
        self.best = scores[which].top1
        if not self.processes.first:
            return
        o = self.options
        facts = {"model": o.model, "classes": "\n".join(self.images.classes), "size": str(o.size)}
        facts |= {"epoch": str(self.epoch), "which": which, "top1": f"{self.best:.4f}"}
        path = o.output / checkpoint.BEST
        if which == "weights":
            checkpoint.save_weights(path, self.model, facts)
        else:
            with self.average.applied():
                checkpoint.save_weights(path, self.model, facts)

    # ---- checkpoints ----

    def _facts(self) -> dict[str, Any]:
        facts = {name: getattr(self.options, name) for name in TOLD_BY_OPTIONS}
        known = {"classes": self.images.classes, "images": self.images.digest()}
        return {**known, "processes": self.processes.count, **facts}

    def save(self) -> None:
        """Everything, at a border between two steps; called by all processes at the same one."""
        own = {"random": checkpoint.random_state(self.device), "loss_sum": self.loss_sum.cpu()}
        ranks = self.processes.gather(own)
        if not self.processes.first:
            return
        parts = ("model", "average", "optimizer", "schedule", "scaler")
        held = {name: getattr(self, name) for name in parts}
        state = {name: None if part is None else part.state_dict() for name, part in held.items()}
        state |= {"epoch": self.epoch, "step": self.step, "best": self.best, "ranks": ranks}
        checkpoint.save_state(self.options.output / checkpoint.LAST, {"facts": self._facts(), **state})

    def _resume(self) -> None:
        o, last = self.options, self.options.output / checkpoint.LAST
        found = last.is_file()
        if len(set(self.processes.gather(found))) > 1:
            raise Refused(f"--output {o.output}: not every process sees the same files there")
        if o.resume is None and found:
            raise Refused(
                f"--output {o.output} holds {last.name} of an earlier run: --resume auto goes on with it, "
                "another --output starts anew"
            )
        if self.processes.first:
            o.output.mkdir(parents=True, exist_ok=True)
        if o.resume is None or (o.resume == "auto" and not found):
            return
        path = last if o.resume == "auto" else Path(o.resume)
        state = checkpoint.load_state(path)
        checkpoint.check_same(path, state["facts"], self._facts())
        for name in ("model", "average", "optimizer", "schedule", "scaler"):
            if state[name] is not None:
                getattr(self, name).load_state_dict(state[name])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        own = state["ranks"][self.processes.rank]
        self.loss_sum.copy_(own["loss_sum"])
        checkpoint.set_random_state(own["random"], self.device)

"""One stack's training steps in a process of its own; `bench.train` starts these and gives them turns.

    python -m bench.train_worker resnet50 --stack exact --folder DIR      weights and float64 truth, into DIR
    python -m bench.train_worker resnet50 --stack ours --folder DIR       then a turn for each line of stdin

A step is zero_grad, forward, cross entropy (plus 0.3 of each auxiliary head), backward and SGD with momentum.
Every stack starts from the same weights, without dropout, on the same images. The first step is compared with
float64 before anything is timed: the loss, each tensor of gradients, and the running statistics it leaves.

peak_mib    resident memory at its highest in a turn (VmHWM, set back by /proc/self/clear_refs) above what it
            was before the model was made: weights, momentum, gradients, activations, what is imported late,
            and what the malloc that is timed keeps for later
step_mib    the same above what it was when the turn began: gradients and activations

After a turn free memory goes back to the system, since all stacks of a model are alive together; the first
step of the next turn, which is not timed, takes it again. A malloc that was told to keep memory
(MALLOC_TRIM_THRESHOLD_) keeps it, since it takes some steps to find places for everything; step_mib is None.
On a GPU both are PyTorch's count of the device's memory (torch.cuda.max_memory_allocated).

With --dtype bfloat16 forward and loss run under autocast, weights and gradients stay float32.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compare import Error, error
from .exact import depthwise_by_taps
from .memory import CLEAR_REFS, settle, status_kib
from .peer import Plain, package_version
from .subject import input_size, make_model
from .timing import quantile, wait_until_quiet

LEARNING_RATE, MOMENTUM, AUXILIARY = 0.001, 0.9, 0.3
PRODUCERS = ("torchvision", "timm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STUBS: list[torch.library.Library] = []  # a library lives as long as its object


@dataclass(frozen=True)
class Stack:
    """One way to train a model. `public`: torchvision's or timm's module of that name where there is one."""

    name: str
    layout: torch.memory_format = torch.contiguous_format
    reference: bool = False
    public: bool = False
    compiled: bool = False


STACKS = {
    "ours": Stack("fast_backbones", torch.channels_last),
    "reference": Stack("fast_backbones, reference", reference=True),
    "channels_last": Stack("eager channels_last", torch.channels_last, reference=True, public=True),
    "eager": Stack("eager NCHW", reference=True, public=True),
    "compile": Stack("torch.compile", torch.channels_last, reference=True, public=True, compiled=True),
}


def public_maker(name: str) -> tuple[Callable[[], nn.Module], str] | None:
    """What makes torchvision's or timm's network with our parameter names, and whose it is, or None."""
    import fast_backbones as fb

    stub_operators()
    info = fb.model_info(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initialisations and names that will change
        expected = {key: tensor.shape for key, tensor in fb.create_model(info.name).state_dict().items()}
        for producer in PRODUCERS:
            try:
                if producer not in info.compatible_with:
                    continue
                make = getattr(importlib.import_module(f"{producer}.models"), info.name)
                if {key: tensor.shape for key, tensor in make().state_dict().items()} == expected:
                    return make, f"{producer} {package_version(producer)}"
            except (ImportError, AttributeError, RuntimeError):  # not installed, or not of that name
                continue
    return None


def stub_operators() -> None:
    """Let torchvision import beside a PyTorch that cannot load its compiled operators; models use none."""
    found = importlib.util.find_spec("torchvision")
    for library in Path(found.origin).parent.glob("_C*.so") if found else ():
        try:
            torch.ops.load_library(library)
        except OSError:
            if not hasattr(torch.ops.torchvision, "nms"):
                STUBS.append(torch.library.Library("torchvision", "DEF"))
                for name in ("nms", "qnms"):
                    STUBS[0].define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")


def without_dropout(model: nn.Module) -> nn.Module:
    """Random masks differ between stacks, so there are none. Returns the model, in train()."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    return model.train()


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Under which forward and loss are computed; none for float32."""
    return torch.autocast(device, dtype, enabled=dtype is not torch.float32)


def loss_of(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Cross entropy, with the losses of auxiliary heads where the network has them."""
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, labels)
    main, *others = (F.cross_entropy(y, labels) for y in outputs if y is not None)
    return main + AUXILIARY * sum(others)


def make_batch(model: nn.Module, batch: int, image: int | None) -> tuple[Tensor, Tensor]:
    """Seeded noise [batch, C, H, W] and labels, of which the dimensions of an embedding have one each.
    `image` None: the size that the model was made for."""
    channels, height, width = input_size(model)
    size = (height, width) if image is None else (image, image)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, *size, generator=draw)
    return x, torch.randint(0, model.num_classes or model.num_features, (batch,), generator=draw)


# ---- the check ----


def left_by_a_step(model: nn.Module, x: Tensor, labels: Tensor, call: Callable | None = None) -> dict:
    """Loss, gradients and floating-point buffers after forward and backward, by our names, in NCHW."""
    loss = loss_of((model if call is None else call)(x), labels)
    loss.backward()
    plain = {n.removeprefix("model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    state = {n.removeprefix("model."): b for n, b in model.named_buffers() if b.is_floating_point()}
    found = {"loss": loss.detach().clone(), "gradients": plain, "buffers": state}
    return found | {
        k: {n: t.clone().contiguous() for n, t in found[k].items()} for k in ("gradients", "buffers")
    }


def differences(found: dict, exact: dict) -> dict[str, float]:
    """How far a step is from the exact one; infinite where tensors are missing or not finite.

    The loss relative to itself; of gradients and buffers the rms error of each tensor relative to its rms,
    the largest and the middle of these. A gradient that is zero but for rounding (a bias in front of a norm)
    counts relative to a thousandth of the middle tensor's rms.
    """
    result = {"loss": abs(found["loss"].item() / exact["loss"].item() - 1)}
    for kind in ("gradients", "buffers"):
        a, e = found[kind], exact[kind]
        if a.keys() != e.keys():
            return result | {"loss": math.inf, "sentence": f"other {kind}: {sorted(a.keys() ^ e.keys())[:3]}"}
        scales = {name: tensor.square().mean().sqrt().item() for name, tensor in e.items()}
        floor = 1e-3 * quantile(list(scales.values()), 0.5) if scales else 0.0
        errors = []
        for name, tensor in e.items():
            one: Error = error([a[name]], [tensor])
            errors.append(one.rms * (scales[name] or 1.0) / max(scales[name], floor, 1e-300))
        result[kind] = max(errors, default=0.0)
        result[f"{kind}_middle"] = quantile(errors, 0.5) if errors else 0.0
    return {k: v if math.isfinite(v) else math.inf for k, v in result.items()}


def write_truth(options: argparse.Namespace) -> dict:
    """Weights and the float64 step for the other processes; returns PyTorch's own float32 error."""
    import fast_backbones as fb

    with fb.kernels.backend("reference"):
        model = make_model(options.model)
        x, labels = make_batch(model, options.batch, options.image)
        start = {"weights": copy.deepcopy(model.state_dict()), "images": x, "labels": labels}
        torch.save(start, options.folder / "start.pt")
        module = without_dropout(Plain(model))
        with autocast("cpu", DTYPES[options.dtype]):
            own = left_by_a_step(module, x, labels)
        model.load_state_dict(start["weights"])
        module.zero_grad()
        with depthwise_by_taps():
            exact = left_by_a_step(module.double(), x.double(), labels)
    torch.save(exact, options.folder / "truth.pt")
    return {"own": differences(own, exact), "shape": list(x.shape)}


# ---- the steps ----


class Trainer:
    """A stack with its model, images and optimizer."""

    def __init__(self, options: argparse.Namespace):
        import fast_backbones as fb

        self.stack = stack = STACKS[options.stack]
        # What PyTorch imports late (optimizers want torch._dynamo, 150 MB) is not memory of the steps.
        importlib.import_module("torch._inductor.compile_fx" if stack.compiled else "torch._dynamo")
        public = public_maker(options.model) if stack.public else None
        make, source = public or (lambda: fb.create_model(options.model), f"fast_backbones {fb.__version__}")
        settle()
        self.device, self.dtype = torch.device(options.device), DTYPES[options.dtype]
        torch.backends.cudnn.benchmark = True
        self.before = self.allocated_kib()
        start = torch.load(options.folder / "start.pt", weights_only=True, mmap=True)
        self.model = make()
        self.model.load_state_dict(start["weights"])
        self.x = start["images"].to(self.device, copy=True).contiguous(memory_format=stack.layout)
        self.labels = start["labels"].to(self.device, copy=True)
        del start
        without_dropout(self.model).to(self.device, memory_format=stack.layout)
        own_modules = stack.public and public is None
        self.module = Plain(self.model) if own_modules else self.model
        self.call = torch.compile(self.module, dynamic=False) if stack.compiled else self.module
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        layout = "channels_last" if stack.layout is torch.channels_last else "NCHW"
        self.settings = {"modules": source, "layout": layout, "threads": str(options.threads)}
        self.settings |= {"dtype": options.dtype}
        self.settings |= {"backend": "reference" if stack.reference else "default"}
        if self.device.type != "cpu":
            self.settings |= {"device": torch.cuda.get_device_name(self.device)}

    def allocated_kib(self) -> float:
        """Memory in use now: of the process, or of PyTorch on the GPU."""
        return torch.cuda.memory_allocated() / 1024 if self.device.type == "cuda" else status_kib("VmRSS")

    def highest_kib(self) -> float:
        """The highest since `forget_highest`."""
        return torch.cuda.max_memory_allocated() / 1024 if self.device.type == "cuda" else status_kib("VmHWM")

    def forget_highest(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            CLEAR_REFS.write_text("5")

    def backend(self):
        import fast_backbones as fb

        return fb.kernels.backend("reference") if self.stack.reference else contextlib.nullcontext()

    def check(self, folder: Path) -> dict[str, float]:
        """The first step against float64, see `differences`."""
        with self.backend(), autocast(self.device.type, self.dtype):
            found = left_by_a_step(self.module, self.x, self.labels, self.call)
        for kind in ("gradients", "buffers"):
            found[kind] = {name: tensor.cpu() for name, tensor in found[kind].items()}
        self.optimizer.zero_grad()
        return differences(found, torch.load(folder / "truth.pt", weights_only=True, mmap=True))

    def step(self) -> float:
        self.optimizer.zero_grad()
        with autocast(self.device.type, self.dtype):
            loss = loss_of(self.call(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def turn(self, steps: int) -> dict:
        """One step that is not timed, then so many that are; what is reported of them."""
        seconds = []
        keeps = "MALLOC_TRIM_THRESHOLD_" in os.environ
        settle(trim=not keeps)
        resident = self.allocated_kib()
        self.forget_highest()
        gc.disable()  # a collection would be charged to whoever happens to run
        with self.backend():
            self.step()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(steps):
                start = time.perf_counter()
                loss = self.step()
                seconds.append(time.perf_counter() - start)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        gc.enable()
        peak = self.highest_kib()
        self.optimizer.zero_grad()
        settle(trim=not keeps)
        wait_until_quiet()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss became {loss}")
        step = None if keeps else (peak - resident) / 1024
        memory = {"peak_mib": (peak - self.before) / 1024, "step_mib": step}
        return {"seconds": seconds, "faults": faults / steps, "loss": loss} | memory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_worker", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--stack", choices=("exact", *STACKS), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="weights and truth are there")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        if options.stack == "exact":
            print(json.dumps(write_truth(options)), file=answers)
            return 0
        start = time.perf_counter()
        trainer = Trainer(options)
        errors = trainer.check(options.folder)
        ready = {"settings": trainer.settings, "error": errors, "prepare_s": time.perf_counter() - start}
        print(json.dumps(ready), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(trainer.turn(int(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

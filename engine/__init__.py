"""A whole network in eval mode becomes a plan: capture, fuse, select, place, run.

forward(model, x, plain)   the plan's result where a plan may be used, else plain(x)
why_not(model, x)          the sentence why no plan is used; None when one is
plan_for(model, x)         the plan as plain data
launches_for(model, x)     on a GPU: the plan as a list of kernel launches
plan_summary(plan)         a few words about it
explain(model, x)          each step: kernel, what was fused and what not, time, share of its bound
tune(model, x)             measure which algorithm each layer should take on this machine
optimize_(model)           any module gets the engine, in place
revert_(model)             ... and loses it
save_plan(model, x, path)  the plan and its weights go into a file
load_plan(path)            ... and come back as something to call, without the model
refresh(model)             forget everything about a model, after a change that cannot be noticed
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .choices import Tuning
from .explain import Explanation, plan_summary
from .explain import explain as _explain
from .gpu_choices import tune as _tune_on_gpu
from .launches import LaunchList
from .loaded_plan import LoadedPlan, load_plan
from .optimize import call_of, plain_class, swap_back, swap_class
from .plan import Plan
from .plan_file import PlanFileError, PlanFileNotFoundError
from .rules import call_refusal, training_call_refusal
from .run_cuda import CudaRunner
from .saved_plan import save_plan as _save_plan
from .state import ATTRIBUTE, AnyRunner, EngineState
from .strides import shown_strides, usual_strides
from .train_program import Program
from .tuning import tune as _tune

__all__ = [
    "Explanation",
    "LoadedPlan",
    "Plan",
    "PlanFileError",
    "PlanFileNotFoundError",
    "Tuning",
    "explain",
    "forward",
    "launches_for",
    "load_plan",
    "optimize_",
    "plan_for",
    "plan_summary",
    "refresh",
    "revert_",
    "save_plan",
    "tune",
    "why_not",
    "why_not_fused",
]

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def forward(model: nn.Module, x: Tensor, plain: MethodType) -> Any:
    """Run the model on x, by its plan if that is allowed and by `plain` if not.

    Args:
        model: in eval mode, float32 or bfloat16 on the CPU to get a plan; `why_not` has the whole list.
        x: [N, C, H, W]; contiguous or channels_last is read as it is, other strides are copied first,
            and run the modules where they show in the result.
        plain: the model's ordinary forward, a bound method of the model.
    Returns: what plain(x) returns, with the same type and strides; numbers within the rounding of that type,
        or of what torch.set_float32_matmul_precision allows.
    """
    if torch.compiler.is_dynamo_compiling():
        return plain(x)
    if model.training and type(x) is Tensor:
        return _train(model, x, plain)
    state = model.__dict__.get(ATTRIBUTE)
    shortcut = state.runners.shortcut if state is not None else None  # held here while it runs
    if shortcut is not None:
        result = shortcut.call(model, x, plain)
        if result is not None:
            state.calls += 1
            return result
    if call_refusal(model, x) is not None:
        return plain(x)
    dense = usual_strides(x)
    if dense is not x and isinstance(_runner(model, x, plain), str):
        return plain(x)
    return EngineState.of(model).forward(model, plain, dense)


def _train(model: nn.Module, x: Tensor, plain: MethodType) -> Any:
    """A forward in train(), with fused steps where that is allowed."""
    if training_call_refusal(x) is not None:
        return plain(x)
    program = EngineState.of(model).training(model, plain)
    return plain(x) if isinstance(program, str) else program(x)


def why_not_fused(model: nn.Module, x: Tensor) -> str | None:
    """Why `model(x)` in train() runs its modules one by one; None when what can be fused is."""
    if not model.training:
        return "the model is in eval mode"
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    return training_call_refusal(x) or _reason(EngineState.of(model).training(model, plain_of(model)))


def why_not(model: nn.Module, x: Tensor) -> str | None:
    """Why `model(x)` runs its modules and not a plan; None when it uses a plan. May make that plan."""
    return call_refusal(model, x) or _reason(_runner(model, x))


def plan_for(model: nn.Module, x: Tensor) -> Plan:
    """The plan that `model(x)` uses. RuntimeError with the sentence of `why_not` when there is none."""
    return _require(model, x).plan


def launches_for(model: nn.Module, x: Tensor) -> LaunchList:
    """The kernel launches of `model(x)` on the GPU that both are on, bound to memory of their own and to x.
    RuntimeError with the sentence of `why_not` when there is no plan."""
    runner = _require(model, x)
    if not isinstance(runner, CudaRunner):
        raise RuntimeError(f"the plan for an input on {x.device} has no launches")
    return runner.launch_list(usual_strides(x))


def explain(model: nn.Module | LoadedPlan, x: Tensor, repeats: int = 5) -> Explanation:
    """Run the plan of `model(x)` step by step and tell what each costs; without a plan, tell why not."""
    if isinstance(model, LoadedPlan):
        return _explain(*model.bound(x), repeats)
    runner = call_refusal(model, x) or _runner(model, x)
    return _explain(runner, usual_strides(x), repeats)


def tune(
    model: nn.Module,
    x: Tensor,
    *,
    rounds: int = 7,
    again: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Tuning:
    """Measure which algorithm (direct, Winograd's with one tile or another, by groups) is the fastest here
    for each convolution that has a choice, and let this model use it from now on.

    Without this the sizes of a layer decide, so that results are the same bits on every machine with AVX2.
    With it they may differ between machines within the rounding of each algorithm (all keep the 2x rule);
    they still do not depend on the batch or the threads, because a choice belongs to the layer's sizes.
    Tune with the batch you care most about. Choices are kept in a file for this processor and version, in
    FB_CACHE_DIR or ~/.cache/fast_backbones, and are not measured again; copies of the model, and other
    models, use them once tuned themselves.

    On a GPU the choice is among Triton's tiles, CUDA C++ and PyTorch's libraries, for every step. The file is
    for this GPU, driver, PyTorch and Triton, and all models use it from the next graph on.

    Args:
        model: in eval mode, as for a plan. x: [N, C, H, W], an input of the size that will be used.
        rounds: how often everything is measured; the median counts. again: measure even what is known.
        progress: called with the share that is done, below 1, and a few words; not when all is known.
    Returns: every layer with a choice, what each algorithm took, and what was chosen; `print` it.
    Raises RuntimeError with the sentence of `why_not` where there is no plan, ValueError for rounds < 1.
    """
    if rounds < 1:
        raise ValueError(f"tune: rounds is {rounds}, expected at least 1")
    with torch.no_grad():
        runner = _require(model, x)
        if isinstance(runner, CudaRunner):
            return _tune_on_gpu(EngineState.of(model), runner, usual_strides(x), rounds, again, progress)
        return _tune(model, usual_strides(x), plain_of(model), rounds, again, progress)


def optimize_(model: AnyModule, *, dynamic_batch: bool = True) -> AnyModule:
    """Let any convolutional network use plans in eval(), in place, as the backbones of this library do.

    Calls with one image tensor [N, C, H, W] among their arguments (in lists, tuples and dicts, too), beside
    numbers, strings and None, run the plan for its shape; the first call with a shape makes it. Of batches of
    2 and more the first two are captured, and plans for all others made from that in milliseconds. What the
    engine has no kernel for runs through PyTorch inside the plan. Everything else runs the modules as before:
    `why_not(model, x)` is the reason, and where it is about the network (a forward that looks at values,
    say), a warning says it once. In train() the modules run.

    The model gets a class of its own, derived from the one it has, with the same name, module and signature.
    Parameters, buffers, state_dict, hooks and attributes stay what they are; weights may change at any time.
    Copies are optimized, pickles hold the plain model. `torch.jit.script` wants `revert_` first.

    Args:
        model: any nn.Module. One that is optimized already, or a backbone of this library, stays as it is.
        dynamic_batch: False captures the forward for each batch anew. That is for a forward that asks for its
            batch in ways that PyTorch's symbolic sizes do not see, `f"{x.shape[0]}"` or `type(x.shape[0])`;
            comparisons and arithmetic they see. An optimized model takes the new setting.
    Returns: the model.
    Raises TypeError for what is no nn.Module, and for modules of TorchScript and torch.compile.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_: model is a {type(model).__name__}, expected an nn.Module")
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ == "OptimizedModule":
        kind = type(model).__name__
        raise TypeError(f"optimize_: model is a {kind}, whose code is fixed: optimize what it was made from")
    if not hasattr(model, "forward_modules"):
        swap_class(model, _optimized_forward, dynamic_batch)
    return model


def revert_(model: AnyModule) -> AnyModule:
    """Undo optimize_: the model has its old class again and forgets its plans. Weights are what they are now.

    A model that is not optimized stays as it is. Returns the model. RuntimeError where somebody has given the
    model yet another class since.
    """
    swap_back(model)
    return model


def _optimized_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain = plain_class(model).forward
    if model.training or torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return plain(model, *args, **kwargs)
    found = call_of(model, args, kwargs)
    if found is None or type(found[0]) is not Tensor:
        return plain(model, *args, **kwargs)
    return forward(model, *found)


def save_plan(
    model: nn.Module,
    images: Tensor | Sequence[Any],
    path: str | os.PathLike[str],
    *,
    weights: str = "both",
    dynamic_batch: bool = True,
) -> None:
    """Write the plan of `model(image)` and its weights into a file that runs without the model's code.

    The file is a .safetensors file whose header also holds the captured program as JSON. `fb.load_plan(path)`
    gives a callable with the results of the model's own plan, to the bit. Weights, tuned choices
    (fb.tune) and the precision that torch.set_float32_matmul_precision allows are those of this moment. The
    file is written whole or not at all: under another name first, which is then changed.

    Args:
        model: any nn.Module in eval mode that has a plan, a backbone of this library or not.
        images: an image [N, C, H, W], whose values do not matter, its sizes as (N, C, H, W), or a list of
            these: one for each size, memory layout and type that is to be served. Sizes alone mean NCHW in
            the type of the model's weights.
        path: of the file; one that is there is replaced.
        weights: "both" packed and plain weights; "plain" ones, from which weights are packed when the file is
            loaded; or "packed" ones, which serve this instruction set and version of the library alone.
            "both" are used as they are where they fit, and packed anew elsewhere. ResNet-50: 238, 103 and
            135 MB, loaded in 0.38, 0.52 and 0.30 s by one thread; "both" is the default, as it serves every
            machine and spares the packing.
        dynamic_batch: the plan takes batches of any size, if the forward does the same with all of them; a
            warning says so if it does not. False, and then: only the batches of `images`.
    Raises TypeError and ValueError for arguments that are none of these, RuntimeError with the sentence of
    `why_not` where there is no plan, and ValueError with the step where one calls what a file cannot name:
    operations that are neither PyTorch's own nor ours. OSError where the file cannot be written.
    """
    plain = plain_of(model) if isinstance(model, nn.Module) else None
    _save_plan(model, images, path, plain, weights, dynamic_batch)


def refresh(model: nn.Module) -> None:
    """Forget plans, packed weights and tuned choices of the model; the next call makes plans anew."""
    model.__dict__.pop(ATTRIBUTE, None)


def plain_of(model: nn.Module) -> MethodType:
    """The ordinary forward: `forward_modules` of a backbone, the class's forward of any other module."""
    found = getattr(model, "forward_modules", None)
    return found if found is not None else MethodType(plain_class(model).forward, model)


def _runner(model: nn.Module, x: Tensor, plain: MethodType | None = None) -> AnyRunner | str:
    """The plan for x, or why there is none."""
    dense = usual_strides(x)
    runner = EngineState.of(model).runner(model, plain or plain_of(model), dense)
    reason = shown_strides(x, runner.plan) if dense is not x and not isinstance(runner, str) else None
    return reason or runner


def _reason(runner: AnyRunner | Program | str) -> str | None:
    return runner if isinstance(runner, str) else None


def _require(model: nn.Module, x: Tensor) -> AnyRunner:
    runner = call_refusal(model, x) or _runner(model, x)
    if isinstance(runner, str):
        raise RuntimeError(f"there is no plan: {runner}")
    return runner

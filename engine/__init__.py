"""A whole network in eval mode becomes a plan: capture, fuse, select, place, run.

forward(model, x, plain)   the plan's result where a plan may be used, else plain(x)
why_not(model, x)          the sentence why no plan is used; None when one is
plan_for(model, x)         the plan as plain data
plan_summary(plan)         a few words about it
explain(model, x)          each step: kernel, what was fused, time, share of the machine's peak
refresh(model)             forget everything about a model, after a change that cannot be noticed
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from .explain import Explanation, plan_summary
from .explain import explain as _explain
from .plan import Plan
from .rules import call_refusal
from .run_cpu import Runner
from .state import ATTRIBUTE, EngineState
from .strides import shown_strides, usual_strides

__all__ = ["Explanation", "Plan", "explain", "forward", "plan_for", "plan_summary", "refresh", "why_not"]


def forward(model: nn.Module, x: Tensor, plain: MethodType) -> Any:
    """Run the model on x, by its plan if that is allowed and by `plain` if not.

    Args:
        model: in eval mode, float32 or bfloat16 and on the CPU to get a plan; `why_not` has the whole list.
        x: [N, C, H, W]; contiguous or channels_last is read as it is, other strides are copied first,
            and run the modules where they show in the result.
        plain: the model's ordinary forward, a bound method of the model.
    Returns: what plain(x) returns, with the same type and strides; numbers within the rounding of that type,
        or of what torch.set_float32_matmul_precision allows.
    """
    if call_refusal(model, x) is not None:
        return plain(x)
    dense = usual_strides(x)
    if dense is not x and isinstance(_runner(model, x, plain), str):
        return plain(x)
    return EngineState.of(model).forward(model, plain, dense)


def why_not(model: nn.Module, x: Tensor) -> str | None:
    """Why `model(x)` runs its modules and not a plan; None when it uses a plan. May make that plan."""
    return call_refusal(model, x) or _reason(_runner(model, x))


def plan_for(model: nn.Module, x: Tensor) -> Plan:
    """The plan that `model(x)` uses. RuntimeError with the sentence of `why_not` when there is none."""
    return _require(model, x).plan


def explain(model: nn.Module, x: Tensor, repeats: int = 5) -> Explanation:
    """Run the plan of `model(x)` step by step and tell what each costs; without a plan, tell why not."""
    runner = call_refusal(model, x) or _runner(model, x)
    return _explain(runner, usual_strides(x), repeats)


def refresh(model: nn.Module) -> None:
    """Forget plans and packed weights of the model; the next call makes them anew."""
    model.__dict__.pop(ATTRIBUTE, None)


def plain_of(model: nn.Module) -> MethodType:
    """The ordinary forward: `forward_modules` of a backbone, the class's forward of any other module."""
    found = getattr(model, "forward_modules", None)
    return found if found is not None else MethodType(type(model).forward, model)


def _runner(model: nn.Module, x: Tensor, plain: MethodType | None = None) -> Runner | str:
    """The plan for x, or why there is none."""
    dense = usual_strides(x)
    runner = EngineState.of(model).runner(model, plain or plain_of(model), dense)
    reason = shown_strides(x, runner.plan) if dense is not x and isinstance(runner, Runner) else None
    return reason or runner


def _reason(runner: Runner | str) -> str | None:
    return runner if isinstance(runner, str) else None


def _require(model: nn.Module, x: Tensor) -> Runner:
    runner = call_refusal(model, x) or _runner(model, x)
    if isinstance(runner, str):
        raise RuntimeError(f"there is no plan: {runner}")
    return runner

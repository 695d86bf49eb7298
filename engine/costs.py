"""What a step must compute and move at least: flops of the plain algorithm, and bytes with every operand read
once and the result written once."""

from __future__ import annotations

from math import prod

from .plan import Plan, Step

PRODUCTS = (
    "conv2d", "winograd_conv2d", "grouped_conv2d", "depthwise_conv2d", "separable_conv2d", "linear",
)  # fmt: skip


def costs(plan: Plan, step: Step, element: int) -> tuple[float, float]:
    """(flops, bytes) for the whole batch; `element`: bytes of an element of maps and weights."""
    p = step.params
    flops = weights = 0.0
    if step.kernel in PRODUCTS:
        taps = p.get("r", 1) * p.get("s", 1)
        separable = step.kernel == "separable_conv2d"
        weights = p["c"] * (taps + p["k"]) if separable else p["k"] * (p["c"] // p.get("groups", 1)) * taps
        flops = 2.0 * plan.batch * plan.values[step.output].pixels * weights
    shapes = [plan.values[value].shape or (0,) for value in (*step.inputs, step.output)]
    return flops, (weights + sum(map(prod, shapes))) * element

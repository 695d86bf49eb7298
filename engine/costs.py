"""What a step must compute and move at least: multiplications and additions of the plain algorithm, and bytes
with every operand read once and the result written once."""

from __future__ import annotations

from .plan import Plan, Step

CONVOLUTIONS = (
    "conv2d",
    "winograd_conv2d",
    "grouped_conv2d",
    "depthwise_conv2d",
    "separable_conv2d",
    "linear",
)


def costs(plan: Plan, step: Step, element: int) -> tuple[float, float]:
    """(flops, bytes) for the whole batch; `element`: bytes of an element of maps and weights."""
    p = step.params
    out = plan.values[step.output]
    pixels = plan.batch * out.pixels
    flops = weights = 0.0
    if step.kernel in CONVOLUTIONS:
        taps = p.get("r", 1) * p.get("s", 1)
        if step.kernel == "separable_conv2d":
            weights = p["c"] * (taps + p["k"])
            flops = 2.0 * pixels * weights
        else:
            weights = p["k"] * (p["c"] // p.get("groups", 1)) * taps
            flops = 2.0 * pixels * weights
    elements = pixels * out.channels + weights
    for value in step.inputs:
        found = plan.values[value]
        elements += plan.batch * found.pixels * found.channels
    return flops, elements * element

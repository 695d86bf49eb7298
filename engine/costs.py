"""What a step must compute and move at least: flops of the plain algorithm, and bytes with every operand read
once and the result written once."""

from __future__ import annotations

import re
from math import prod

from .plan import CONVOLUTIONS, Plan, Step

PRODUCTS = (*CONVOLUTIONS, "separable_conv2d", "linear")

# Products of Winograd's algorithms over those of the plain convolution (docs/design.md has their points).
WINOGRAD = {
    "F(2x2,3x3)": 16 / 36,
    "F(4x4,3x3)": 46 / 144,
    "F(4x4,3x3) at real points": 36 / 144,  # at precision "high"
    "F(2x2,5x5)": 46 / 100,
    "F(1x4,1x7)": 13 / 28,
    "F(4x1,7x1)": 13 / 28,
}


def share_of_products(detail: str) -> float:
    """Of the plain algorithm's products, by the words of a step. ValueError for an unknown Winograd."""
    found = re.search(r"F\([^)]*\)(?: at real points)?", detail)
    if found is None:
        return 1.0
    if found[0] not in WINOGRAD:
        raise ValueError(f"engine.costs does not know how many products {found[0]} has")
    return WINOGRAD[found[0]]


def weight_count(step: Step) -> int:
    """How many weights are multiplied for each pixel of the result; 0 for kernels without filters."""
    p = step.params
    if step.kernel not in PRODUCTS:
        return 0
    taps = p.get("r", 1) * p.get("s", 1)
    if step.kernel == "separable_conv2d":
        return p["c"] * (taps + p["k"])
    return p["k"] * (p["c"] // p.get("groups", 1)) * taps


def costs(plan: Plan, step: Step, element: int) -> tuple[float, float]:
    """(flops, bytes) for the whole batch; `element`: bytes of an element of maps and weights."""
    weights = weight_count(step)
    flops = 2.0 * plan.batch * plan.values[step.output].pixels * weights if weights else 0.0
    shapes = [plan.values[value].shape or (0,) for value in (*step.inputs, step.output)]
    return flops, (weights + sum(map(prod, shapes))) * element

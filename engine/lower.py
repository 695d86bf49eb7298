"""From steps, schedule and places to what runs: instances with their dependencies, cut into parts.

A part is a run of kernel calls for one native plan, or a single PyTorch call. Parts run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .deps import ALL, INPUT_ROWS, RESIDUAL_ROWS, Access, dependencies
from .place import LINGER, place
from .plan import Instance, Loop, Plan, Step
from .schedule import check_schedule, expand, schedule


@dataclass
class Part:
    """native: instances [begin, end) of the plan, deps counted from begin. Else one PyTorch call."""

    native: bool
    begin: int
    end: int
    deps: list[list[tuple[int, int]]] = field(default_factory=list)


def lower(plan: Plan, loop: Loop | None = None, linger: int = LINGER) -> None:
    """Fill in the plan's schedule, places, arena_bytes, instances and parts."""
    plan.schedule = schedule(plan, plan.batch) if loop is None else loop
    check_schedule(plan, plan.schedule)
    place(plan, plan.schedule, linger)
    plan.instances = expand(plan.schedule, plan.batch)
    plan.parts = cut(plan)
    for part in plan.parts:
        if part.native:
            part.deps = dependencies(access(plan, plan.instances[i]) for i in range(part.begin, part.end))


def cut(plan: Plan) -> list[Part]:
    parts: list[Part] = []
    for number, instance in enumerate(plan.instances):
        native = plan.steps[instance.step].native
        if native and parts and parts[-1].native:
            parts[-1].end = number + 1
        else:
            parts.append(Part(native, number, number + 1))
    return parts


def access(plan: Plan, instance: Instance) -> Access:
    """What a kernel call reads and writes. Weights do not change while a plan runs."""
    step = plan.steps[instance.step]
    reads = []
    for role, value in zip(step.roles, step.inputs):
        reads.append((instance.extent(plan.places[value]), read_mode(plan, step, role, value)))
    return Access(reads, [instance.extent(plan.places[step.output])], same_rows(plan, step))


def read_mode(plan: Plan, step: Step, role: str, value: int) -> int:
    """How a task waits: for rows of a map; for all of a gate, or of a map that became one row."""
    if role == "residual":
        return RESIDUAL_ROWS
    numbered_alike = plan.values[value].pixels == plan.root(value).pixels
    return INPUT_ROWS if role == "x" and numbered_alike and follows_rows(step) else ALL


def follows_rows(step: Step) -> bool:
    """Whether each task reads at least one row of its input, so that it waits for its producer at all.

    With more padding than the kernel reaches there are output rows that see nothing but padding.
    """
    p = step.params
    if "r" not in p:
        return True
    return max(p["pad_h"], p.get("pad_bottom", 0)) <= p.get("dilation_h", 1) * (p["r"] - 1)


def same_rows(plan: Plan, step: Step) -> bool:
    """Whether a task that writes a pixel reads that pixel of x: one size, and a window around the pixel."""
    p = step.params
    x, y = plan.values[step.inputs[0]], plan.values[step.output]
    if x.pixels != y.pixels or (x.pixels > 1 and (x.shape or ())[2:] != (y.shape or ())[2:]):
        return False
    return "r" not in p or ("pad_bottom" not in p and centred(p, "r", "h") and centred(p, "s", "w"))


def centred(p: dict[str, int], taps: str, axis: str) -> bool:
    reach = p.get(f"dilation_{axis}", 1) * (p.get(taps, 1) - 1)
    return (
        p.get(f"stride_{axis}", 1) == 1 and 2 * p.get(f"pad_{axis}", 0) == reach and p.get(taps, 1) % 2 == 1
    )

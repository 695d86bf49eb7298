"""From steps, schedule and places to what runs: instances with their dependencies, cut into parts.

A part is a run of kernel calls for one native plan, or a single PyTorch call. Parts run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .deps import ALL, INPUT_ROWS, RESIDUAL_ROWS, Access, dependencies
from .place import LINGER, place
from .plan import CONVOLUTIONS, Instance, Loop, Plan, Step
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
    modes = (INPUT_ROWS if follows_rows(step) else ALL, RESIDUAL_ROWS)
    reads = [(instance.extent(plan.places[v]), mode) for v, mode in zip(step.inputs, modes)]
    return Access(reads, [instance.extent(plan.places[step.output])])


def follows_rows(step: Step) -> bool:
    """Whether each task reads at least one row of its input, so that it waits for its producer at all.

    With more padding than the kernel reaches there are output rows that see nothing but padding.
    """
    p = step.params
    return step.kernel not in CONVOLUTIONS or p["pad_h"] <= p["dilation_h"] * (p["r"] - 1)

"""Where every value lies: one arena, shared by liveness, and the tensors of the caller.

A value lives from the step that writes it to the last one that reads it. Values that live at different times
may share bytes. A value that stays inside a loop needs room for one chunk of that loop, and every chunk uses
the same room; a value that crosses the border of a loop needs room for a chunk of the loop around it.

    steps           0   1   2   3   4   5
    stem output     #####                        each row: one range of bytes
    layer1 conv1        #####   #####            the second one belongs to another value
    layer1 output           #############

Slices of a concatenation and prefixes of a dense block are values that show the bytes of one owner, some
floats into every pixel; the owner lives as long as any of them.

LINGER keeps a value alive for some steps after its last reader, so that a step may start to write while that
reader is still at work: less memory traffic between cores is lost to waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .plan import ARENA, FLOAT, INPUT, Loop, Place, Plan, Step, Value

ALIGNMENT = 64
ALIASED_FLOATS = 4096 // FLOAT  # pixels so far apart fall into one set of the L1 cache,
WAYS = 8  # which holds so many lines
TILE = 7  # pixels of a row that a kernel computes at once
WINDOWED = {"depthwise_conv2d", "separable_conv2d"}  # grouped, Winograd and direct ones: within 1 %
LINGER = 1


@dataclass
class Interval:
    """A value's demand: bytes, and the first and last step (inclusive) while nobody else may have them."""

    value: int
    bytes: int
    first: int
    last: int
    offset: int = -1


def pixel_stride(plan: Plan, value: Value, steps: list[int]) -> int:
    """Floats between neighbouring pixels of a map that these steps write or read.

    Where pixels lie a multiple of 4 KiB apart, the rows of a register tile compete for one set of the L1
    cache: 1x1 convolutions from 1024 and 2048 channels were 1.15 times as slow. Windows need more pixels at
    once, and suffer at 1 or 2 KiB, too: depthwise 3x3 on 14x14 pixels of 512 channels took 92 us, of 528 40.
    So such pixels lie a cache line further apart, if the map is not also seen as one row.
    """
    if plan.batch * value.pixels == 1 or not is_aliased(plan, value, steps):
        return value.channels
    if any(v.pixels != value.pixels for v in plan.values if plan.root(v.id) is value):
        return value.channels
    return value.channels + ALIGNMENT // FLOAT


def is_aliased(plan: Plan, value: Value, steps: list[int]) -> bool:
    """Whether the pixels that some step reads at once fill more than half of the sets they fall into."""
    sets = ALIASED_FLOATS // math.gcd(value.channels, ALIASED_FLOATS)
    return sets == 1 or any(
        2 * lines_at_once(step) > sets * WAYS
        for step in (plan.steps[number] for number in steps)
        if (x := step.input("x")) is not None and plan.root(x) is value
    )


def lines_at_once(step: Step) -> int:
    """The pixels under the windows of a tile of outputs; 1 where a kernel has no window."""
    p = step.params
    taps = p.get("r", 1) * p.get("s", 1)
    if taps == 1 or step.kernel not in WINDOWED:
        return 1
    return p["r"] * ((TILE - 1) * p.get("stride_w", 1) + p["s"])


def place(plan: Plan, schedule: Loop, linger: int = LINGER) -> None:
    """Give every value of the plan its place; sets places and arena_bytes."""
    paths = loop_paths(schedule)
    users = value_steps(plan)
    demands: list[Interval] = []
    output_slot = INPUT + 1
    for value in plan.values:
        if value.same_as is not None or value.home == "object":
            continue
        dense = value.pixels * value.channels * FLOAT
        if value.home == "input":
            plan.places[value.id] = Place(INPUT, 0, dense, 1 if plan.planar_input else value.channels)
        elif value.home in ("output", "planar"):
            plan.places[value.id] = Place(output_slot, 0, dense, value.channels)
            output_slot += 1
        else:
            stride = pixel_stride(plan, value, users[value.id])
            image_bytes = value.pixels * stride * FLOAT
            demand, depth = demand_of(plan, value, image_bytes, users[value.id], paths, linger)
            plan.places[value.id] = Place(ARENA, -1, image_bytes, stride, depth, gap=value.gap)
            demands.append(demand)
    plan.arena_bytes = best_fit(demands)
    for demand in demands:
        plan.places[demand.value] = replace(plan.places[demand.value], offset=demand.offset)
    for value in plan.values:
        if value.same_as is not None and value.home != "object":
            plan.places[value.id] = place_within(plan, value)


def place_within(plan: Plan, value: Value) -> Place:
    """The place of a value that shows the bytes of another: some of its channels, or its map as one row."""
    owner = plan.root(value.id)
    found = plan.places[owner.id]
    channel, channels = plan.channel(value.id), value.channels
    if value.pixels == 1 != owner.pixels:  # the pixels of an image as a row, or some of them
        return replace(found, pixel_stride=found.image_stride, channel=channel, channels=channels)
    if value.pixels != owner.pixels:
        return replace(found, pixel_stride=channels)
    if channel + channels == owner.channels:  # whoever writes the last channels leaves nothing old behind
        channels = found.pixel_stride - channel
    return replace(found, channel=channel, channels=channels)


def value_steps(plan: Plan) -> dict[int, list[int]]:
    """For each value with bytes of its own: the steps that write or read it, in order."""
    found: dict[int, list[int]] = {value.id: [] for value in plan.values}
    for number, step in enumerate(plan.steps):
        for value in {*step.inputs, step.output}:
            found[plan.root(value).id].append(number)
    return found


def loop_paths(schedule: Loop) -> dict[int, list[Loop]]:
    """For each step, the loops around it, outermost first."""
    found: dict[int, list[Loop]] = {}

    def walk(loop: Loop, path: list[Loop]) -> None:
        for item in loop.body:
            if isinstance(item, Loop):
                walk(item, [*path, item])
            else:
                found[item] = path

    walk(schedule, [schedule])
    return found


def demand_of(
    plan: Plan, value: Value, image_bytes: int, steps: list[int], paths: dict[int, list[Loop]], linger: int
) -> tuple[Interval, int]:
    """Room for one chunk of the innermost loop around every step of this value; the depth of that loop.

    What the caller gets a copy of is needed whole, and to the end.
    """
    returned = any(o.value is not None and plan.root(o.value).id == value.id for o in plan.outputs)
    depth = 0 if returned else common_depth([paths[s] for s in steps])

    def span(step: int) -> tuple[int, int]:
        """The steps that run while this one may have started and not finished all its chunks."""
        if len(paths[step]) == depth + 1:
            return step, step
        inner = paths[step][depth + 1].steps()
        return inner[0], inner[-1]

    first = span(steps[0])[0]
    last = len(plan.steps) if returned else max(span(s)[1] for s in steps)
    chunk = paths[steps[0]][depth].chunk
    return Interval(value.id, round_up(chunk * image_bytes), first, last + linger), depth


def common_depth(paths: list[list[Loop]]) -> int:
    """How deep the loops are the same ones."""
    depth = 0
    while all(len(path) > depth + 1 and path[depth + 1] is paths[0][depth + 1] for path in paths):
        depth += 1
    return depth


def best_fit(demands: list[Interval]) -> int:
    """Set every offset: largest first, each into the smallest gap that holds it. Returns the arena's size."""
    placed: list[Interval] = []
    for demand in sorted(demands, key=lambda d: (-d.bytes, d.first)):
        busy = sorted(
            (other.offset, other.offset + other.bytes)
            for other in placed
            if other.first <= demand.last and demand.first <= other.last
        )
        demand.offset = smallest_gap(busy, demand.bytes)
        placed.append(demand)
    return max((d.offset + d.bytes for d in placed), default=0)


def smallest_gap(busy: list[tuple[int, int]], size: int) -> int:
    """The start of the smallest free range of at least `size`; past the last busy byte when there is none."""
    best, best_size, end = None, None, 0
    for start, stop in busy:
        gap = start - end
        if gap >= size and (best_size is None or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return end if best is None else best


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

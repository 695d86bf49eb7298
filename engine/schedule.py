"""In which order, and on how many images at a time.

Early layers have large maps and small weights: they run a few images at a time, so that maps stay in the
cache. Late layers have small maps and large weights: they run on many images, so that a weight is read once
for all of them. `schedule` makes loops inside loops; for ResNet-50 and 16 images, say,

    16 images: [ 4 at a time: [ 2 at a time: [ one: [stem, layer1, layer2], layer3 ], layer4 ], tail ]

Only kernels that treat images one by one stand inside a loop. The result never depends on the schedule: a
kernel gives an image the same bits in any batch.
"""

from __future__ import annotations

from .costs import weight_count
from .plan import FLOAT, Instance, Loop, Plan, Step

# The maps around one step of a chunk should stay within this: an eighth of a 32 MB L3 that others use too.
# 16 images of resnet50 on 2 cores: 2 MiB 232-245 ms, 4 MiB 225-229, 8 MiB 229, 16 MiB 233, all at once 240.
CHUNK_BYTES = 4 << 20
# A chunk should do at least this much arithmetic per byte of weights. With kernels at 500 GFLOP/s and memory
# at 30 GB/s, 160 means that weights which come from memory take a tenth of the time.
FLOPS_PER_WEIGHT_BYTE = 160


def schedule(plan: Plan, batch: int) -> Loop:
    """The loops of a plan for this many images."""
    if batch == 1:
        return Loop(1, list(range(len(plan.steps))))
    limits = [batch] * len(plan.steps)
    for stage in stages(plan):
        limit = stage_limit(plan, stage, batch)
        for step in stage:
            limits[step] = limit
    return nest(list(range(len(plan.steps))), limits, batch)


def stages(plan: Plan) -> list[list[int]]:
    """Runs of consecutive steps that may be cut into chunks, by the size of the maps they write."""
    found: list[list[int]] = []
    last_size = None
    for number, step in enumerate(plan.steps):
        size = plan.values[step.output].pixels if is_per_image(plan, step) else None
        if size is not None and size == last_size:
            found[-1].append(number)
        elif size is not None:
            found.append([number])
        last_size = size
    return found


def is_per_image(plan: Plan, step: Step) -> bool:
    """Whether the step treats the images of the batch one by one."""
    shapes = [plan.values[v].shape for v in (*step.inputs, step.output)]
    return step.native and all(shape is not None and shape[0] == plan.batch for shape in shapes)


def stage_limit(plan: Plan, stage: list[int], batch: int) -> int:
    """How many images at a time: as many as the cache holds, more to share weights; a power of two."""
    made_here = {plan.root(plan.steps[s].output).id for s in stage}
    largest = max(
        sum(
            image_bytes(plan, v)
            for v in {*plan.steps[s].inputs, plan.steps[s].output}
            if plan.root(v).id in made_here
        )
        for s in stage
    )
    limit = max(1, CHUNK_BYTES // largest)
    flops = sum(step_flops(plan, plan.steps[s]) for s in stage)
    weights = sum(weight_bytes(plan.steps[s]) for s in stage)
    if flops:
        limit = max(limit, -(-FLOPS_PER_WEIGHT_BYTE * weights // flops))
    return batch if limit >= batch else 1 << (limit.bit_length() - 1)


def nest(steps: list[int], limits: list[int], count: int) -> Loop:
    """Steps whose limit reaches `count` run on all of it; runs of others go into a smaller loop inside."""
    body: list[int | Loop] = []
    run: list[int] = []
    for step in [*steps, None]:
        if step is not None and limits[step] < count:
            run.append(step)
            continue
        if run:
            body.append(nest(run, limits, even_chunk(count, max(limits[s] for s in run))))
            run = []
        if step is not None:
            body.append(step)
    return Loop(count, body)


def even_chunk(count: int, limit: int) -> int:
    """Chunks of nearly the same size, none above the limit: 5 images, 4 at a time, become 3 and 2."""
    return -(-count // -(-count // limit))


def image_bytes(plan: Plan, value: int) -> int:
    v = plan.values[value]
    return v.pixels * v.channels * FLOAT


def weight_bytes(step: Step) -> int:
    return weight_count(step) * FLOAT


def step_flops(plan: Plan, step: Step) -> int:
    """Of one image, multiplications and additions, of the direct algorithm."""
    return plan.values[step.output].pixels * weight_bytes(step) // FLOAT * 2


def expand(loop: Loop, batch: int) -> list[Instance]:
    """Every step on every chunk, in the order of the loops."""
    found: list[Instance] = []
    _expand(loop, 0, batch, (), found)
    return found


def _expand(loop: Loop, first: int, last: int, starts: tuple[int, ...], found: list[Instance]) -> None:
    for start in range(first, last, max(1, loop.chunk)):
        end, inside = min(start + loop.chunk, last), (*starts, start)
        for item in loop.body:
            if isinstance(item, Loop):
                _expand(item, start, end, inside, found)
            else:
                found.append(Instance(item, start, end, inside))


def check_schedule(plan: Plan, loop: Loop) -> None:
    """Raises ValueError for a schedule that this plan cannot run."""
    if loop.steps() != list(range(len(plan.steps))) or loop.chunk != plan.batch:
        raise ValueError("a schedule holds every step once, in order, and its outer loop is the whole batch")
    inside = [step for item in loop.body if isinstance(item, Loop) for step in item.steps()]
    whole = [plan.steps[s].name for s in inside if not is_per_image(plan, plan.steps[s])]
    if whole:
        raise ValueError(f"these steps need the whole batch at once: {', '.join(whole)}")

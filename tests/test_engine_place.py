"""Places, schedules and dependencies, without kernels: random plans are executed on a memory of labels.

Every 64 bytes of the simulated memory hold a label that says which row of which image of which value was
written there last. Tasks (one output row of one image) start and end in any order that the dependencies
allow; each checks at its start and at its end that the rows it reads still carry the right labels, and
its own row is scribbled over in between. A buffer that is reused too early, a missing dependency or one
that is too weak shows as a wrong label.
"""

import random

import pytest
import torch
from fast_backbones.engine.capture import capture
from fast_backbones.engine.convert import convert
from fast_backbones.engine.deps import ALL, INPUT_ROWS, RESIDUAL_ROWS, Access, dependencies
from fast_backbones.engine.fuse import fuse
from fast_backbones.engine.lower import lower
from fast_backbones.engine.place import Interval, best_fit
from fast_backbones.engine.plan import Instance, Loop, Output, Plan, Step, Value
from fast_backbones.engine.schedule import check_schedule, even_chunk, expand, schedule
from fast_backbones.engine.select import make_plan
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fast_backbones as fb
from fast_backbones.engine import deps, place

CELL = 64  # bytes with one label
CHANNELS = CELL // 4  # so a pixel is one cell

GEOMETRY = {  # kernel, stride, padding: a 1x1 of stride 2 never looks at odd rows
    "3x3": {"r": 3, "stride_h": 1, "pad_h": 1, "dilation_h": 1},
    "1x1": {"r": 1, "stride_h": 1, "pad_h": 0, "dilation_h": 1},
    "1x1/2": {"r": 1, "stride_h": 2, "pad_h": 0, "dilation_h": 1},
    "1x1+1": {"r": 1, "stride_h": 1, "pad_h": 1, "dilation_h": 1},  # border rows see padding alone
}


def rows_out(h, p):
    return (h + 2 * p["pad_h"] - p["dilation_h"] * (p["r"] - 1) - 1) // p["stride_h"] + 1


class RandomPlan:
    """Convolutions over earlier values, some with residuals, some in two phases, some returned.

    Some write a slice of a buffer, some two slices at once; buffers are read whole, by their first slices
    (as a dense block does) and by single ones.
    """

    def __init__(self, rng, slices):
        self.rng, self.slices = rng, slices
        self.batch = rng.choice([1, 2, 3, 4, 5, 8])
        h, w = rng.choice([2, 3, 4, 6]), rng.choice([1, 2, 3])
        self.values = [Value(0, "input", (self.batch, CHANNELS, h, w), home="input")]
        self.readable = [self.values[0]]
        self.free = {}  # buffer -> its next free channel
        self.steps = []

    def add(self, shape, home="arena", **options):
        value = Value(len(self.values), f"v{len(self.values)}", shape, home=home, **options)
        self.values.append(value)
        return value

    def room(self, h, w):
        """A buffer of this size with a free slice: an open one, or a new one."""
        buffers = [self.values[b] for b in self.free]
        fitting = [b for b in buffers if b.shape[2:] == (h, w) and self.free[b.id] < b.channels]
        if fitting and self.rng.random() < 0.8:
            return self.rng.choice(fitting)
        gap = self.rng.choice([0, 0, CHANNELS])
        buffer = self.add((self.batch, gap + CHANNELS * self.rng.randint(2, 4), h, w), gap=gap)
        self.free[buffer.id] = gap
        return buffer

    def output(self, h, w):
        if not self.slices or self.rng.random() < 0.4:
            home = self.rng.choice(["arena"] * 5 + ["output"])
            value = self.add((self.batch, CHANNELS, h, w), home)
            self.readable.append(value)
            return value
        buffer = self.room(h, w)
        start, width = self.free[buffer.id], CHANNELS
        if start + 2 * CHANNELS <= buffer.channels and self.rng.random() < 0.3:
            width = 2 * CHANNELS
        self.free[buffer.id] = start + width
        value = self.add((self.batch, width, h, w), same_as=buffer.id, channel=start)
        self.readable.append(value)
        if width > CHANNELS:
            half = (self.batch, CHANNELS, h, w)
            self.readable += [self.add(half, same_as=value.id, channel=c) for c in (0, CHANNELS)]
        written = start + width - buffer.gap
        prefix = self.add((self.batch, written, h, w), same_as=buffer.id, channel=buffer.gap)
        self.readable.append(prefix)
        return value

    def step(self):
        source = self.rng.choice(self.readable[-4:])
        kinds = [k for k in GEOMETRY if rows_out(source.shape[2], GEOMETRY[k]) > 0]
        geometry = GEOMETRY[self.rng.choice(kinds)]
        known = list(self.readable)
        output = self.output(rows_out(source.shape[2], geometry), source.shape[3])
        alike = [v for v in known if v.shape == output.shape]
        inputs = [source.id] + ([self.rng.choice(alike).id] if alike and self.rng.random() < 0.5 else [])
        params = {**geometry, "two_phase": self.rng.random() < 0.3}
        self.steps.append(Step("conv2d", "conv2d", f"s{len(self.steps)}", inputs, output.id, params))

    def plan(self):
        for _ in range(self.rng.randint(1, 12)):
            self.step()
        returned = [v.id for v in self.values if v.home == "output"] + [self.readable[-1].id]
        return Plan(self.batch, self.values, self.steps, 0, list(map(Output, returned)), None, False)


def random_loops(rng, steps, count):
    """Any nesting of loops over consecutive steps."""
    body, at = [], 0
    while at < len(steps):
        length = rng.randint(1, len(steps) - at)
        if count > 1 and rng.random() < 0.5:
            body.append(random_loops(rng, steps[at : at + length], rng.randint(1, count - 1)))
            at += length
        else:
            body.append(steps[at])
            at += 1
    return Loop(count, body)


class Machine:
    """Executes the instances of a plan as tasks on labelled memory."""

    def __init__(self, plan, rng):
        self.plan, self.rng = plan, rng
        self.memory = {}  # (slot, cell) -> label
        self.writers = {(0, c): 0 for c in range(0, CHANNELS)}  # (root, channel) -> the value written there
        for step in plan.steps:
            root, first = plan.root(step.output).id, plan.channel(step.output)
            for channel in range(first, first + plan.values[step.output].channels):
                self.writers[root, channel] = step.output
        x = plan.values[0]
        for image in range(plan.batch):
            for row in range(x.shape[2]):
                self.write(0, image, row, plan.instances[0])
        (part,) = plan.parts
        self.deps = part.deps
        self.tasks = []  # (instance, phase, image, row)
        for number, instance in enumerate(plan.instances):
            step = plan.steps[instance.step]
            rows = range(plan.values[step.output].shape[2])
            images = range(instance.first, instance.last)
            if step.params["two_phase"]:
                self.tasks += [(number, 1, i, r) for i in images for r in rows]
            self.tasks += [(number, 2, i, r) for i in images for r in rows]
        self.done = set()
        self.left = {}
        self.first_left = {}
        for number, phase, _, _ in self.tasks:
            self.left[number] = self.left.get(number, 0) + 1
            self.first_left[number] = self.first_left.get(number, 0) + (phase == 1)

    def cells(self, value, image, row, instance):
        """The cells of a row of a value, pixel by pixel, each with the value that is written there."""
        found, where = self.plan.values[value], self.plan.places[value]
        start = instance.starts[where.depth] if where.slot == 0 else 0
        pixel = where.pixel_stride * 4
        first = where.offset + (image - start) * where.image_bytes + row * found.shape[3] * pixel
        for column in range(found.shape[3]):
            for channel in range(where.channel, where.channel + found.channels, CHANNELS):
                writer = self.writers[self.plan.root(value).id, channel]
                yield (where.slot, (first + column * pixel + channel * 4) // CELL), writer

    def write(self, value, image, row, instance, label=None):
        for cell, writer in self.cells(value, image, row, instance):
            self.memory[cell] = (writer, image, row) if label is None else label

    def input_rows(self, task):
        number, phase, _, row = task
        step = self.plan.steps[self.plan.instances[number].step]
        if step.params["two_phase"] and phase == 2:
            return []
        p, h = step.params, self.plan.values[step.inputs[0]].shape[2]
        first = row * p["stride_h"] - p["pad_h"]
        return [r for r in range(first, first + p["r"]) if 0 <= r < h]

    def check_reads(self, task):
        number, phase, image, row = task
        instance = self.plan.instances[number]
        step = self.plan.steps[instance.step]
        for r in self.input_rows(task):
            self.expect(step.inputs[0], image, r, instance, task)
        if phase == 2 and len(step.inputs) > 1:
            self.expect(step.inputs[1], image, row, instance, task)

    def expect(self, value, image, row, instance, task):
        for cell, writer in self.cells(value, image, row, instance):
            label, right = self.memory.get(cell), (writer, image, row)
            assert label == right, f"task {task} finds {label} instead of {right}"

    def ready(self, task):
        number, phase, image, row = task
        if phase == 2 and self.first_left[number]:
            return False
        step = self.plan.steps[self.plan.instances[number].step]
        for other, mode in self.deps[number]:
            if mode == ALL and self.left[other]:
                return False
            rows = self.input_rows(task) if mode == INPUT_ROWS else [row] if phase == 2 else []
            if mode == RESIDUAL_ROWS:
                assert len(step.inputs) > 1
            if mode != ALL and any((other, 2, image, r) not in self.done for r in rows):
                return False
        return True

    def run(self):
        """Start and end tasks in a random order, which may lean to early or to late ones."""
        waiting, running = list(self.tasks), []
        lean = self.rng.choice(["any", "early", "late"])
        while waiting or running:
            if running and (self.rng.random() < 0.5 or not any(map(self.ready, waiting))):
                self.end(running.pop(self.rng.randrange(len(running))))
                continue
            eligible = [task for task in waiting if self.ready(task)]
            assert eligible, "nobody can start: the dependencies form a knot"
            task = {"any": self.rng.choice(eligible), "early": eligible[0], "late": eligible[-1]}[lean]
            waiting.remove(task)
            running.append(task)
            self.check_reads(task)
            number, phase, image, row = task
            if phase == 2:
                instance = self.plan.instances[number]
                self.write(self.plan.steps[instance.step].output, image, row, instance, "scribble")
        for output in self.plan.outputs:
            value = self.plan.values[output.value]
            whole = Instance(0, 0, self.plan.batch, (0,))
            for image in range(self.plan.batch):
                for row in range(value.shape[2]):
                    self.expect(value.id, image, row, whole, "caller")

    def end(self, task):
        number, phase, image, row = task
        self.check_reads(task)
        if phase == 2:
            instance = self.plan.instances[number]
            value = self.plan.steps[instance.step].output
            self.write(value, image, row, instance)
        else:
            self.first_left[number] -= 1
        self.left[number] -= 1
        self.done.add(task)


def lowered(seed, linger=None, slices=False):
    rng = random.Random(seed)
    plan = RandomPlan(rng, slices).plan()
    steps = list(range(len(plan.steps)))
    loops = random_loops(rng, steps, plan.batch)
    loops.chunk = plan.batch
    lower(plan, loops, rng.choice([0, 1, 2]) if linger is None else linger)
    return plan, rng


@pytest.mark.parametrize("slices", [False, True], ids=["dense", "slices"])
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
@example(335458391)  # a buffer without a gap where one with a gap had been
def test_any_order_that_the_dependencies_allow_reads_the_right_rows(slices, seed):
    plan, rng = lowered(seed, slices=slices)
    Machine(plan, rng).run()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9))
def test_the_simulation_notices_missing_dependencies(seed):
    """Without any dependency some order must go wrong, unless no step reads what another one wrote."""
    plan, rng = lowered(seed)
    (part,) = plan.parts
    chained = any(v != 0 for step in plan.steps for v in step.inputs)
    part.deps = [[] for _ in part.deps]
    machine = Machine(plan, rng)
    machine.rng = random.Random(0)
    if chained:
        machine.rng.choice = lambda options: "late" if "late" in options else options[-1]
        with pytest.raises(AssertionError, match="instead of"):
            machine.run()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_no_dependency_follows_from_the_others(seed):
    """Dropping any one of the whole-step dependencies loses knowledge: nothing is listed twice."""
    plan, _ = lowered(seed)
    (part,) = plan.parts
    known = []
    for needed in part.deps:
        for other, mode in needed:
            rest = [(o, m) for o, m in needed if o != other]
            assert all(not known[o] >> other & 1 for o, m in rest if m != RESIDUAL_ROWS), (other, mode)
        bits = 0
        for other, mode in needed:
            bits |= known[other] if mode != RESIDUAL_ROWS else 0
            bits |= 1 << other if mode == ALL else 0
        known.append(bits)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 6)), min_size=1, max_size=30)
)
def test_best_fit_overlaps_nothing_that_lives_together(shapes):
    demands = [
        Interval(i, 64 * size, first, first + length) for i, (size, first, length) in enumerate(shapes)
    ]
    total = best_fit(demands)
    for a in demands:
        assert a.offset % place.ALIGNMENT == 0 and a.offset >= 0 and a.offset + a.bytes <= total
        for b in demands:
            together = a.value < b.value and a.first <= b.last and b.first <= a.last
            assert not together or a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
    alive = [sum(d.bytes for d in demands if d.first <= step <= d.last) for step in range(30)]
    assert max(alive) <= total <= sum(d.bytes for d in demands)


class TestDependencies:
    """The rule by rule; an access is (slot, first byte, end byte)."""

    @staticmethod
    def step(reads, write, residual=None):
        found = [((0, *r), INPUT_ROWS) for r in reads]
        found += [((0, *residual), RESIDUAL_ROWS)] if residual else []
        return Access(found, [(0, *write)])

    def test_reading_exactly_what_one_wrote_follows_its_rows(self):
        chain = [self.step([], (0, 64)), self.step([(0, 64)], (64, 128))]
        assert dependencies(chain) == [[], [(0, INPUT_ROWS)]]

    def test_reading_a_part_waits_for_all(self):
        chain = [self.step([], (0, 128)), self.step([(0, 64)], (128, 192))]
        assert dependencies(chain)[1] == [(0, ALL)]

    def test_reading_what_two_wrote_waits_for_both(self):
        chain = [self.step([], (0, 64)), self.step([], (64, 128)), self.step([(0, 128)], (128, 192))]
        assert dependencies(chain)[2] == [(0, ALL), (1, ALL)]

    def test_residual_has_a_mode_of_its_own(self):
        chain = [
            self.step([], (0, 64)),
            self.step([], (64, 128)),
            self.step([(0, 64)], (128, 192), (64, 128)),
        ]
        assert dependencies(chain)[2] == [(0, INPUT_ROWS), (1, RESIDUAL_ROWS)]

    def test_input_and_residual_from_the_same_step(self):
        chain = [self.step([], (0, 64)), self.step([(0, 64)], (64, 128), (0, 64))]
        assert dependencies(chain)[1] == [(0, INPUT_ROWS), (0, RESIDUAL_ROWS)]

    def test_writing_waits_for_readers_and_the_writer(self):
        chain = [self.step([], (0, 64)), self.step([(0, 64)], (64, 128)), self.step([], (0, 64))]
        assert dependencies(chain)[2] == [(0, ALL), (1, ALL)]

    def test_what_follows_is_left_out(self):
        chain = [
            self.step([], (0, 64)),
            self.step([(0, 32)], (64, 128)),  # waits for 0 completely
            self.step([(64, 128)], (128, 192)),
            self.step(
                [(128, 192)], (0, 64)
            ),  # would wait for 0 and 1: 2 has seen to 0, but only to rows of 1
        ]
        assert dependencies(chain)[3] == [(1, ALL), (2, INPUT_ROWS)]

    def test_rows_of_a_residual_imply_nothing(self):
        """The tasks of Winograd's first phase do not wait for the residual."""

        def last(through_residual):
            link = {"residual": (128, 192)} if through_residual else {}
            chain = [
                self.step([], (0, 128)),
                self.step([(64, 128)], (128, 192)),  # waits for 0 completely
                self.step([] if through_residual else [(128, 192)], (192, 256), **link),
                self.step([(192, 256)], (0, 64)),  # over bytes that 0 wrote
            ]
            return dependencies(chain)[3]

        assert last(through_residual=True) == [(0, ALL), (2, INPUT_ROWS)]
        assert last(through_residual=False) == [(2, INPUT_ROWS)]

    def test_slots_do_not_touch(self):
        chain = [Access([], [(1, 0, 64)]), Access([((2, 0, 64), INPUT_ROWS)], [(3, 0, 64)])]
        assert dependencies(chain) == [[], []]

    def test_thousands_of_instances_take_no_time(self):
        chain = [self.step([(64 * i, 64 * i + 64)], (64 * i + 64, 64 * i + 128)) for i in range(4000)]
        found = deps.dependencies(chain)
        assert all(len(needed) <= 1 for needed in found)


def accept(kind, params):
    return ""


def resnet_plan(name, batch, size=224):
    model = getattr(fb, name)().eval()
    graph = convert(capture(model, model.forward_modules, torch.empty(batch, 3, size, size)))
    fuse(graph, accept)
    return make_plan(graph, True, accept)


class TestSchedule:
    @pytest.fixture(scope="class")
    @staticmethod
    def resnet50():
        return resnet_plan("resnet50", 16)

    def test_one_image_is_one_loop(self):
        plan = resnet_plan("resnet18", 1, 64)
        assert schedule(plan, 1) == Loop(1, list(range(len(plan.steps))))

    def test_early_layers_run_on_few_images_late_ones_on_many(self, resnet50):
        loops = schedule(resnet50, 16)
        check_schedule(resnet50, loops)
        chunks = {}

        def walk(loop):
            for item in loop.body:
                if isinstance(item, Loop):
                    assert item.chunk < loop.chunk
                    walk(item)
                else:
                    chunks[resnet50.steps[item].name] = loop.chunk

        walk(loops)
        assert chunks["layer1.0.conv1"] <= chunks["layer2.1.conv1"] <= chunks["layer4.1.conv1"]
        assert chunks["layer1.0.conv1"] <= 4 and chunks["layer4.1.conv1"] >= 4 and chunks["fc"] == 16

    def test_arena_of_a_batch_is_a_fraction_of_its_maps(self, resnet50):
        lower(resnet50)
        assert resnet50.arena_bytes < 0.15 * resnet50.activation_bytes
        assert max(len(needed) for part in resnet50.parts for needed in part.deps) <= 24

    def test_every_image_passes_every_step_once(self, resnet50):
        seen = [[] for _ in resnet50.steps]
        for instance in expand(schedule(resnet50, 16), 16):
            seen[instance.step] += range(instance.first, instance.last)
        assert all(images == list(range(16)) for images in seen)

    def test_chunks_are_even(self):
        assert [even_chunk(5, 4), even_chunk(16, 4), even_chunk(7, 16), even_chunk(9, 4)] == [3, 4, 7, 3]

    def test_a_schedule_must_hold_every_step_in_order(self, resnet50):
        steps = list(range(len(resnet50.steps)))
        with pytest.raises(ValueError, match="every step once"):
            check_schedule(resnet50, Loop(16, steps[:-1]))
        with pytest.raises(ValueError, match="every step once"):
            check_schedule(resnet50, Loop(16, steps[::-1]))
        with pytest.raises(ValueError, match="every step once"):
            check_schedule(resnet50, Loop(8, steps))

    def test_a_pytorch_call_needs_the_whole_batch(self, resnet50):
        plan = resnet_plan("resnet18", 2, 64)
        plan.steps[3].kernel = "aten"
        with pytest.raises(ValueError, match=r"layer1\.0\.conv2.*whole batch|whole batch.*layer1\.0\.conv2"):
            check_schedule(plan, Loop(2, [Loop(1, list(range(len(plan.steps))))]))


def test_linger_keeps_a_value_for_a_step_more():
    def arena(linger):
        plan = resnet_plan("resnet18", 1, 64)
        lower(plan, linger=linger)
        return plan.arena_bytes

    assert arena(0) < arena(1) <= arena(2)

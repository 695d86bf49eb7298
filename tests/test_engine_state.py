"""What the engine keeps for a model: plans by shape and layout, copies, threads and forks, and the cost."""

import copy
import gc
import io
import pickle
import threading
import time
import weakref

import pytest
import torch
from engine_nets import Tap, Tiny, assert_current, assert_planned
from fast_backbones.engine.state import ATTRIBUTE, EngineState
from helpers import assert_bit_equal, needs_native, run_python
from torch import nn

from fast_backbones import engine
from fast_backbones.engine import state
from fast_backbones.kernels import _ext

pytestmark = needs_native


# ---- shapes and strides ----


@torch.no_grad()
def test_new_shapes_make_new_plans_and_old_ones_go(model, monkeypatch):
    monkeypatch.setattr(state, "MAX_PLANS", 3)
    for width in range(4, 9):
        assert_planned(model, torch.randn(1, 3, 5, width))
    widths = [key[0][3] for key in EngineState.of(model).runners]
    assert widths == [6, 7, 8]
    model(torch.randn(1, 3, 5, 6))
    assert_planned(model, torch.randn(1, 3, 5, 9))
    widths = [key[0][3] for key in EngineState.of(model).runners]
    assert widths == [8, 6, 9], "the least recently used goes first"


@torch.no_grad()
@pytest.mark.parametrize("what", ["shape", "attribute"])
def test_what_changes_at_every_call_stops_being_captured(model, monkeypatch, what):
    """A capture costs as much as some forwards: after the first few there is one in so many calls."""
    monkeypatch.setattr(state, "FREE_CAPTURES", 2)
    monkeypatch.setattr(state, "CALLS_PER_CAPTURE", 5)
    for number in range(20):
        model.step = number if what == "attribute" else 0
        assert_current(model, torch.randn(1, 3, 5, 4 + (number if what == "shape" else 0)))
    assert EngineState.of(model).captures == 4
    model.step = -1
    assert "change too often" in engine.why_not(model, torch.randn(1, 3, 5, 50))
    for _ in range(6):
        model(torch.randn(1, 3, 5, 50))
    assert_planned(model, torch.randn(1, 3, 5, 50))


@torch.no_grad()
def test_plans_of_a_model_share_their_weights(model):
    for batch in (1, 2, 3):
        model(torch.randn(batch, 3, 9, 7))
    runners = EngineState.of(model).runners.values()
    assert len({tuple(w.weight.data_ptr() for w in runner.weights) for runner in runners}) == 1


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: torch.cat([x, x], -1)[..., ::2],
    "every second column, channels_last": lambda x: torch.cat([x, x], -1).to(
        memory_format=torch.channels_last
    )[..., ::2],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "off alignment": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one channel": lambda x: x,
}


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size", [(2, 3, 9, 7), (1, 3, 9, 7), (2, 3, 1, 1)], ids=["", "one image", "one pixel"]
)
def test_results_have_the_strides_of_eager(layout, size):
    model = Tap().eval()
    if layout == "one channel":
        model.conv, size = nn.Conv2d(1, 16, 3, padding=1, bias=False), (size[0], 1, *size[2:])
    x = LAYOUTS[layout](torch.randn(size))
    keep = x.clone()
    assert engine.why_not(model, x) is None
    ours, plain = model(x), model.forward_modules(x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert ours.stride() == plain.stride()
    assert torch.equal(x, keep)


@torch.no_grad()
def test_results_are_fresh(model, x):
    first = model(x)
    keep = first.clone()
    second = model(torch.randn_like(x))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, keep)


# ---- copies ----


@torch.no_grad()
def test_deepcopy_has_no_plan_and_makes_its_own(model, x):
    assert_planned(model, x)
    other = copy.deepcopy(model)
    assert other.__dict__[ATTRIBUTE].guard is None
    other.conv.weight.mul_(2)
    assert_planned(other, x)
    assert_planned(model, x)
    assert not torch.equal(model(x), other(x))


@torch.no_grad()
def test_shallow_copy_does_not_share_the_state(model, x):
    assert_planned(model, x)
    other = copy.copy(model)
    other.train()
    other.eval()
    assert_planned(other, x)
    assert EngineState.of(other) is not EngineState.of(model)


@torch.no_grad()
def test_pickle_and_save(model, x):
    assert_planned(model, x)
    small = len(pickle.dumps(Tiny()))
    assert len(pickle.dumps(model)) < small + 500, "packed weights stay out of pickles"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert_planned(other, x)
        assert_bit_equal(other(x), model(x))


@torch.no_grad()
def test_a_plan_leaves_no_trace_in_the_model(model, x):
    keys, text = list(model.state_dict()), repr(model)
    assert_planned(model, x)
    assert list(model.state_dict()) == keys and repr(model) == text
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Tiny().named_modules()]


# ---- memory ----


class Branch(Tiny):
    """Cannot be captured."""

    def forward_modules(self, x):
        return super().forward_modules(x if x.mean() > 0 else -x)


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def native_memory(monkeypatch):
    """The blocks of the native library that are in use: arenas and packed weights."""
    native, blocks = _ext.require(), weakref.WeakSet()
    make = native.Memory

    def counted(floats):
        block = make(floats)
        blocks.add(block)
        return block

    monkeypatch.setattr(native, "Memory", counted)
    return blocks


def watched(model):
    """The model, its first filters on memory that tells when it is freed; and references that tell."""
    memory = model.conv.weight.detach().numpy().copy()
    model.conv.weight = nn.Parameter(torch.from_numpy(memory))
    return model.eval(), [weakref.ref(model), weakref.ref(model.conv.weight), weakref.ref(memory)]


@torch.no_grad()
@pytest.mark.parametrize("change", ["", "values", "structure", "shapes", "attributes"])
def test_a_dropped_model_gives_all_its_memory_back(x, change, no_collection, native_memory):
    """At once: the garbage collector counts objects, not bytes, and may come many models later."""
    model, references = watched(Tiny())
    assert_planned(model, x)
    if change == "values":
        model.conv.weight.mul_(2)
    elif change == "structure":
        model.relu = nn.Identity()
    elif change == "shapes":
        x = torch.randn(1, 3, 5, 6)
    elif change == "attributes":
        model.__dict__ = dict(model.__dict__)
    assert_planned(model, x)
    state = weakref.ref(EngineState.of(model))
    assert native_memory and all(r() is not None for r in (*references, state))
    del model
    assert [r() for r in (*references, state)] == [None] * 4 and not native_memory


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Branch runs its modules")
def test_a_dropped_model_without_a_plan_is_freed(x, no_collection):
    model, references = watched(Branch())
    assert_current(model, x)
    assert EngineState.of(model).failures
    del model
    assert [r() for r in references] == [None] * 3


@torch.no_grad()
@pytest.mark.parametrize("change", ["refresh", "values", "structure"])
def test_old_packed_weights_are_freed(model, x, change, no_collection, native_memory):
    assert_planned(model, x)
    store, count = weakref.ref(EngineState.of(model).store), len(native_memory)
    if change == "refresh":
        engine.refresh(model)
    elif change == "values":
        model.conv.weight.mul_(2)
    else:
        model.relu = nn.Identity()
    assert_planned(model, x)
    assert store() is None and len(native_memory) == count


# ---- threads and processes ----


def in_threads(count, work):
    errors = []

    def run(number):
        try:
            work(number)
        except BaseException as error:  # shown by the assert below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_two_threads_make_and_use_the_same_plans(model):
    images = [torch.randn(1 + i % 2, 3, 9, 7 + i % 3) for i in range(6)]
    barrier = threading.Barrier(4)

    @torch.no_grad()
    def work(number):
        barrier.wait()
        for i in range(30):
            x = images[(i + number) % 6]
            results[number][(i + number) % 6] = model(x)

    results = [{} for _ in range(4)]
    in_threads(4, work)
    with torch.no_grad():
        for i, image in enumerate(images):
            expected = model(image)
            assert engine.why_not(model, image) is None
            for result in results:
                torch.testing.assert_close(result[i], expected, rtol=1e-4, atol=1e-5)


def test_threads_on_finished_plans_get_the_same_bits(model):
    images = [torch.randn(1 + i % 3, 3, 9, 7) for i in range(3)]
    with torch.no_grad():
        expected = [model(image) for image in images]

    @torch.no_grad()
    def work(number):
        for i in range(100):
            assert_bit_equal(model(images[(i + number) % 3]), expected[(i + number) % 3])

    in_threads(4, work)


def test_weights_loaded_while_others_run(model, x):
    """Nothing crashes, every answer is finite, and the last weights win."""
    states = [Tiny().state_dict() for _ in range(2)]
    stop = threading.Event()

    @torch.no_grad()
    def work(number):
        if number:
            while not stop.is_set():
                assert model(x).isfinite().all()
            return
        try:
            for i in range(30):
                model.load_state_dict(states[i % 2], assign=i % 3 == 0)
                time.sleep(0.002)
        finally:
            stop.set()

    in_threads(3, work)
    assert_planned(model, x)


FORK = """
import os, sys, torch
import fast_backbones as fb
torch.set_num_threads(2)
model = fb.resnet18().eval()
x = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    expected = model(x)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        same = torch.equal(model(x), expected) and fb.engine.why_not(model, x) is None
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child answered otherwise"
"""


def test_a_forked_child_uses_the_plan_of_its_parent():
    run_python("-c", FORK, timeout=60)

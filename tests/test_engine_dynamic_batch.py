"""One capture for all batches: a derived plan is what a batch's own capture gives, or there is none."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.export
import torch.nn.functional as F
from engine_nets import Tap, Tiny, assert_current, assert_planned, settled
from fast_backbones.engine.batches import Family
from fast_backbones.engine.capture import capture, capture_batches
from fast_backbones.engine.program import Uncapturable
from fast_backbones.engine.state import EngineState
from helpers import assert_bit_equal, integers, needs_native
from model_checks import peer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import batches, compile_backend, launches, state

pytestmark = needs_native
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture
def exports(monkeypatch):
    """The batches that torch.export has been given, None where it was a symbol."""
    seen, export = [], torch.export.export

    def counted(model, args, **options):
        seen.append(None if options.get("dynamic_shapes") else args[0].shape[0])
        return export(model, args, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    return seen


def assert_like(ours, theirs, same=assert_bit_equal):
    """The same nesting and types, and of tensors the same sizes, strides and values."""
    left, left_spec = pytree.tree_flatten(ours)
    right, right_spec = pytree.tree_flatten(theirs)
    assert left_spec == right_spec
    for a, b in zip(left, right, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
            same(a, b)
        else:
            assert a == b


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def plan_text(plan):
    """Everything that decides what a plan computes and where. The stride of a single element does not."""
    values = [
        vars(v) | {"stride": v.stride and [step for n, step in zip(v.shape, v.stride) if n != 1]}
        for v in plan.values
    ]
    return repr(vars(plan) | {"values": values, "seconds": None, "out_spec": repr(plan.out_spec)})


# ---- models of ours ----

MODELS = {
    "lenet5": (lambda: fb.lenet5(), (1, 32, 32)),
    "googlenet with auxiliary heads": (lambda: fb.googlenet(aux_logits=True), (3, 64, 64)),
    "feature maps of resnet18": (lambda: fb.resnet18(features_only=True), (3, 40, 32)),
    "a densenet": (lambda: fb.densenet(growth_rate=8, block_config=(1, 2, 1, 1)), (3, 32, 32)),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "name, layout",
    [*((name, "nchw") for name in MODELS if name != "a densenet"), ("a densenet", "nhwc")],
)
def test_our_models(name, layout, exports):
    make, size = MODELS[name]
    model = settled(make())
    fresh = copy.deepcopy(model)
    order = (2, 5, 1, 3, 16, 0) if layout == "nchw" else (1, 16, 3, 2, 5)
    for batch in order:
        x = torch.randn(batch, *size).contiguous(memory_format=LAYOUTS[layout])
        assert_like(model(x), model.forward_modules(x), assert_close)
        if batch:
            assert engine.why_not(model, x) is None
    assert exports == ([2, None, 1] if layout == "nchw" else [1, None])
    x = torch.randn(3, *size).contiguous(memory_format=LAYOUTS[layout])
    assert_like(model(x), fresh(x))
    assert plan_text(engine.plan_for(model, x)) == plan_text(engine.plan_for(fresh, x))


@torch.no_grad()
def test_a_model_in_bfloat16(exports):
    model = settled(fb.densenet(growth_rate=8, block_config=(1, 1, 1, 1))).bfloat16()
    fresh = copy.deepcopy(model)
    for batch in (4, 2, 3):
        model(torch.randn(batch, 3, 32, 32, dtype=torch.bfloat16))
    assert exports == [4, None]
    x = torch.randn(3, 3, 32, 32, dtype=torch.bfloat16)
    assert_like(model(x), fresh(x))


@torch.no_grad()
def test_a_model_of_timm(exports):
    plain = settled(peer("timm").create_model("mobilenetv3_small_050", num_classes=10))
    model, fresh = (fb.optimize_(copy.deepcopy(plain)) for _ in range(2))
    for batch in (3, 2, 6, 4):
        x = torch.randn(batch, 3, 64, 64)
        assert_like(model(x), plain(x), assert_close)
    assert exports == [3, None]
    assert_like(model(x), fresh(x))


@torch.no_grad()
def test_plans_for_a_gpu_are_made_from_the_same_capture(exports):
    """Made here, run there."""
    model, family = settled(fb.resnet18()), Family()
    plain = engine.plain_of(model)
    images = [torch.empty(batch, 3, 64, 64) for batch in (2, 4, 3)]
    made = [state.trace(model, plain, x, launches.refusal, family) for x in images]
    assert exports == [2, None]
    own = state.trace(model, plain, images[-1], launches.refusal)
    assert plan_text(state.make_for_gpu(made[-1])) == plan_text(state.make_for_gpu(own))


# ---- forwards that look at the batch ----


class Forward(nn.Module):
    """A convolution of whole numbers, without rounding, and a function of its result."""

    def __init__(self, function, **options):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.conv.weight.data = integers((4, 3, 3, 3), 1)
        self.conv.bias.data = integers((4,), 2)

    def forward(self, x):
        return self.function(self, self.conv(x))


def rows(f):
    """Of a function that does not look at the module."""
    return lambda model, y: f(y)


def checked(y):
    torch._check(y.shape[0] < 7)
    return y + 1


ONCE = {  # the same for all batches, as PyTorch's symbol knows
    "if there are several": lambda y: y + 1 if y.shape[0] > 1 else y - 1,
    "view -1": lambda y: y.view(-1, 16) * 2,
    "reshape by the batch": lambda y: y.reshape(y.shape[0], 2, -1) * 2,
    "zeros of the batch": lambda y: y + torch.zeros(y.shape[0], 1, 1, 1),
    "ones of the batch": lambda y: torch.ones(y.size(0), 2, dtype=torch.int64),
    "numbered": lambda y: y + torch.arange(y.shape[0]).view(-1, 1, 1, 1),
    "flatten the batch": lambda y: y.flatten(0, 1),
    "flatten all": lambda y: y.flatten(),
    "the batch itself": lambda y: (y, y.shape[0], {"twice": 2 * y.shape[0]}),
    "its sizes": lambda y: (y * 2, *y.shape),
    "all channels": lambda y: F.relu_(y[:, :4, :, :]) + y,
    "two channels": lambda y: y[:, :2] + y[:, 2:],
    "squeeze": lambda y: y.squeeze(),
    "squeeze(0)": lambda y: y.squeeze(0) + 1,
    "expand": lambda y: y[:1].expand(y.shape[0], -1, -1, -1),
    "expand a result": lambda y: (y, y.mean((2, 3), True).expand(y.shape[0], 4, 4, 4)),
    "mean over the batch": lambda y: y.mean(0),
    "mean by hand": lambda y: y.sum(0) / y.shape[0],
    "roll": lambda y: y.roll(1, 0),
    "flip": lambda y: y.flip(0),
    "with statistics": lambda y: F.batch_norm(y, None, None, training=True),
    "permute": lambda y: y.permute(1, 0, 2, 3).reshape(4, -1),
    "stack": lambda y: torch.stack([y, -y], 1).view(-1, 4, 4, 4),
    "append": lambda y: torch.cat([y, y[:1]]),
    "repeat": lambda y: y.repeat(y.shape[0], 1, 1, 1),
    "the last": lambda y: y[-1],
    "min": lambda y: y * min(y.shape[0], 3),
    "pad to sixteen": lambda y: F.pad(y, (0, 0, 0, 0, 0, 0, 0, 16 - y.shape[0])),
    "products of samples": lambda y: y.flatten(1) @ y.flatten(1).T,
    "the norm of a batch": lambda y: y / y.abs().amax(0),
}
OTHERS = {  # another forward for some batches, or for each
    "if there are four": lambda y: y + 1 if y.shape[0] > 3 else y - 1,
    "even and odd": lambda y: y * 2 if y.shape[0] % 2 == 0 else y,
    "view(8, -1)": lambda y: y.view(8, -1),
    "halves": lambda y: y.chunk(2),
    "pairs": lambda y: y.split(2),
    "the first eight": lambda y: y[:8] + 1,
    "the second": lambda y: y[1] if y.shape[0] > 1 else y[0],
    "each": lambda y: [one + i for i, one in enumerate(y)],
    "len": lambda y: y * len(y),
    "a loop": lambda y: sum(y[i] for i in range(y.shape[0])),
    "a set": lambda y: y * 2 if y.shape[0] in {2, 5} else y,
    "a shape": lambda y: y * 2 if y.shape == (5, 4, 4, 4) else y,
    "a fraction": lambda y: y * (1 / y.shape[0]),
    "a root": lambda y: y * y.shape[0] ** 0.5,
    "an int": lambda y: y + 1 if isinstance(y.shape[0], int) else y - 1,
    "text": lambda y: y + len(f"{y.shape[0]}"),
    "a tensor": lambda y: y + torch.tensor(y.shape[0]),
    "relu_ of a part": lambda y: F.relu_(y[:, :2]) + y[:, 2:],
    "half of them": lambda y: y[: y.shape[0] // 2],
    "checked": checked,
}
ROUNDED = (
    "with statistics",
    "a fraction",
    "a root",
    "the norm of a batch",
)  # a plan folds and orders otherwise
ORDERS = ((2, 5, 1, 8, 3), (1, 4, 3))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Forward runs its modules")
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("name", [*ONCE, *OTHERS])
def test_forwards_that_look_at_the_batch(name, order, exports):
    plain = Forward(rows((ONCE | OTHERS)[name])).eval()
    model = fb.optimize_(copy.deepcopy(plain))
    for batch in order:
        x = integers((batch, 3, 4, 4), batch)
        try:
            expected = plain(x)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error).splitlines()[0][:20]):
                model(x)
            continue
        assert_like(model(x), expected, assert_close if name in ROUNDED else assert_bit_equal)
    if name in ONCE:
        assert exports.count(None) == 1 and len(exports) <= 4
        assert engine.why_not(model, x) is None


@torch.no_grad()
def test_even_and_odd_batches_have_a_capture_each(exports):
    model = fb.optimize_(Forward(rows(OTHERS["even and odd"])).eval())
    for batch in (2, 4, 3, 5, 6, 7, 8, 9):
        model(integers((batch, 3, 4, 4), 0))
    assert exports == [2, None, None, 3]  # the last one because no odd batch had shown what the symbol gives


@torch.no_grad()
def test_what_is_made_for_one_batch_is_captured_for_each(exports):
    model = fb.optimize_(Forward(rows(OTHERS["len"])).eval())
    for batch in (2, 3, 4, 5):
        model(integers((batch, 3, 4, 4), 0))
    assert exports == [2, None, 3, 4, 5]


def test_a_template_knows_its_batches():
    model = Forward(rows(lambda y: y[:8] * 2 if y.shape[0] % 3 == 0 else y)).eval()
    template = capture_batches(model, model.forward, torch.randn(6, 3, 4, 4))
    assert [n for n in range(20) if template.fits(n)] == [3, 6]
    own = capture(model, model.forward, torch.randn(3, 3, 4, 4))
    assert template.at(3).digest() == own.digest() != template.at(6).digest()


@pytest.mark.parametrize("name", ["len", "each", "a fraction", "a set"])
def test_there_is_no_template(name):
    model = Forward(rows(OTHERS[name])).eval()
    with pytest.raises(Uncapturable):
        capture_batches(model, model.forward, torch.randn(5, 3, 4, 4))


# ---- budget ----


@torch.no_grad()
def test_many_batches_cost_few_captures(exports, monkeypatch):
    monkeypatch.setattr(state, "MAX_PLANS", 8)
    monkeypatch.setattr(state, "FREE_CAPTURES", 2)
    model = Tiny().eval()
    for _ in range(2):
        for batch in range(1, 25):
            assert_planned(model, torch.randn(batch, 3, 5, 4))
    known = EngineState.of(model)
    assert exports == [1, None] and known.captures == 2, "plans went, and came back"
    assert len(known.runners) == 8


@torch.no_grad()
def test_image_sizes_have_captures_of_their_own(exports, monkeypatch):
    monkeypatch.setattr(state, "MAX_FAMILIES", 2)
    model = Tiny().eval()
    for width in (4, 5, 6):
        for batch in (2, 3, 4):
            assert_planned(model, torch.randn(batch, 3, 5, width))
    assert exports == [2, None] * 3 and len(EngineState.of(model).families) == 2
    model(torch.randn(5, 3, 5, 6))
    assert len(exports) == 6


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Asking runs its modules")
def test_what_cannot_be_captured_is_not_tried_with_a_symbol(exports):
    class Asking(Tiny):
        def forward_modules(self, x):
            return super().forward_modules(x if x.mean() > 0 else -x)

    model = Asking().eval()
    for batch in range(1, 9):
        assert_current(model, torch.randn(batch, 3, 5, 4))
    assert exports == [1, 2, 3, 4]


@torch.no_grad()
def test_each_precision_is_derived(exports):
    model, before = Tiny().eval(), torch.get_float32_matmul_precision()
    for batch in (2, 3):
        model(torch.randn(batch, 3, 5, 4))
    try:
        torch.set_float32_matmul_precision("high")
        assert_planned(model, torch.randn(2, 3, 5, 4))
    finally:
        torch.set_float32_matmul_precision(before)
    assert exports == [2, None]


# ---- the setting ----


@torch.no_grad()
def test_each_batch_on_its_own(exports):
    plain = Forward(rows(ONCE["squeeze"])).eval()
    model = fb.optimize_(copy.deepcopy(plain), dynamic_batch=False)
    other = copy.deepcopy(model)
    for batch in (2, 3, 4):
        x = integers((batch, 3, 4, 4), batch)
        assert_like(model(x), plain(x))
    assert exports == [2, 3, 4]
    for batch in (2, 3):
        other(integers((batch, 3, 4, 4), batch))
    assert exports == [2, 3, 4, 2, 3], "copies keep the setting"
    assert fb.optimize_(model) is model and type(model) is not type(other)
    for batch in (2, 3, 4):
        model(integers((batch, 3, 4, 4), batch))
    assert exports[5:] == [2, None]
    assert type(fb.revert_(model)) is type(plain) is type(fb.revert_(other))


@torch.no_grad()
def test_a_forward_that_reads_its_batch_as_text():
    """What no symbol can see. README says so; without the symbol it is right."""
    function = rows(lambda y: y + (1 if f"{y.shape[0]}" == "4" else 0))
    plain = Forward(function).eval()
    model = fb.optimize_(Forward(function).eval(), dynamic_batch=False)
    for batch in (2, 3, 4):
        x = integers((batch, 3, 4, 4), batch)
        assert_like(model(x), plain(x))


# ---- changes, memory, threads ----


@torch.no_grad()
def test_weights_change_in_between(exports):
    model = Tap().eval()
    for batch in (2, 3):
        assert_planned(model, torch.randn(batch, 3, 5, 4))
    model.conv.weight.mul_(2)
    model.bn.running_mean.add_(1)
    for batch in (4, 2, 5):
        assert_planned(model, torch.randn(batch, 3, 5, 4))
    assert exports == [2, None]


@torch.no_grad()
@pytest.mark.parametrize("change", ["a module", "a number", "a shape"])
def test_the_structure_changes_in_between(change, exports):
    model = Tiny().eval()
    for batch in (2, 3):
        assert_planned(model, torch.randn(batch, 3, 5, 4))
    if change == "a module":
        model.relu = nn.Sigmoid()
    elif change == "a number":
        model.scales[0] = 3.0
    else:
        model.fc = nn.Linear(16, 7)
    for batch in (4, 2, 5):
        assert_planned(model, torch.randn(batch, 3, 5, 4))
    assert exports == [2, None, 4, None]


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def watched(model):
    """The model, its first filters on memory that tells when it is freed; and references that tell."""
    memory = model.conv.weight.detach().numpy().copy()
    model.conv.weight = nn.Parameter(torch.from_numpy(memory))
    return model.eval(), [weakref.ref(model), weakref.ref(model.conv.weight), weakref.ref(memory)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["templates", "none"])
def test_a_dropped_model_gives_its_memory_back(name, no_collection):
    function = rows(ONCE["flip"] if name == "templates" else OTHERS["len"])
    model, references = watched(fb.optimize_(Forward(function)))
    for batch in (2, 3, 4):
        model(integers((batch, 3, 4, 4), 0))
    (family,) = EngineState.of(model).families.values()
    assert len(family.templates) == (name == "templates")
    del model
    assert [r() for r in references] == [None] * 3


@torch.no_grad()
def test_what_is_kept_holds_neither_tensors_nor_shape_environments():
    model = Tiny().eval()
    for batch in (2, 3):
        model(torch.randn(batch, 3, 5, 4))
    (family,) = EngineState.of(model).families.values()
    seen, todo = set(), [family]
    plain = (type, type(gc), type(test_many_batches_cost_few_captures), torch._ops.OpOverload)
    while todo:
        one = todo.pop()
        if id(one) not in seen and not isinstance(one, plain):
            seen.add(id(one))
            assert not isinstance(one, Tensor | nn.Module | torch.fx.Graph | torch.fx.Node), type(one)
            assert type(one).__name__ not in ("ShapeEnv", "FakeTensorMode", "ExportedProgram")
            todo += gc.get_referents(one)
    assert len(family.templates) == 1 and len(seen) > 100


def test_threads_with_batches_of_their_own(exports):
    model = Tap().eval()
    images = {batch: torch.randn(batch, 3, 6, 5) for batch in (1, 2, 3, 4, 5, 6)}
    errors, results, barrier = [], [], threading.Barrier(4)

    @torch.no_grad()
    def work(number):
        try:
            barrier.wait()
            for i in range(12):
                batch = 1 + (i + number) % 6
                results.append((batch, model(images[batch])))
        except BaseException as error:  # shown by the assert below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    with torch.no_grad():
        expected = {batch: model(x) for batch, x in images.items()}
        assert_like(expected[5], model.forward_modules(images[5]), assert_close)
    assert len(results) == 48
    for batch, result in results:
        assert_bit_equal(result, expected[batch])
    assert exports.count(None) == 1 and len(exports) <= 3


# ---- torch.compile ----


@torch.no_grad()
def test_the_backend_of_torch_compile(exports):
    torch._dynamo.reset()
    model = Forward(rows(lambda y: y.view(y.shape[0], -1) * y.shape[0])).eval()
    fast = torch.compile(model, backend=compile_backend.fast_backbones)
    for batch in (2, 5, 3, 7, 4, 6):
        x = integers((batch, 3, 4, 4), batch)
        assert_like(fast(x), model(x))
    assert exports == [2, 5, None], "one of the graph for a batch of 2, and two of that for others"
    torch._dynamo.reset()


def test_a_wrong_template_is_not_used(monkeypatch):
    """It is compared with what a batch's own capture gave."""
    model = Forward(rows(lambda y: y.flatten(0, 1))).eval()
    family, made = Family(), []
    real = batches.capture_batches

    def wrong(*call):
        template = real(*call)
        template.program.instructions[-2].args[1:] = [1, 2]
        made.append(template)
        return template

    monkeypatch.setattr(batches, "capture_batches", wrong)
    for batch in (2, 3, 4):
        x = torch.randn(batch, 3, 4, 4)
        own = capture(model, model.forward, x)
        assert family.program(model, model.forward, x).digest() == own.digest()
    assert len(made) == 1 and not family.templates and not family.dynamic

"""The rewrites of whole families of networks, each on a small network that shows it.

Like test_engine_fuse.py: the rewritten plan in float64 against the modules in float64, in an arena full of
NaN, and through the kernels. `steps` says what has to be left, in order.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.engine.recipes import Stack
from helpers import needs_native, poisoned
from test_engine_fuse import Net, assert_same_function, conv, norm, plan_of, settle, tensors_of
from torch import nn

from fast_backbones import engine
from fast_backbones.engine import run_reference


def pointwise(c, k, **options):
    return nn.Conv2d(c, k, 1, bias=options.pop("bias", False), **options)


def depthwise(channels=8, **options):
    return conv(channels, channels, groups=channels, **options)


def unit(c, k, r=1, **options):
    """Convolution, norm, ReLU."""
    return nn.Sequential(conv(c, k, r, **options), nn.BatchNorm2d(k), nn.ReLU(inplace=True))


class Squeeze(nn.Module):
    def __init__(self, channels, gate=None):
        super().__init__()
        self.fc1, self.fc2 = pointwise(channels, 4, bias=True), pointwise(4, channels, bias=True)
        self.gate = gate or nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()))


class Excite(nn.Sequential):
    """Layers of rows between the mean and the gate."""

    def forward(self, x):
        return x * super().forward(x.mean((2, 3))).view(*x.shape[:2], 1, 1)


def dense_block(m, x):
    maps = [m.stem(x)]
    for layer in m.layers:
        maps.append(layer(torch.cat(maps, 1)))
    return torch.relu(torch.cat(maps, 1))


def dense_layer(c, k):
    return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), unit(c, 32), conv(32, k))


def dense_layers(count):
    return nn.ModuleList([dense_layer(8 + 16 * i, 16) for i in range(count)])


def inception(m, x):
    x = m.stem(x)
    return m.end(torch.cat([m.one(x), m.three(x), m.pool(x)], 1))


def inception_layers(**pool):
    return {
        "stem": unit(8, 32), "one": unit(32, 16), "three": nn.Sequential(unit(32, 24), unit(24, 32, 3)),
        "pool": nn.Sequential(nn.AvgPool2d(3, 1, 1, **pool), unit(32, 32)), "end": pointwise(80, 8),
    }  # fmt: skip


def image_range(m, x):
    parts = [x[:, c : c + 1] * (0.2 + c) - (0.5 - c) for c in range(8)]
    return m.conv(torch.cat(parts, 1))


def local_response(m, x):
    return m.norm(m.conv(x))


def slice_beside_its_norm(m, x):
    y = m.a(x)
    return y, torch.cat([y, m.b(x)], 1), m.norm(y).relu()


def flattened_prefix(m, x):
    y, z = m.a(x), m.b(x)
    return m.fc(torch.cat([y, z], 1).flatten(1)), m.d(torch.cat([y, z, x], 1))


def gate_and_its_mean(m, x):
    y = m.conv(x)
    mean = y.mean((2, 3), keepdim=True)
    return y * torch.sigmoid(mean), mean


def distances(x, centers):
    return (x.unsqueeze(1) - centers).square().sum(2)


NETS = {  # why: (network, steps without layout copies)
    "ReLU6, sigmoid, tanh": (
        Net(lambda m, x: m.c(m.b(m.a(x).sigmoid()).tanh()).clamp(0, 6), a=pointwise(8, 8), b=pointwise(8, 8),
            c=nn.Sequential(pointwise(8, 8), nn.Hardtanh(0, 6), pointwise(8, 8), nn.ReLU6())),
        "conv2d conv2d conv2d conv2d affine",
    ),
    "numbers that scale and shift": (
        Net(lambda m, x: torch.tanh((m.a(x) * 3 - 0.5) / 4 + 1), a=conv()),
        "conv2d",
    ),
    "padding that a convolution takes over": (
        Net(lambda m, x: m.conv(F.pad(x, (2, 2, 1, 1))), conv=nn.Conv2d(8, 8, 3)),
        "conv2d",
    ),
    "padding that is uneven": (
        Net(lambda m, x: m.conv(F.pad(m.conv(x), (0, 1, 0, 1))), conv=nn.Conv2d(8, 8, 3)),
        "conv2d conv2d",
    ),
    "uneven padding of a planar image": (
        Net(lambda m, x: m.conv(F.pad(x, (0, 1, 2, 0))), conv=nn.Conv2d(8, 8, 3, 2, padding=1)), "conv2d",
    ),
    "uneven padding of a depthwise convolution": (
        Net(lambda m, x: m.dw(F.pad(x, (0, 1, 0, 1))).relu(), dw=nn.Conv2d(8, 8, 3, 2, groups=8)),
        "depthwise_conv2d",
    ),
    "uneven padding of a separable convolution, behind ReLU": (
        Net(lambda m, x: m.pw(m.dw(F.pad(x.relu(), (0, 1, 0, 1)))), dw=nn.Conv2d(8, 8, 3, 2, groups=8),
            pw=unit(8, 16)),
        "separable_conv2d",
    ),
    "uneven padding of grouped rows": (
        Net(lambda m, x: m.b(F.pad(m.a(x), (0, 1, 0, 1))), a=unit(8, 32),
            b=nn.Conv2d(32, 32, 3, 2, groups=8)),
        "conv2d grouped_conv2d",
    ),
    "padding by name of an even kernel": (
        Net(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, 4, padding="same")), "conv2d",
    ),
    "a max pool whose border never wins": (
        Net(lambda m, x: F.max_pool2d(F.pad(m.conv(x) - 9, (0, 1, 1, 0), value=-math.inf), 3, 2),
            conv=conv()),
        "conv2d max_pool2d",
    ),
    "a max pool whose border may win": (
        Net(lambda m, x: F.max_pool2d(F.pad(m.conv(x) - 9, (0, 1, 1, 0)), 3, 2), conv=conv()),
        "conv2d pad2d max_pool2d",
    ),
    "an average pool that counts its border": (
        Net(lambda m, x: F.avg_pool2d(F.pad(m.conv(x), (0, 1, 1, 0)), 3, 2), conv=conv()),
        "conv2d avg_pool2d",
    ),
    "an average pool that counts one border of two": (
        Net(lambda m, x: F.avg_pool2d(F.pad(m.conv(x), (0, 1, 1, 0)), 3, 2, 1, False, False), conv=conv()),
        "conv2d pad2d avg_pool2d",
    ),
    "pools in ceil mode behind a border": (
        Net(lambda m, x: F.avg_pool2d(F.pad(m.conv(x), (0, 1, 0, 1)), 2, 2, ceil_mode=True), conv=conv()),
        "conv2d pad2d avg_pool2d",
    ),
    "a border of numbers": (
        Net(lambda m, x: m.conv(F.pad(m.conv(x), (0, 1, 0, 1), value=2.5)), conv=conv()),
        "conv2d pad2d conv2d",
    ),
    "a border that two readers want": (
        Net(lambda m, x: (lambda y: m.conv(y) + y.relu())(F.pad(m.conv(x), (3, 1))), conv=conv()),
        "conv2d pad2d affine conv2d",
    ),
    "a border inside a concatenation": (
        Net(lambda m, x: m.end(torch.cat([F.pad(m.conv(x), (0, 1, 0, 1)), m.wide(x)], 1)), conv=conv(),
            wide=nn.Conv2d(8, 8, 2, padding=1), end=conv(16, 8)),
        "conv2d pad2d conv2d conv2d",
    ),
    "the image with a border, returned": (
        Net(lambda m, x: (m.conv(x), F.pad(x, (1, 0, 0, 2)))[1], conv=conv()), "pad2d",
    ),
    "a map flattened into a linear layer": (
        Net(lambda m, x: m.fc(m.conv(x).flatten(1)).relu(), conv=conv(), fc=nn.Linear(800, 5)),
        "conv2d linear",
    ),
    "a flattened map with another reader": (
        Net(lambda m, x: (lambda y: m.fc(y) + y.sum())(m.conv(x).flatten(1)), conv=conv(),
            fc=nn.Linear(800, 5)),
        "conv2d aten linear aten aten",
    ),
    "adaptive pool, and one that changes nothing": (
        Net(lambda m, x: F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(m.conv(x), 10), (4, 3)), conv=conv()),
        "conv2d avg_pool2d",
    ),
    "a pool whose divisor is given": (
        Net(lambda m, x: F.avg_pool2d(m.conv(x), 3, 1, 1, divisor_override=8), conv=conv()),
        "conv2d avg_pool2d",
    ),
    "local response norm": (
        Net(local_response, conv=conv(), norm=nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0)),
        "conv2d local_response_norm",
    ),
    "embeddings of length one": (
        Net(lambda m, x: F.normalize(m.fc(m.conv(x).mean((2, 3)))), conv=conv(), fc=nn.Linear(8, 20)),
        "conv2d global_avg_pool linear l2_normalize",
    ),
    "pixels of length one, of length two, and along the image": (
        Net(lambda m, x: (lambda y: F.normalize(y) * 2 + F.normalize(y, p=1.0) + F.normalize(y, dim=2))(
            m.conv(x)), conv=conv()),
        None,
    ),
    "length one, and the length too": (
        Net(lambda m, x: (lambda y: (F.normalize(y, eps=0.5), y.norm(2, 1, keepdim=True)))(m.conv(x)),
            conv=conv()),
        "conv2d l2_normalize aten",
    ),
    "distances to centres": (
        Net(lambda m, x: distances(m.conv(x).mean((2, 3)), m.centers), conv=conv(),
            centers=nn.Parameter(torch.randn(5, 8))),
        "conv2d global_avg_pool squared_distances",
    ),
    "distances with a power, from a power of centres": (
        Net(lambda m, x: (x.mean((2, 3)).unsqueeze(1) - m.centers.exp()).pow(2).sum(-1),
            centers=nn.Parameter(torch.randn(3, 8))),
        "global_avg_pool squared_distances",
    ),
    "distances to one number a centre": (
        Net(lambda m, x: distances(m.conv(x).mean((2, 3)), m.centers), conv=conv(),
            centers=nn.Parameter(torch.randn(5, 1))),
        "conv2d global_avg_pool aten aten aten aten",
    ),
    "the value range of the image": (Net(image_range, conv=conv()), "conv2d"),
    "norm and ReLU in front of a convolution": (
        Net(lambda m, x: m.conv(m.norm(x).relu()) + x, conv=pointwise(8, 8), norm=norm()),
        "conv2d",
    ),
    "a leading ReLU whose result the caller wants too": (
        Net(lambda m, x: (lambda y: m.conv(y) * y.sum())(x.relu()), conv=pointwise(8, 8)),
        "affine conv2d aten aten",
    ),
    "separable": (
        Net(lambda m, x: m.pw(m.relu(m.bn(m.dw(x)))), dw=depthwise(), bn=norm(), relu=nn.ReLU6(),
            pw=unit(8, 16)),
        "separable_conv2d",
    ),
    "separable with a leading ReLU and a sum": (
        Net(lambda m, x: m.pw(m.dw(x.relu())) + x, dw=depthwise(), pw=pointwise(8, 8)),
        "separable_conv2d",
    ),
    "depthwise alone": (
        Net(lambda m, x: m.dw(x).relu() + x, dw=depthwise()), "depthwise_conv2d affine",
    ),
    "the gate is known before a 1x1": (
        Net(lambda m, x: torch.relu(m.se(m.bn(m.conv(x))) + x), conv=pointwise(8, 8), bn=norm(),
            se=Squeeze(8)),
        "global_avg_pool linear linear conv2d",
    ),
    "a residual scale behind the gate": (
        Net(lambda m, x: x + 0.2 * m.se(m.conv(x)), conv=pointwise(8, 8, bias=True), se=Squeeze(8)),
        "global_avg_pool linear linear conv2d",
    ),
    "a norm behind the first layer of the excitation": (
        Net(lambda m, x: m.excite(m.bn(m.conv(x))), conv=pointwise(8, 24, bias=True), bn=nn.BatchNorm2d(24),
            excite=Excite(nn.Linear(24, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 24), nn.Sigmoid())),
        "global_avg_pool linear linear conv2d",
    ),
    "a first layer of the excitation that is wider than the map": (
        Net(lambda m, x: m.excite(m.conv(x)), conv=pointwise(8, 16),
            excite=Excite(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16), nn.Sigmoid())),
        "global_avg_pool linear linear linear conv2d",
    ),
    "an activation between convolution and gate": (
        Net(lambda m, x: torch.relu(m.se(m.conv(x)) + x), conv=unit(8, 8), se=Squeeze(8)),
        "conv2d global_avg_pool linear linear affine",
    ),
    "average pool before a 1x1": (
        Net(lambda m, x: m.pool(m.stem(x)), **inception_layers()),
        "conv2d conv2d avg_pool2d",
    ),
    "siblings, one of them behind a pool": (
        Net(inception, **inception_layers(count_include_pad=False)),
        "conv2d conv2d conv2d avg_pool2d conv2d",
    ),
    "a dense block": (
        Net(dense_block, stem=conv(), layers=dense_layers(3)),
        "conv2d conv2d conv2d conv2d conv2d conv2d conv2d affine",
    ),
    "a concatenation of concatenations": (
        Net(lambda m, x: m.d(torch.cat([torch.cat([m.a(x), m.b(x)], 1), m.c(x)], 1)),
            a=conv(), b=conv(), c=conv(), d=conv(24, 8)),
        "conv2d conv2d conv2d conv2d",
    ),
    "the image and the same map twice": (
        Net(lambda m, x: (lambda y: m.d(torch.cat([x, y, y], 1)))(m.a(x)), a=conv(), d=conv(24, 8)),
        "conv2d affine affine conv2d",
    ),
    "two concatenations want one map": (
        Net(lambda m, x: (lambda y, z: m.d(torch.cat([y, z], 1)) + m.d(torch.cat([z, y], 1)))(m.a(x), m.b(x)),
            a=conv(), b=conv(), d=conv(16, 8)),
        "conv2d conv2d affine affine conv2d conv2d",
    ),
    "slices that the caller receives": (
        Net(lambda m, x: (lambda y, z: (torch.cat([y, z], 1), z, torch.cat([y, z], 1).relu()))(
            m.a(x), m.b(x)), a=conv(), b=conv()),
        None,
    ),
    "a slice that the caller receives beside its norm": (
        Net(slice_beside_its_norm, a=conv(), b=conv(), norm=norm()),
        None,
    ),
    "siblings, one of them flattened into a linear layer": (
        Net(lambda m, x: m.fc(m.a(x).flatten(1)) + m.b(x).mean((2, 3)), a=unit(8, 32), b=unit(8, 32),
            fc=nn.Linear(3200, 32)),
        "conv2d linear conv2d global_avg_pool affine",
    ),
    "a prefix flattened into a linear layer": (
        Net(flattened_prefix, a=conv(), b=conv(), d=conv(24, 8), fc=nn.Linear(1600, 5)),
        None,
    ),
    "a gate whose mean the caller receives": (
        Net(gate_and_its_mean, conv=pointwise(8, 8)),
        "global_avg_pool linear affine conv2d",
    ),
}  # fmt: skip
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("why", NETS)
def test_rewrites_keep_the_function(why, layout):
    model, steps = NETS[why]
    settle(model)
    x = torch.randn(3, 8, 10, 10).contiguous(memory_format=layout)
    plan = plan_of(model, x)
    kernels = [s.kernel for s in plan.steps if s.kernel not in ("to_nhwc", "to_nchw")]
    if steps is not None:
        assert kernels == steps.split()
    assert_same_function(model, plan, x)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("why", NETS)
def test_natively(why, layout):
    model = settle(NETS[why][0])
    x = torch.randn(3, 8, 10, 10).contiguous(memory_format=layout)
    engine.refresh(model)
    with torch.no_grad():
        for _ in range(2):
            with poisoned():
                ours, plain = engine.forward(model, x, model.forward), model(x)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
            for a, b in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(plain)):
                assert a.stride() == b.stride()
    engine.refresh(model)  # the networks stay: their plans need not


@pytest.mark.parametrize("why", NETS)
def test_without_any_kernel(why):
    """Every node that a library refuses has a formula: the plan is slow and right."""
    model = settle(NETS[why][0])
    x = torch.randn(2, 8, 10, 10)
    plan = plan_of(model, x, lambda kind, params: "no")
    assert all(step.kernel == "aten" or step.kernel.startswith("to_n") for step in plan.steps)
    assert_same_function(model, plan, x)


@pytest.mark.parametrize("kind", ["separable_conv2d", "depthwise_conv2d", "affine", "avg_pool2d"])
def test_without_one_kernel(kind):
    """The others keep their kernels: a rewrite asks before it makes a node."""
    for why, (model, _) in NETS.items():
        settle(model)
        x = torch.randn(2, 8, 10, 10)
        plan = plan_of(model, x, lambda asked, params: "absent" if asked == kind else "")
        left = [s for s in plan.steps if s.kernel == "aten" and s.op not in ("aten", "pad")]
        allowed = {"affine": ("affine",), "avg_pool2d": ("avg_pool2d",)}.get(kind, ())
        assert all(step.op in allowed for step in left), (why, [s.op for s in left])
        got = run_reference.run(plan, x, tensors_of(model), torch.float64)
        exact = model.double()(x.double())
        model.float()
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)


def plan_for(why):
    return plan_of(settle(NETS[why][0]), torch.randn(2, 8, 10, 10))


def test_a_dense_block_has_one_buffer():
    plan = plan_for("a dense block")
    owners = {plan.root(v).id for s in plan.steps if s.params.get("pre") for v in s.inputs}
    assert len(owners) == 1 and plan.values[owners.pop()].channels == 8 + 3 * 16
    reads = [plan.values[s.inputs[0]].channels for s in plan.steps if s.params.get("pre")]
    assert reads == [8, 24, 40], "each layer reads a longer prefix"


def test_siblings_share_a_buffer_with_their_concatenation():
    plan = plan_for("siblings, one of them behind a pool")
    merged = plan.steps[1]
    assert isinstance(merged.recipes["weight"], Stack) and merged.params["k"] == 32 + 24 + 16
    assert merged.params["act_from"] == 32, "the pool's projection has no activation yet"
    buffer = plan.root(merged.output)
    assert buffer.gap == 8 and (buffer.gap + 32 + 24) % 16 == 0, "the concatenation starts at a cache line"
    assert {plan.root(s.output).id for s in plan.steps[1:4]} == {buffer.id}, "nothing is copied"


def test_a_pool_behind_its_projection_adds_the_bias():
    plan = plan_for("average pool before a 1x1")
    convolution, pool = plan.steps[1:3]
    assert convolution.params["activation"] == 0 and pool.params["activation"] == 1
    assert convolution.recipes["weight"].without_bias and set(pool.recipes) == {"bias"}


def test_prefixes_wait_for_the_newest_layer_only():
    """Rows of the last layer imply the same rows of all before it."""
    model = settle(Net(dense_block, stem=conv(), layers=dense_layers(16)))
    plan = plan_of(model, torch.randn(1, 8, 10, 10))
    (part,) = plan.parts
    assert max(len(needed) for needed in part.deps) <= 5


def test_a_step_that_stays_with_pytorch_says_which_operation_has_no_kernel():
    model = settle(Net(lambda m, x: m.conv(x.cumsum(3)), conv=conv()))
    plan = plan_of(model, torch.randn(2, 8, 10, 10))
    assert plan.steps[0].refusals == ["no kernel for aten.cumsum"]


def test_winograd_declines_an_uneven_border():
    model = settle(Net(lambda m, x: m.conv(F.pad(x, (1, 0, 0, 1))), conv=nn.Conv2d(32, 32, 3)))
    (step,) = [s for s in plan_of(model, torch.randn(2, 32, 10, 10)).steps if s.op == "conv2d"]
    assert step.kernel == "conv2d"
    assert step.refusals == ["winograd_conv2d: a border that differs from side to side"]


@needs_native
def test_more_border_than_half_a_window_is_a_step_of_its_own():
    """The pools' kernels refuse it, as PyTorch's do."""
    net = Net(lambda m, x: F.max_pool2d(F.pad(m.conv(x), (2, 2, 2, 2), value=-math.inf), 3, 2), conv=conv())
    model, x = settle(net), torch.randn(2, 8, 10, 10)
    with torch.no_grad():
        plan = engine.plan_for(model, x)
        assert [s.kernel for s in plan.steps if not s.kernel.startswith("to_n")] == [
            "conv2d", "pad2d", "max_pool2d",
        ]  # fmt: skip
        torch.testing.assert_close(engine.forward(model, x, model.forward), model(x), rtol=1e-4, atol=1e-5)

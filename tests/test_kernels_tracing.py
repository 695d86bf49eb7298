"""opcheck, torch.compile, torch.export, torch.fx, torch.jit.trace, autocast, subclasses."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_bit_equal, layout_name, needs_native, reals
from helpers import one_thread as one_thread

from fast_backbones import kernels

CL = torch.channels_last


def operators():
    return torch.ops.fast_backbones


def views(x):
    yield "nchw", x
    yield "nhwc", x.to(memory_format=CL)
    yield "transposed", x.transpose(2, 3)
    yield "every second channel", x.repeat_interleave(2, 1)[:, ::2]
    yield "expanded", x[:1].expand(x.shape)
    yield "one image", x[:1]
    yield "one pixel", x[:, :, :1, :1]
    yield "empty", x[:0]


@needs_native
@pytest.mark.parametrize("kernel", ["conv2d", "winograd_conv2d", "grouped_conv2d"])
def test_opcheck_of_convolutions(kernel):
    op = getattr(operators(), kernel).default
    groups = 4 if kernel == "grouped_conv2d" else 1
    weight, bias = reals((16, 16 // groups, 3, 3), 2), reals((16,), 3)
    for name, x in views(reals((2, 16, 5, 6), 1)):
        residual = reals((x.shape[0], 16, x.shape[2], x.shape[3]), 4) if name in ("nchw", "nhwc") else None
        arguments = (x, weight, bias, residual, [1, 1], [1, 1], [1, 1], groups, "relu")
        torch.library.opcheck(op, arguments)
    torch.library.opcheck(
        op, (x, weight.to(memory_format=CL), None, None, [1, 1], [1, 1], [1, 1], groups, "none")
    )


@needs_native
def test_opcheck_of_separable_convolutions():
    depth_weight, weight = reals((16, 1, 3, 3), 2), reals((8, 16, 1, 1), 3)
    for name, x in views(reals((2, 16, 5, 6), 1)):
        biases = (reals((16,), 4), reals((8,), 5)) if name in ("nchw", "nhwc") else (None, None)
        arguments = (x, depth_weight, weight, *biases, [2, 1], [1, 1], [1, 1], "relu", "relu6")
        torch.library.opcheck(operators().separable_conv2d.default, arguments)


@needs_native
@pytest.mark.parametrize("kind", ["conv2d", "winograd_conv2d", "grouped_conv2d", "depthwise_conv2d"])
def test_opcheck_of_convolutions_behind_a_norm(kind):
    groups = {"grouped_conv2d": 4, "depthwise_conv2d": 16}.get(kind, 1)
    weight, scale, shift = reals((16, 16 // groups, 3, 3), 2), reals((16,), 3), reals((16,), 4)
    for _, x in views(reals((2, 16, 5, 6), 1)):
        arguments = (kind, x, scale, shift, "relu6", weight, None, [1, 1], [1, 1], [1, 1], groups)
        torch.library.opcheck(operators().affine_conv2d.default, arguments)
        if x.numel() > 0:
            torch.library.opcheck(operators().batch_norm_affine.default, (x, scale, shift, None, None, 1e-5))


@needs_native
def test_opcheck_of_what_gradients_call():
    for _, x in views(reals((2, 16, 5, 6), 1)):
        height, width = x.shape[2:]
        for added in (None, reals((*x.shape[:2], 2 * height, 3 * width - 2), 2)):
            arguments = (x, 2 * height, 3 * width - 2, [2, 3], added)
            torch.library.opcheck(operators().spread_pixels.default, arguments)
        window = ([2, 1], [2, 1], [1, 0])
        torch.library.opcheck(operators().max_pool2d_taps.default, (x, *window, True))
        y, taps = operators().max_pool2d_taps(x, *window, True)
        torch.library.opcheck(operators().max_pool2d_backward.default, (y, taps, height, width, *window))


@needs_native
def test_opcheck_of_depthwise_convolutions():
    weight, bias = reals((16, 1, 3, 3), 2), reals((16,), 3)
    for name, x in views(reals((2, 16, 5, 6), 1)):
        arguments = (x, weight, bias if name == "nchw" else None, [2, 1], [1, 1], [1, 1], "relu6")
        torch.library.opcheck(operators().depthwise_conv2d.default, arguments)


@needs_native
def test_opcheck_of_squeeze_excite():
    weights = (reals((4, 16), 2), reals((4,), 3), reals((16, 4), 4), reals((16,), 5))
    for name, x in views(reals((2, 16, 5, 6), 1)):
        layers = weights if name == "nchw" else (weights[0], None, weights[2], None)
        torch.library.opcheck(operators().squeeze_excite.default, (x, *layers))


@needs_native
def test_opcheck_of_the_others():
    for name, x in views(reals((2, 16, 5, 6), 1)):
        torch.library.opcheck(operators().global_avg_pool.default, (x,))
        if name != "one pixel":
            torch.library.opcheck(operators().max_pool2d.default, (x, [3, 2], [2, 1], [1, 1], True))
            torch.library.opcheck(operators().avg_pool2d.default, (x, [3, 2], [2, 1], [1, 1], True, False))
        torch.library.opcheck(operators().local_response_norm.default, (x, 5, 0.3, 0.75, 2.0))
        torch.library.opcheck(operators().l2_normalize.default, (x, 1e-12))
        torch.library.opcheck(operators().squared_distances.default, (x[:, :, 0, 0], reals((5, 16), 2)))
        torch.library.opcheck(
            operators().linear.default, (x[:, :, 0, 0], reals((5, 16), 2), reals((5,), 3), "relu")
        )


class Net(torch.nn.Module):
    """Every op once, with a residual that is also the input."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Parameter(reals((16, 3, 7, 7), 1) / 12)
        self.dense = torch.nn.Parameter(reals((16, 16, 3, 3), 2) / 12)
        self.grouped = torch.nn.Parameter(reals((16, 4, 3, 3), 3) / 6)
        self.depth = torch.nn.Parameter(reals((16, 1, 3, 3), 8) / 3)
        self.pointwise = torch.nn.Parameter(reals((24, 16, 1, 1), 4) / 4)
        self.mixing = torch.nn.Parameter(reals((16, 16, 1, 1), 9) / 4)
        self.squeeze = torch.nn.Parameter(reals((4, 16), 10) / 4)
        self.head = torch.nn.Parameter(reals((10, 24), 5) / 5)
        self.bias = torch.nn.Parameter(reals((16,), 6))

    def forward(self, x):
        x = kernels.stem_conv2d(x, self.stem, self.bias, activation="relu")
        x = kernels.max_pool2d(x, 3, stride=2, padding=1)
        x = kernels.conv2d(x, self.dense, self.bias, padding=1, residual=x, activation="relu")
        x = kernels.grouped_conv2d(x, self.grouped, groups=4, activation="relu")
        x = kernels.depthwise_conv2d(x, self.depth, self.bias, padding=1, activation="relu6")
        x = kernels.local_response_norm(kernels.avg_pool2d(x, 3, stride=1, padding=1), 5)
        x = kernels.squeeze_excite(x, self.squeeze, None, self.squeeze.t(), self.bias)
        x = kernels.separable_conv2d(x, self.depth, self.mixing, bias=self.bias, activation="relu")
        x = kernels.l2_normalize(kernels.global_avg_pool(kernels.pointwise_conv2d(x, self.pointwise)))
        return kernels.linear(x, self.head) - kernels.squared_distances(x, self.head)


def targets(graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_compile_without_graph_breaks(layout):
    torch._dynamo.reset()
    net = Net()
    x = reals((2, 3, 33, 37), 7).to(memory_format=layout)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_bit_equal(compiled(x), net(x), "inference")
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(compiled(x).square().sum(), parameters)
    for actual, expected in zip(gradients, torch.autograd.grad(net(x).square().sum(), parameters)):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


@needs_native
def test_compile_with_a_residual_that_is_the_input():
    layers = reals((4, 16), 2), None, reals((16, 4), 3), None
    x = reals((2, 16, 5, 6), 1).requires_grad_()
    for call in (
        lambda x: kernels.batch_norm(x, residual=x, activation="relu"),
        lambda x: kernels.squeeze_excite(x, *layers, residual=x, activation="relu"),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found, expected = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (compiled, call))
        torch.testing.assert_close(found, expected)


@needs_native
def test_compiled_code_follows_the_backend():
    torch._dynamo.reset()
    x, weight = reals((1, 32, 9, 9), 1), reals((32, 32, 3, 3), 2)
    call = lambda: kernels.conv2d(x, weight, padding=1)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_bit_equal(compiled(), call(), "auto")
        with kernels.backend("reference"):
            assert_bit_equal(compiled(), F.conv2d(x, weight, padding=1), "reference")
        assert_bit_equal(compiled(), kernels.conv2d(x, weight, padding=1, backend="winograd"), "auto again")

        def inside(t):
            with kernels.backend("reference"):
                return kernels.conv2d(t, weight, padding=1)

        compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
        assert_bit_equal(compiled(x), F.conv2d(x, weight, padding=1), "chosen inside")


@needs_native
def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    weight = reals((16, 16, 3, 3), 2)

    def call(x):
        return kernels.max_pool2d(kernels.conv2d(x, weight, padding=1, activation="relu"), 2, ceil_mode=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 16, 7, 9), (3, 16, 8, 12), (5, 16, 11, 6)):
        x = reals(shape, 1)
        assert_bit_equal(compiled(x), call(x), str(shape))


@needs_native
def test_compile_with_inductor():
    torch._dynamo.reset()
    net = Net()
    x = reals((2, 3, 33, 37), 7).to(memory_format=CL)
    with torch.no_grad():
        assert torch.allclose(torch.compile(net, fullgraph=True)(x), net(x), rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_export_with_a_dynamic_batch(strict, grad):
    net = Net()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            net, (reals((2, 3, 33, 37), 7),), dynamic_shapes={"x": {0: batch}}, strict=strict
        )
    with torch.no_grad():
        x = reals((5, 3, 33, 37), 8)
        assert_bit_equal(program.module()(x), net(x), "five images")
    if not grad:
        assert {f"fast_backbones.{op}.default" for op in ("conv2d", "linear", "max_pool2d")} <= targets(
            program.graph
        )


@needs_native
def test_fake_and_meta_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 16, 9, 9).to(memory_format=CL)
        y = kernels.conv2d(x, torch.empty(8, 16, 3, 3), stride=2, padding=1, activation="relu")
        assert y.shape == (2, 8, 5, 5) and y.is_contiguous(memory_format=CL)
    y = kernels.conv2d(torch.empty(2, 16, 9, 9, device="meta"), torch.empty(8, 16, 3, 3, device="meta"))
    assert y.device.type == "meta" and y.shape == (2, 8, 7, 7)


def test_symbolic_trace_keeps_each_op_whole():
    net = Net()
    traced = torch.fx.symbolic_trace(net)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert kernels.conv2d in calls and kernels.linear in calls
    with torch.no_grad():
        x = reals((1, 3, 33, 37), 7)
        assert_bit_equal(traced(x), net(x), "traced")


@needs_native
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:.*jit:UserWarning"
)
def test_jit_trace():
    net = Net().eval()
    x = reals((1, 3, 33, 37), 7)
    with torch.no_grad():
        traced = torch.jit.trace(net, (x,))
        assert_bit_equal(traced(2 * x), net(2 * x), "traced")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_behaves_like_torchs_own(dtype):
    x, weight, bias = reals((2, 16, 7, 7), 1), reals((16, 16, 3, 3), 2), reals((16,), 3)
    with torch.autocast("cpu", dtype=dtype):
        assert_equal_kind(kernels.conv2d(x, weight, bias, padding=1), F.conv2d(x, weight, bias, padding=1))
        assert_equal_kind(kernels.conv2d(x.to(dtype), weight, bias), F.conv2d(x.to(dtype), weight, bias))
        rows = x[:, :, 0, 0]
        assert_equal_kind(kernels.linear(rows, weight[:, :, 0, 0]), F.linear(rows, weight[:, :, 0, 0]))
        assert_equal_kind(kernels.max_pool2d(x, 2), F.max_pool2d(x, 2))
        leaf = weight.clone().requires_grad_()
        kernels.conv2d(x, leaf, padding=1, activation="relu").sum().backward()
        twin = weight.clone().requires_grad_()
        F.relu(F.conv2d(x, twin, padding=1)).sum().backward()
        assert_equal_kind(leaf.grad, twin.grad)


def assert_equal_kind(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


class Tagged(torch.Tensor):
    """A subclass with torch's default behaviour."""


class Logging(torch.Tensor):
    """A wrapper that knows aten operators only."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        unwrapped = torch.utils._pytree.tree_map_only(Logging, lambda t: t.inner, (args, kwargs or {}))
        return func(*unwrapped[0], **unwrapped[1])


def test_tensor_subclasses():
    x, weight = reals((1, 16, 5, 5), 1), reals((16, 16, 3, 3), 2)
    y = kernels.conv2d(x.as_subclass(Tagged), weight)
    assert type(y) is Tagged
    assert torch.allclose(y, F.conv2d(x, weight), atol=1e-4)
    y = kernels.conv2d(Logging(x), weight)
    assert torch.allclose(y, F.conv2d(x, weight), atol=1e-4)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        assert_bit_equal(kernels.conv2d(x, parameter), kernels.conv2d(x, weight), "parameter")

"""The same bits in all circumstances: threads, batch, layout, strides, alignment, other callers, a fork."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LAYOUTS,
    assert_bit_equal,
    assert_equal,
    backends,
    integers,
    needs_native,
    reals,
    run_python,
    threads,
)
from kernel_cases import CASES, Inputs, cases, conv, grouped, native_candidates

from fast_backbones import kernels

CL = torch.channels_last
LARGE = [case for case in CASES if case.x[0] > 0]


def accepted(case):
    return [backend for backend in native_candidates(case.op) if case.accepted_by(backend)]


@needs_native
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_threads_do_not_change_bits(case):
    inputs = case.inputs("reals")
    for backend in accepted(case):
        results = {}
        for count in (1, 2, 3):
            with threads(count):
                results[count] = case.run(inputs, backend)
        assert_bit_equal(results[2], results[1], f"{backend}: 2 threads")
        assert_bit_equal(results[3], results[1], f"{backend}: 3 threads")


@needs_native
@pytest.mark.parametrize("case", [c for c in LARGE if c.op != "linear"], ids=lambda case: case.id)
def test_a_sample_alone_equals_the_sample_in_a_batch(case):
    inputs = case.inputs("reals")
    copies = max(1, 5 // case.x[0])
    many = inputs.args[0].repeat(copies, *(1 for _ in case.x[1:]))
    batch = Inputs((many, *inputs.args[1:]), dict(inputs.kwargs))
    if "residual" in batch.kwargs:
        batch.kwargs["residual"] = inputs.kwargs["residual"].repeat(copies, 1, 1, 1)
    for backend in accepted(case):
        together = case.run(batch, backend)
        for start in range(case.x[0]):
            alone = case.run(inputs.sample(slice(start, start + 1)), backend)
            for copy in range(copies):
                row = copy * case.x[0] + start
                assert_bit_equal(
                    together[row : row + 1], alone, f"{backend}: sample {row} of {len(together)}"
                )


@needs_native
@pytest.mark.parametrize("case", [c for c in cases("linear") if c.x[0] > 1], ids=lambda case: case.why)
def test_a_row_alone_equals_the_row_in_a_batch(case):
    inputs = case.inputs("reals")
    together = case.run(inputs, "native")
    for row in range(case.x[0]):
        part = slice(row, row + 1)
        assert_bit_equal(together[part], case.run(inputs.sample(part), "native"), f"row {row}")


@needs_native
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_layouts_and_repeats_do_not_change_bits(case):
    inputs = case.inputs("reals")
    for backend in accepted(case):
        first = case.run(inputs, backend)
        assert_bit_equal(case.run(inputs.to_layout(CL), backend), first, f"{backend}: channels_last")
        for _ in range(3):
            assert_bit_equal(case.run(inputs, backend), first, f"{backend}: again")


# ---- strides ----


def awkward_views(x):
    """The values of x in every kind of memory a caller may hand over."""
    n, c, h, w = x.shape
    yield "contiguous", x.contiguous()
    yield "channels_last", x.to(memory_format=CL)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "channels in front", x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    wide = torch.full((n, c + 5, h, w), float("nan")).to(memory_format=CL)
    wide[:, 2 : 2 + c] = x
    yield "slice of channels_last channels", wide[:, 2 : 2 + c]
    wide = torch.full((n, c, h + 2, w + 3), float("nan"))
    wide[:, :, 1 : 1 + h, 2 : 2 + w] = x
    yield "window of a larger image", wide[:, :, 1 : 1 + h, 2 : 2 + w]
    wide = wide.to(memory_format=CL)
    yield "window of a larger channels_last image", wide[:, :, 1 : 1 + h, 2 : 2 + w]
    flat = torch.empty(x.numel() + 1)
    flat[1:] = x.flatten()
    yield "4 bytes off alignment", flat[1:].view(x.shape)
    flat = torch.empty(x.numel() + 3)
    flat[3:] = x.permute(0, 2, 3, 1).flatten()
    yield "channels_last, 12 bytes off alignment", flat[3:].view(n, h, w, c).permute(0, 3, 1, 2)
    yield "negative bit", torch._neg_view(-x)
    yield "every second pixel", x.repeat_interleave(2, 3)[:, :, :, ::2]


MODEL = conv("awkward memory", 2, 20, 6, 9, 24, padding=1, residual=True)
GROUPED = grouped("awkward memory", 2, 32, 6, 9, 32, 8, residual=True)


@needs_native
@pytest.mark.parametrize("case", [MODEL, GROUPED], ids=["conv2d", "grouped_conv2d"])
def test_convolutions_of_awkward_memory(case):
    inputs = case.inputs("reals")
    x, weight, bias = inputs.args
    residual = inputs.kwargs["residual"]
    for backend in accepted(case):
        expected = case.run(inputs, backend)
        for name, view in awkward_views(x):
            before = view.clone()
            actual = case.run(Inputs((view, weight, bias), inputs.kwargs), backend)
            assert_bit_equal(actual, expected, f"{backend}: x {name}")
            assert torch.equal(view, before), f"{backend}: x {name} was modified"
        for name, view in awkward_views(weight):
            actual = case.run(Inputs((x, view, bias), inputs.kwargs), backend)
            assert_bit_equal(actual, expected, f"{backend}: weight {name}")
        for name, view in awkward_views(residual):
            actual = case.run(Inputs(inputs.args, {**inputs.kwargs, "residual": view}), backend)
            assert_bit_equal(actual, expected, f"{backend}: residual {name}")
        strided = torch.stack([bias, -bias], 1)[:, 0]
        actual = case.run(Inputs((x, weight, strided), inputs.kwargs), backend)
        assert_bit_equal(actual, expected, f"{backend}: strided bias")


@needs_native
def test_pools_and_linear_of_awkward_memory():
    x = reals((2, 20, 6, 9), 1)
    for name, view in awkward_views(x):
        assert_bit_equal(
            kernels.max_pool2d(view, 3, stride=2, padding=1, backend="native"), F.max_pool2d(x, 3, 2, 1), name
        )
        expected = kernels.global_avg_pool(x, backend="native")
        assert_bit_equal(kernels.global_avg_pool(view, backend="native"), expected, name)
    x, weight = reals((6, 10), 2), reals((7, 10), 3)
    expected = kernels.linear(x, weight, backend="native")
    for name, view in {
        "transposed": x.t().contiguous().t(),
        "columns of a wider matrix": torch.cat([x, x], 1)[:, :10],
        "every second row": x.repeat_interleave(2, 0)[::2],
    }.items():
        assert_bit_equal(kernels.linear(view, weight, backend="native"), expected, name)
    assert_bit_equal(
        kernels.linear(x, weight.t().contiguous().t(), backend="native"), expected, "transposed weight"
    )
    assert_bit_equal(
        kernels.linear(x.view(2, 3, 10), weight), expected.view(2, 3, 7), "two leading dimensions"
    )
    assert_bit_equal(kernels.linear(x[1], weight), expected[1], "a vector")


@needs_native
def test_expanded_and_overlapping_inputs():
    row = integers((1, 16, 1, 8), 1)
    weight = integers((16, 16, 3, 3), 2, multiple=4)
    expanded = row.expand(3, 16, 6, 8)
    overlapping = integers((400,), 3).as_strided((2, 16, 6, 8), (7, 5, 3, 1))
    for x in (expanded, overlapping):
        expected = F.conv2d(x.double(), weight.double(), padding=1).float()
        for backend in ("winograd", "direct"):
            assert_equal(kernels.conv2d(x, weight, padding=1, backend=backend), expected, backend)
        assert_equal(kernels.max_pool2d(x, 2, backend="native"), F.max_pool2d(x, 2), "max_pool2d")
    bias = integers((1,), 4).expand(16)
    residual = integers((1, 16, 1, 1), 5).expand(3, 16, 6, 8)
    expected = F.conv2d(expanded, weight, bias, padding=1) + residual
    assert_equal(
        kernels.conv2d(expanded, weight, bias, padding=1, residual=residual), expected, "expanded epilogue"
    )


SHAPES = [(2, 5, 4, 6), (1, 5, 4, 6), (2, 1, 4, 6), (1, 1, 4, 6), (3, 5, 1, 1), (1, 5, 1, 6), (1, 1, 1, 1)]


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_layout", LAYOUTS, ids=["x nchw", "x nhwc"])
@pytest.mark.parametrize("weight_layout", LAYOUTS, ids=["weight nchw", "weight nhwc"])
def test_output_strides_are_torchs(shape, x_layout, weight_layout):
    """Ambiguous shapes (one image, one channel, one pixel) included."""
    x = reals(shape, 1).to(memory_format=x_layout)
    for kernel in (1, 3):
        weight = reals((7, shape[1], kernel, kernel), 2).to(memory_format=weight_layout)
        expected = F.conv2d(x, weight, padding=kernel // 2)
        for backend in ["direct", "winograd"][: kernel // 2 + 1]:
            actual = kernels.conv2d(x, weight, padding=kernel // 2, backend=backend)
            assert actual.stride() == expected.stride(), f"{kernel}x{kernel}, {backend}"
        residual = torch.zeros_like(expected)
        actual = kernels.conv2d(x, weight, padding=kernel // 2, residual=residual, activation="relu")
        assert actual.stride() == expected.stride(), f"{kernel}x{kernel} with residual and ReLU"
    depth_weight = reals((shape[1], 1, 3, 3), 3).to(memory_format=weight_layout)
    weight = reals((7, shape[1], 1, 1), 4).to(memory_format=weight_layout)
    expected = kernels.separable_conv2d_ref(x, depth_weight, weight)
    actual = kernels.separable_conv2d(x, depth_weight, weight, backend="native")
    assert actual.stride() == expected.stride(), "separable"
    pooled = kernels.max_pool2d(x, 3, stride=2, padding=1, backend="native")
    assert pooled.stride() == F.max_pool2d(x, 3, 2, 1).stride()
    assert kernels.global_avg_pool(x, backend="native").stride() == x.mean((2, 3)).stride()


# ---- other callers ----


@needs_native
def test_python_threads_at_once():
    case = conv("shared", 1, 48, 14, 14, 48, padding=1, residual=True)
    inputs = case.inputs("reals")
    expected = {backend: case.run(inputs, backend) for backend in accepted(case)}
    failures = []

    def work():
        for _ in range(10):
            for backend, result in expected.items():
                if not torch.equal(case.run(inputs, backend), result):
                    failures.append(backend)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


FORK = """
import os, signal, torch
from fast_backbones import kernels
torch.set_num_threads(2)
x, weight = torch.randn(2, 32, 40, 40), torch.randn(32, 32, 3, 3)
def run():
    y = kernels.conv2d(x, weight, padding=1, activation="relu", backend="native")
    return kernels.max_pool2d(y, 3, stride=2, backend="native"), kernels.global_avg_pool(y, backend="native")
expected = run()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        good = all(torch.equal(a, b) for a, b in zip(run(), expected))
        os._exit(0 if good else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"child ended with status {status}"
assert all(torch.equal(a, b) for a, b in zip(run(), expected))
"""


@needs_native
def test_a_forked_child_runs_kernels():
    """After a parallel region in the parent PyTorch's own convolution would wait for ever in the child."""
    run_python("-c", FORK, timeout=120)


@pytest.mark.parametrize("backend", backends("conv2d"))
def test_a_thread_with_its_own_number_of_threads(backend):
    groups = 8 if backend == "grouped" else 1
    x, weight = reals((1, 32, 9, 9), 1), reals((32, 32 // groups, 3, 3), 2)
    results = []

    def work(count):
        torch.set_num_threads(count)
        results.append(kernels.conv2d(x, weight, padding=1, groups=groups, backend=backend))

    for count in (1, 2, 3):
        worker = threading.Thread(target=work, args=(count,))
        worker.start()
        worker.join()
    assert_bit_equal(results[1], results[0], backend)
    assert_bit_equal(results[2], results[0], backend)


@needs_native
def test_a_thousand_calls_give_the_same_bits_and_keep_no_memory():
    """In a process of its own: in a large one the system moves resident pages about meanwhile."""
    run_python("-c", "import test_kernels_invariance as own; own.call_a_thousand_times()")


def call_a_thousand_times():
    calls = [
        (case, backend, case.inputs("reals"))
        for case in (conv("repeated", 2, 32, 9, 11, 32, padding=1, residual=True), *cases("max_pool2d")[:1])
        for backend in accepted(case)
    ]
    first = [case.run(inputs, backend) for case, backend, inputs in calls]

    def repeat(times):
        for _ in range(times):
            for (case, backend, inputs), expected in zip(calls, first):
                assert torch.equal(case.run(inputs, backend), expected)

    with threads(1):
        repeat(200)
        before = resident_bytes()
        repeat(1000)
        grown = resident_bytes() - before
    assert grown < 2 * 2**20, f"{grown} bytes more after 1000 calls of {len(calls)} kernels"


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

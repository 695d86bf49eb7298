"""Random convolutions, pools and products: exact on integers, whatever the sizes."""

import torch
from helpers import LAYOUTS, assert_equal, needs_native
from helpers import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, conv, depthwise, linear, mean_pool, native_candidates, pool

EXAMPLES = settings(max_examples=500, deadline=None, derandomize=True)


@st.composite
def convolutions(draw) -> Case:
    """Any valid convolution of up to a few million products; half of them shaped for a special kernel."""
    size = st.integers(1, 9)
    special = draw(st.sampled_from(["none", "winograd", "grouped", "large weights", "none"]))
    if special == "grouped":
        depth = draw(st.sampled_from([4, 8, 16, 32]))
        groups = 16 // depth * draw(st.integers(1, 3)) if depth < 16 else draw(st.integers(1, 3))
        c = k = depth * groups
        kernel, stride, padding, dilation = (3, 3), draw(st.sampled_from([1, 2])), (1, 1), (1, 1)
    elif special == "large weights":  # cut across tasks, with a first phase that copies the input
        c, k, groups = draw(st.integers(96, 400)), draw(st.integers(96, 400)), 1
        kernel = draw(st.sampled_from([(1, 1), (3, 3)]))
        stride, padding, dilation = draw(st.integers(1, 2)), (kernel[0] // 2,) * 2, (1, 1)
        size = st.integers(1, 6)
    elif special == "winograd":
        c, k, groups = draw(st.integers(1, 40)), draw(st.integers(1, 70)), 1
        kernel, stride, padding, dilation = (3, 3), 1, (draw(st.integers(0, 2)),) * 2, (1, 1)
    else:
        groups = draw(st.sampled_from([1, 1, 2, 3]))
        c, k = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 24))
        kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    h, w = (max(draw(size), dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1))
    return conv(
        "random",
        draw(st.integers(1, 3)),
        c,
        h,
        w,
        k,
        kernel,
        groups=groups,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        relu=draw(st.booleans()),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def check(case: Case, layout) -> None:
    inputs = case.inputs("integers")
    expected = case.exact(inputs).float()
    ran = 0
    for backend in native_candidates(case.op):
        if case.accepted_by(backend):
            assert_equal(case.run(inputs.to_layout(layout), backend), expected, f"{backend}, {case}")
            ran += 1
    assert ran > 0


@needs_native
@EXAMPLES
@given(convolutions(), st.sampled_from(LAYOUTS))
def test_any_convolution_of_integers_is_exact(case, layout):
    check(case, layout)


@needs_native
@EXAMPLES
@given(
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2),
    st.booleans(),
    st.data(),
    st.sampled_from(LAYOUTS),
)
def test_any_max_pool_is_exact(n, c, r, s, stride, pad, ceil_mode, data, layout):
    pad = (min(pad, r // 2), min(pad, s // 2))
    h, w = (
        data.draw(st.integers(max(1, r - 2 * pad[0]), 12)),
        data.draw(st.integers(max(1, s - 2 * pad[1]), 12)),
    )
    check(pool("random", (n, c, h, w), (r, s), stride=stride, padding=pad, ceil_mode=ceil_mode), layout)


@needs_native
@EXAMPLES
@given(
    st.tuples(*[st.integers(1, 6)] * 2),
    st.tuples(*[st.integers(1, 4)] * 2),
    st.integers(0, 2),
    st.tuples(*[st.booleans()] * 2),
    st.data(),
    st.sampled_from(LAYOUTS),
)
def test_any_avg_pool_is_exact(kernel, stride, pad, modes, data, layout):
    pad = tuple(min(pad, size // 2) for size in kernel)
    h, w = (data.draw(st.integers(max(1, size - 2 * p), 12)) for size, p in zip(kernel, pad))
    x = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40)), h, w)
    options = {"stride": stride, "padding": pad, "ceil_mode": modes[0], "count_include_pad": modes[1]}
    check(mean_pool("random", x, kernel, **options), layout)


@needs_native
@EXAMPLES
@given(
    st.tuples(*[st.integers(1, 5)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.integers(0, 3),
    st.integers(1, 2),
    st.data(),
    st.sampled_from(LAYOUTS),
)
def test_any_depthwise_convolution_is_exact(kernel, stride, padding, dilation, data, layout):
    if data.draw(st.booleans()):
        kernel, stride, padding, dilation = (3, 3), data.draw(st.integers(1, 2)), min(padding, 1), 1
    reach = [max(1, dilation * (size - 1) + 1 - 2 * padding) for size in kernel]
    h, w = (data.draw(st.integers(size, size + 17)) for size in reach)
    sizes = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40)), h, w)
    bias, activation = data.draw(st.booleans()), data.draw(st.sampled_from(["none", "relu", "relu6"]))
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    check(depthwise("random", *sizes, kernel, bias=bias, activation=activation, **options), layout)


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(1, 300), st.integers(1, 90), st.booleans())
def test_any_linear_is_exact(n, c, k, relu):
    check(linear("random", n, c, k, relu=relu), torch.contiguous_format)

"""What ops say about their tasks, on which the barrier-free runner relies.

It starts a step while the last tasks of the previous one still run, as far as the pixels it reads are done. A
range that is too small would be a race that hardly ever shows.
"""

import os
import subprocess

import pytest
from conv_layers import LAYERS
from helpers import isas, needs_native
from kernel_cases import CASES, KINDS, has_parameters, native_candidates, parameters, prepared
from native_programs import build_program

from fast_backbones.kernels import _ext


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_program("task_ranges", tmp_path_factory.mktemp("ranges"))


# Kinds and epilogues that no case of the table reaches.
MORE = [
    "depthwise_conv2d n=2 h=30 w=33 c=70 k=70 groups=70 r=3 s=3 pad_h=1 pad_w=1 activation=2",
    "depthwise_conv2d n=1 h=90 w=61 c=64 k=64 groups=64 r=3 s=3 stride_h=2 stride_w=2 pad_h=1 pad_w=1",
    "depthwise_conv2d n=2 h=40 w=50 c=130 k=130 groups=130 r=5 s=3 stride_h=3 pad_h=2 dilation_w=2",
    "depthwise_conv2d n=1 h=2 w=40 c=40 k=40 groups=40 r=7 s=7 pad_h=9 pad_w=9 pre_activation=1",
    "avg_pool2d n=2 h=50 w=61 c=48 k=48 r=3 s=3 pad_h=1 pad_w=1 activation=2",
    "avg_pool2d n=2 h=60 w=40 c=100 k=100 r=9 s=2 stride_h=4 stride_w=2 pad_h=4 ceil_mode=1",
    "avg_pool2d n=3 h=7 w=8 c=1030 k=1030 r=7 s=8",
    "avg_pool2d n=2 h=61 w=40 c=64 k=64 out_h=7 out_w=50",
    "affine n=3 h=30 w=33 c=70 k=70 activation=1",
    "affine n=5 h=7 w=9 c=600 k=600 gated=1 activation=4",
    "local_response_norm n=2 h=30 w=33 c=70 k=70 size=5",
    "l2_normalize n=2 h=30 w=33 c=70 k=70",
    "layer_norm n=2 h=30 w=33 c=70 k=70",
    "group_norm n=2 h=50 w=33 c=96 k=96 groups=4",
    "group_norm n=3 h=2 w=3 c=7 k=7",
    "channel_shuffle n=2 h=30 w=33 c=70 k=70 groups=2",
    "channel_shuffle n=2 h=30 w=33 c=70 k=70 groups=5",
    "upsample_nearest2d n=2 h=30 w=13 c=70 k=70 out_h=60 out_w=26",
    "upsample_nearest2d n=2 h=30 w=13 c=70 k=70 out_h=70 out_w=5",
    "leaky_relu n=2 h=30 w=33 c=70 k=70",
    "multiply n=2 h=30 w=33 c=70 k=70",
    "squared_distances n=300 c=84 k=10",
    "squared_distances n=3 c=900 k=61",
    "avg_pool2d n=2 h=50 w=60 c=48 k=48 r=3 s=3 stride_h=2 stride_w=2 pad_bottom=1 pad_right=1",
    "max_pool2d n=2 h=90 w=60 c=148 k=148 r=3 s=3 stride_h=2 stride_w=2 pad_h=1 pad_bottom=0 pad_right=1",
    "pad2d n=2 h=40 w=30 c=70 k=70 pad_h=3 pad_w=0 pad_bottom=0 pad_right=2",
    "pad2d n=2 h=2 w=30 c=300 k=300 pad_h=40 pad_bottom=50",
    "winograd_conv2d n=2 h=30 w=21 c=70 k=70 r=3 s=3 pad_h=1 pad_w=1 tile=4 real_points=1",
    "winograd_conv2d n=2 h=6 w=5 c=300 k=136 r=3 s=3 pad_h=1 pad_w=1 tile=4 real_points=1",
    "winograd_conv2d n=2 h=17 w=18 c=70 k=70 r=1 s=7 pad_w=3",
    "winograd_conv2d n=2 h=17 w=18 c=270 k=70 r=7 s=1 pad_h=3",
]
PAIRS = [  # where the processor multiplies bfloat16
    "conv2d n=2 h=30 w=20 c=70 k=70 bf16=1",
    "conv2d n=2 h=14 w=14 c=1100 k=230 stride_h=2 stride_w=2 bf16=1",
    "conv2d n=2 h=30 w=20 c=71 k=70 r=3 s=3 pad_h=1 pad_w=1 bf16=1",
    "conv2d n=2 h=9 w=8 c=350 k=200 r=3 s=3 stride_h=2 pad_h=1 bf16=1",
    "separable_conv2d n=2 h=30 w=20 c=71 k=70 r=3 s=3 pad_h=1 pad_w=1 bf16=1",
    "separable_conv2d n=2 h=7 w=7 c=860 k=360 r=3 s=3 pad_h=1 pad_w=1 bf16=1",
    "linear n=5 c=850 k=1000 bf16=1",
    "grouped_conv2d n=2 h=30 w=20 c=128 k=256 r=3 s=3 pad_h=1 pad_w=1 stride_h=2 stride_w=2 groups=32 bf16=1",
    "winograd_conv2d n=2 h=30 w=21 c=71 k=70 r=3 s=3 pad_h=1 pad_w=1 tile=4 bf16=1",
    "winograd_conv2d n=2 h=6 w=5 c=511 k=136 r=3 s=3 pad_h=1 pad_w=1 tile=2 bf16=1",
    "winograd_conv2d n=2 h=17 w=18 c=71 k=70 r=7 s=1 pad_h=3 bf16=1",
]


def line(kind: str, params: dict) -> str:
    return " ".join([kind, *(f"{name}={value}" for name, value in params.items())])


REALS = ("alpha", "beta", "offset", "eps")  # the program sets them itself


def lines():
    yield from MORE
    yield from (line(one.kind, one.params(one.x[0])) for one in LAYERS if not one.option("nchw_in"))
    for case in CASES:
        if case.x[0] == 0 or not has_parameters(case):
            continue
        params = parameters(case, prepared(case))
        for backend in native_candidates(case.op):
            kind = KINDS.get(backend, case.op)
            if not _ext.native().refusal(kind, params):
                yield line(kind, {name: value for name, value in params.items() if name not in REALS})


@needs_native
@pytest.mark.parametrize("isa", isas())
def test_tasks_read_and_write_what_they_say(program, isa):
    pairs = PAIRS if isa == "avx512" and _ext.native().has_bf16() else []
    text = "\n".join(sorted({*lines(), *pairs}))
    env = {**os.environ, "FB_MAX_ISA": isa}
    done = subprocess.run([program], input=text + "\n", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

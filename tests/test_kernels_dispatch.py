"""The choice of an implementation: it can be asked, pinned, and is never silent."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bit_equal, backends, needs_native, reals, run_python
from helpers import one_thread as one_thread
from kernel_cases import CASES, KINDS, OPS, parameters, prepared

from fast_backbones import kernels
from fast_backbones.kernels import _dispatch, _ext

X = reals((2, 32, 9, 9), 1)
W = reals((32, 32, 3, 3), 2)


@needs_native
def test_explain_lists_every_candidate_with_its_reason():
    explanation = kernels.explain("conv2d", X, W, padding=1)
    assert explanation.chosen == "winograd"
    names = ["grouped", "winograd", "direct", "triton", "library", "reference"]
    assert [c.name for c in explanation.candidates] == names
    text = str(explanation)
    assert "winograd (native)" in text and "runs" in text
    assert kernels.explain(kernels.conv2d, X, W, stride=2).chosen == "direct"
    assert "stride 2x2: winograd handles 1" in str(kernels.explain("conv2d", X, W, stride=2))
    assert "needs" not in text
    small = kernels.explain("conv2d", X[:, :8], W[:8, :8])
    assert small.chosen == "direct" and "winograd pays from 16 on" in str(small)
    assert kernels.explain("conv2d", X[:, :8], W[:8, :8], backend="winograd").chosen == "winograd"
    assert kernels.explain("conv2d", X.double(), W.double()).chosen == "reference"
    assert kernels.explain("conv2d", X.double(), W.double(), backend="native").chosen is None
    with pytest.raises(
        ValueError, match="op is 'conv3d', expected one of avg_pool2d, batch_norm, batch_norm_conv2d, conv2d"
    ):
        kernels.explain("conv3d", X)


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_explain_and_run_agree(op):
    """The automatic result has the bits of the candidate that explain names."""
    for case in (c for c in CASES if c.op == op):
        inputs = case.inputs("reals")
        chosen = kernels.explain(op, *inputs.args, **inputs.kwargs).chosen
        assert_bit_equal(case.run(inputs), case.run(inputs, chosen), case.why)


@needs_native
def test_python_refusals_agree_with_the_compiled_library():
    """A shape that Python lets through is one that the kernels accept, and the other way round."""
    compared = 0
    for case in (c for c in CASES if c.weight is not None and len(c.x) == 4):
        inputs = case.inputs()
        params = parameters(case, prepared(case))
        for verdict in kernels.explain(case.op, *inputs.args, **inputs.kwargs).candidates:
            if verdict.name in KINDS:
                refusal = _ext.native().refusal(KINDS[verdict.name], params)
                agree = bool(refusal) == (verdict.refusal is not None)
                assert agree, f"{case.id}, {verdict}: the library says {refusal!r}"
                compared += 1
    assert compared > 120


def test_backend_nests_and_is_put_back():
    assert kernels.current_backend() == "auto"
    with kernels.backend("reference"):
        assert kernels.current_backend() == "reference"
        assert_bit_equal(kernels.conv2d(X, W), F.conv2d(X, W), "reference")
        with kernels.backend("auto"):
            assert kernels.current_backend() == "auto"
        with pytest.raises(KeyError), kernels.backend("native"):
            raise KeyError
        assert kernels.current_backend() == "reference"
    assert kernels.current_backend() == "auto"
    with pytest.raises(ValueError, match="backend is 'fastest'"):
        kernels.backend("fastest")


def test_backend_belongs_to_its_thread():
    seen = []
    with kernels.backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(kernels.current_backend()))
        worker.start()
        worker.join()
        assert kernels.current_backend() == "reference"
    assert seen == ["auto"]


def test_overlapping_choices_of_two_threads_leave_nothing_behind():
    """Entered A, B; left A, B: compiled code, which sees the latest choice of any thread, then sees none."""
    entered, leave = threading.Event(), threading.Event()

    def work():
        with kernels.backend("native"):
            entered.set()
            leave.wait()

    worker = threading.Thread(target=work)
    with kernels.backend("reference"):
        worker.start()
        entered.wait()
    assert _dispatch._chosen_for_tracing == "native"
    leave.set()
    worker.join()
    assert _dispatch._chosen_for_tracing is None


@needs_native
@pytest.mark.parametrize("backend", backends("conv2d"))
def test_asking_by_name_raises_the_refusal(backend):
    with pytest.raises(
        RuntimeError, match=f"backend '{backend}' was asked for by name and refuses; {backend}: "
    ):
        kernels.conv2d(X.double(), W.double(), backend=backend)
    with kernels.backend("native"), pytest.raises(RuntimeError, match=r"winograd: .* direct: torch\.float64"):
        kernels.conv2d(X.double(), W.double())
    with kernels.backend("native"):
        assert kernels.conv2d(X.double(), W.double(), backend="reference").dtype == torch.float64


def test_a_kernel_that_fails_is_shown_not_replaced():
    def explode(*_):
        raise ArithmeticError("broken kernel")

    broken = _dispatch.Candidate("broken", "native", lambda *_: None, explode)
    op = _dispatch.Op("demo", lambda *args: args, (broken, _dispatch.reference(lambda x: x)))
    with pytest.raises(ArithmeticError, match="broken kernel"):
        _dispatch.run(op, (X,))
    assert _dispatch.run(op, (X,), "reference") is X


def test_registration_is_checked():
    with pytest.raises(ValueError, match="registered twice"):
        _dispatch.register("conv2d", lambda *args: args, _dispatch.reference(torch.relu))
    with pytest.raises(ValueError, match="last candidate must be the reference"):
        _dispatch.register("demo", lambda *args: args, _dispatch.Candidate("fast", "native", print, print))
    assert "demo" not in kernels.ops()


SCRIPT = """
import torch, warnings
from fast_backbones import kernels
x, w = torch.randn(1, 16, 5, 5), torch.randn(16, 16, 3, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        kernels.conv2d(x, w)
        kernels.conv2d(x, w)
        print(kernels.explain("conv2d", x, w).chosen)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
print(len([w for w in caught if "fast_backbones" in str(w.message)]), "warnings")
"""


@pytest.mark.parametrize(
    "value, expected",
    [
        ("reference", "reference"),
        pytest.param("native", "winograd", marks=needs_native),
        ("fast", "ValueError FB_BACKEND is"),
    ],
)
def test_environment_pins_the_process(value, expected):
    assert expected in run_python("-c", SCRIPT, FB_BACKEND=value).stdout


def test_without_the_library_everything_runs_through_pytorch():
    done = run_python("-c", SCRIPT, FB_NATIVE="0", FB_REQUIRE_NATIVE="0")
    assert done.stdout.split() == ["reference", "0", "warnings"]
    pinned = run_python("-c", SCRIPT, FB_NATIVE="0", FB_REQUIRE_NATIVE="0", FB_BACKEND="native")
    assert "RuntimeError" in pinned.stdout and "the compiled library is absent; switched off" in pinned.stdout

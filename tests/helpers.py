"""Parity helpers that every op and every model reuses.

exact data      integers(), assert_equal            arithmetic without rounding: one wrong index cannot hide
real data       assert_as_accurate                  at most twice PyTorch's own error, against float64
reproducible    assert_bit_equal, threads()         the same bits whatever the threads, the batch, the vectors
poison          poisoned()                          fresh memory holds NaN, so unwritten outputs cannot pass
processes       run_python                          another FB_MAX_ISA, a fork, a setting read once per
process candidates      backends(op), needs_native          what to parametrise over
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fast_backbones.bench import parity
from fast_backbones.bench.parity import errors  # noqa: F401 for tests
from torch import Tensor

from fast_backbones import kernels
from fast_backbones.kernels import _ext

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = (torch.contiguous_format, torch.channels_last)

needs_native = pytest.mark.skipif(_ext.why_not() is not None, reason=f"no compiled library: {_ext.why_not()}")


def layout_name(layout: torch.memory_format) -> str:
    return "nhwc" if layout == torch.channels_last else "nchw"


# ---- data ----


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(shape, seed: int, *, limit: int = 4, multiple: int = 1, dtype=torch.float32) -> Tensor:
    """Whole numbers from -limit to limit, times `multiple`.

    With |x| <= 4 and |w| <= 8 a sum of 2^18 products still fits 24 bits. F(2x2, 3x3) stays exact when its
    filters are multiples of 4, because G w G^T divides by 4; the sums inside it then fit for up to 512
    channels. F(4x4, 3x3) and F(2x2, 5x5) divide by 16: multiples of 4 leave quarters, which cost two of the
    24 bits.
    """
    values = torch.randint(-limit, limit + 1, tuple(shape), generator=generator(seed))
    return (values * multiple).to(dtype)


def reals(shape, seed: int, *, positive: bool = False, dtype=torch.float32) -> Tensor:
    """Normal values, or all-positive ones: there nothing cancels and the order of summation shows most."""
    if positive:
        return torch.rand(tuple(shape), generator=generator(seed), dtype=dtype) + 0.1
    return torch.randn(tuple(shape), generator=generator(seed), dtype=dtype)


# ---- comparisons ----


def assert_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """`parity.equal`."""
    said = parity.equal(actual, expected)
    assert not said, f"{what}: {said}"


def assert_bit_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """`parity.bit_equal`."""
    said = parity.bit_equal(actual, expected)
    assert not said, f"{what}: {said}"


def assert_as_accurate(fast: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """The 2x rule, `parity.within_twice`."""
    said = parity.within_twice(fast, plain, exact)
    assert not said, f"{what}: {said}"


# ---- circumstances ----


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    """For modules that import it (`one_thread as one_thread`): every test starts with one thread.

    Small tensors gain nothing from two, and on a busy machine each parallel region waits for a core.
    """
    with threads(1):
        yield


@contextlib.contextmanager
def deterministic():
    """As users ask for it; what PyTorch has no such algorithm for is computed all the same."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def poisoned():
    """Fresh tensors hold NaN: outputs, packed weights, converted copies. Scratch memory: FB_POISON=1."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run_python(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Another interpreter on the same package; its output is shown when it fails."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (
        f"{arguments[:2]} {environment}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done


def isas() -> list[str]:
    """Instruction sets that this build has and this machine runs, worst first."""
    module = _ext.native()
    if module is None:
        return []
    order = ["portable", "avx2", "avx512"]
    best = order.index(module.isa()) if module.isa() in order else 0
    return [name for name in order[: best + 1] if name in module.compiled_isas()]


def results_of_isas(
    script: str, folder: Path, rtol: float, atol: float, equal_nan: bool = False
) -> dict[str, Tensor]:
    """What a test file, run as a program, writes into the file it is given: AVX2 and AVX-512 have the same
    bits, the portable kernels, which round products on their own, values within the tolerances.

    Returns the portable results.
    """
    found = {}
    for isa in isas():
        path = folder / f"{isa}.pt"
        run_python(script, str(path), FB_MAX_ISA=isa)
        found[isa] = torch.load(path)
    for name, value in found["portable"].items():
        if "avx2" in found:
            close = {"rtol": rtol, "atol": atol, "equal_nan": equal_nan, "msg": name}
            torch.testing.assert_close(value, found["avx2"][name], **close)
        if "avx512" in found:
            assert_bit_equal(found["avx512"][name], found["avx2"][name], name)
    return found["portable"]


# ---- candidates ----


def backends(op: str) -> list:
    """The native candidates of an op as pytest parameters; skipped with the reason without the library."""
    native = [c.name for c in kernels.ops()[op].candidates if c.family == "native"]
    return [pytest.param(name, marks=needs_native) for name in native]


def public(op: str):
    """The public function of an op."""
    return getattr(kernels, op)


def reference(op: str):
    """The formula of an op in plain PyTorch."""
    return getattr(kernels, f"{op}_ref")


def refusal(op: str, backend: str, *args, **kwargs) -> str | None:
    """What a candidate says about a call; None when it accepts."""
    verdicts = kernels.explain(op, *args, **kwargs).candidates
    return next(verdict.refusal for verdict in verdicts if verdict.name == backend)

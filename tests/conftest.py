"""What every test shares: the header that says which build is under test, fixed threads, a fixed seed."""

import ctypes
import gc
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton_device as triton_device  # before anything imports Triton

import fast_backbones as fb

THREADS = 2
GLIBC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
RESIDENT = 1 << 30  # bytes that no test need give back

_kept = RESIDENT


def pytest_report_header(config):
    info = fb.build_info()
    native = (
        f"{info['isa']} of {', '.join(info['isas'])}; {info['compiler']}"
        if info["native"]
        else info["reason"]
    )
    cuda = f"built, {info['nvcc']}" if info["cuda"] else info["cuda_reason"]
    return [
        f"fast_backbones {info['version']}, torch {info['torch']}, {info['platform']}, {THREADS} threads",
        f"native: {native}",
        f"cuda: {cuda}",
    ]


def pytest_collection_finish():
    """What is imported by now stays: collections need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter):
    """What tests say they covered: kernels, configs, targets."""
    found = [pair for report in terminalreporter.getreports("passed") for pair in report.user_properties]
    for _, words in (pair for pair in found if pair[0] == "covered"):
        terminalreporter.write_line(words)
    layers = Counter(kernel for name, kernel in found if name == "interpreted")
    if layers:
        each = ", ".join(f"{kernel} {count}" for kernel, count in sorted(layers.items()))
        terminalreporter.write_line(f"{layers.total()} layers to the bit in Triton's interpreter: {each}")


@pytest.fixture(autouse=True)
def memory_given_back():
    """What tests have freed goes back to the system: glibc keeps it in pieces, gigabytes of them. Collecting
    takes a second by then, so only when half a gigabyte has come since the last time."""
    global _kept
    yield
    if GLIBC_TRIM is not None and resident_bytes() > _kept + (1 << 29):
        gc.collect()
        GLIBC_TRIM(0)
        _kept = max(RESIDENT, resident_bytes())


def resident_bytes():
    """Of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


@pytest.fixture(autouse=True)
def fixed_start():
    """Same seed and number of threads at the start of each test; the latter is put back after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    """What the engine's tests run, unless they make a model of their own."""
    from engine_nets import Tiny

    return Tiny().eval()


@pytest.fixture
def x():
    """An image for it."""
    return torch.randn(2, 3, 9, 7)

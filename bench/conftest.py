"""Options and parametrisation of the kernel microbenchmarks: pytest bench [--full] [--batch N] [--threads N].

A benchmark module names its OP and takes `layer` and `candidate`; the layers come from shapes/*.txt, and the
candidates of one layer run one after the other, so that neighbours in the table are neighbours in time.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("fast_backbones benchmarks")
    group.addoption(
        "--full", action="store_true", help="all layers of all networks instead of a handful per op"
    )
    group.addoption("--batch", type=int, default=1, help="images (default 1)")
    group.addoption("--threads", type=int, default=None, help="torch threads (default: the CPUs, at most 2)")


def pytest_generate_tests(metafunc):
    op = getattr(metafunc.module, "OP", None)
    if op is None or "candidate" not in metafunc.fixturenames:
        return
    from .layers import candidates
    from .shapes import shapes

    batch = metafunc.config.getoption("--batch")
    layers = shapes(op, full=metafunc.config.getoption("--full"))
    pairs = [(layer, name) for layer in layers for name in candidates(layer, batch)]
    metafunc.parametrize("layer, candidate", pairs, ids=[f"{layer}-{name}" for layer, name in pairs])


@pytest.fixture
def batch(request) -> int:
    return request.config.getoption("--batch")


@pytest.fixture(autouse=True)
def threads(request):
    """The thread count that was asked for, and torch's own again afterwards."""
    import torch

    from .machine import cpu_count

    before = torch.get_num_threads()
    wanted = request.config.getoption("--threads")
    torch.set_num_threads(wanted if wanted is not None else min(2, cpu_count()))
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Say where the numbers come from, without the host's name."""
    from .machine import cpu_count, describe

    wanted = config.getoption("--threads")
    output_json["machine"] = describe(wanted if wanted is not None else min(2, cpu_count()))
    output_json["machine_info"].pop("node", None)

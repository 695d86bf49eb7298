"""Memory of large results: used again, given back, safe in any thread and after a fork."""

import gc
import os
import threading

import pytest
import torch
from helpers import needs_native, run_python

from fast_backbones import kernels
from fast_backbones.kernels import memory

pytestmark = needs_native
MAP = (2, 64, 56, 56)  # 1.6 MB


def made() -> torch.Tensor:
    return kernels.batch_norm(torch.randn(MAP).to(memory_format=torch.channels_last))


def test_a_dropped_map_serves_the_next_one():
    gc.collect()
    first = made()
    address, held = first.data_ptr(), memory.usage().held
    assert memory.usage().live >= first.nbytes
    del first
    for _ in range(5):
        assert made().data_ptr() == address
    assert memory.usage().held == held


def test_neighbours_join():
    gc.collect()
    maps = [made() for _ in range(4)]
    lowest, held = min(t.data_ptr() for t in maps), memory.usage().held
    del maps
    large = kernels.batch_norm(torch.randn(8, *MAP[1:]).to(memory_format=torch.channels_last))
    assert large.data_ptr() <= lowest and memory.usage().held == held


def test_views_and_storages_keep_a_map():
    a = made()
    expected, view, storage = a.clone(), a[:1, 3:5], a.untyped_storage()
    del a
    others = [made() for _ in range(3)]
    assert torch.equal(view, expected[:1, 3:5]) and storage.nbytes() == expected.nbytes
    del others


def test_maps_are_ordinary_tensors(tmp_path):
    a = made()
    expected = a.clone()
    assert a.is_contiguous(memory_format=torch.channels_last) and a.data_ptr() % 64 == 0
    torch.save(a, tmp_path / "map.pt")
    assert torch.equal(torch.load(tmp_path / "map.pt"), expected)
    assert a.numpy().base is not None
    array = a.numpy()
    del a
    made()
    assert (array == expected.numpy()).all()
    b = made()
    b.share_memory_()
    assert b.is_shared()
    b.set_(torch.zeros(3))
    assert b.shape == (3,)


def test_release_gives_pages_back():
    gc.collect()
    big = kernels.batch_norm(torch.randn(16, 64, 112, 112).to(memory_format=torch.channels_last))
    size = big.nbytes
    del big
    before = resident()
    assert memory.release() >= size
    assert before - resident() >= 0.8 * size
    assert made().isfinite().all()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_many_threads_take_and_give():
    errors = []

    def work(seed):
        x = torch.full((1, 32, 48, 48), float(seed), requires_grad=False)
        for _ in range(100):
            y = kernels.max_pool2d(x, 1)
            if not (y == seed).all():
                errors.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_parent_and_child_go_on(tmp_path):
    script = tmp_path / "forks.py"
    script.write_text(
        """
        import os, threading, torch
        from fast_backbones import kernels
        x = torch.randn(2, 64, 56, 56)
        kept = kernels.batch_norm(x)
        expected = kept.clone()
        stop = threading.Event()
        def churn():
            while not stop.is_set():
                kernels.max_pool2d(x, 2)
        worker = threading.Thread(target=churn)
        worker.start()
        for _ in range(10):
            child = os.fork()
            if child == 0:
                again = kernels.batch_norm(x).numpy()
                good = (kept.numpy() == expected.numpy()).all() and (again == expected.numpy()).all()
                os._exit(0 if good else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        worker.join()
        print("good", torch.equal(kept, expected))
        """.replace("\n        ", "\n")
    )
    assert "good True" in run_python(str(script)).stdout

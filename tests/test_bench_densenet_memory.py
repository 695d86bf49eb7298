"""bench.densenet_memory: recomputation saves memory and changes no gradient."""

import pytest
from fast_backbones.bench import densenet_memory


@pytest.mark.slow
def test_recomputation_needs_less_than_two_thirds(capsys):
    assert densenet_memory.main(["densenet121", "--batch", "4", "--size", "96", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "same gradients to the bit" in printed
    share = int(printed.split("needs ")[1].split("%")[0])
    assert 20 < share < 67


def test_different_gradients_are_an_error(monkeypatch):
    digests = iter("ab")
    monkeypatch.setattr(densenet_memory, "run_child", lambda *_, **__: {"digest": next(digests)})
    with pytest.raises(RuntimeError, match="gradients of the two modes of densenet121 differ"):
        densenet_memory.measure_both("densenet121", 1, 64, 1)

"""A call like the last one goes from its conditions to its result in one native step.

Around the kernels of a small network Python costs more than they do: rules, key, guard, result and arena, a
few microseconds each. csrc/python/shortcut.h asks the same questions again, expects the answers that the last
call got, and runs the plan. Where anything differs it returns None and the call goes the long way.
"""

from __future__ import annotations

from functools import partial
from types import MethodType

import torch
from torch import Tensor

from .guard import optimizer_steps
from .rules import INPUT_ATTRIBUTES, INPUT_METHODS, SURROUNDINGS
from .run_cpu import Runner

LIKE_ANOTHER = 1 << 14  # numbers: no more memory than this is kept for a few tenths of a microsecond


class Shortcut:
    """For calls like plain(x), whose plan `runner` has just run.

    Holds what the native object looks at, and the packed weights that the plan points to. It must not hold
    the model, whose __dict__ holds this, nor the runner.
    """

    def __init__(self, runner: Runner, plain: MethodType, x: Tensor, precision: str) -> None:
        _, shape, stride = runner.fresh[0]
        self.weights = runner.weights
        self.seen = (
            [(ask, answer) for ask, answer, _ in SURROUNDINGS]
            + [
                (torch.is_grad_enabled, False),  # with gradients on, every parameter has to be asked
                (torch.get_float32_matmul_precision, precision),
            ],
            [(attribute, attribute.__get__(x)) for attribute in INPUT_ATTRIBUTES],
            [(method, method(x)) for method in INPUT_METHODS],
            Tensor,
            plain.__func__,
            runner.guard.structure,
            runner.guard.weights,
            optimizer_steps,
            runner.guard,
            runner.whole,
            partial(runner.arenas.take, runner.plan.arena_bytes, runner.native),
            runner.arenas.give,
            maker(shape, stride),
            Tensor.data_ptr,
        )
        self.call = runner.native.Shortcut(*self.seen)


def maker(shape: torch.Size, stride: tuple[int, ...]) -> partial[Tensor]:
    """What makes a float32 tensor: one like another, which is the quickest, where that is small."""
    make = partial(torch.empty_strided, shape, stride, dtype=torch.float32, device="cpu")
    if shape.numel() <= LIKE_ANOTHER:
        with torch.inference_mode(False):
            other = make()
        if torch.empty_like(other).stride() == stride:
            return partial(torch.empty_like, other)
    return make


def make_shortcut(runner: Runner, plain: MethodType, x: Tensor, precision: str) -> Shortcut | None:
    """None where a call does more than run one native plan into a fresh tensor."""
    if runner.whole is None or runner.direct is None:
        return None
    return Shortcut(runner, plain, x, precision)

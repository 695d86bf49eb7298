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

_data_ptr = Tensor.data_ptr
LIKE_ANOTHER = 1 << 14  # numbers: no more memory than this is kept for a few tenths of a microsecond


class Shortcut:
    """For calls like plain(x), whose plan `runner` has just run.

    Holds what the native object looks at, and the packed weights that the plan points to. It must not hold
    the model, whose __dict__ holds this, nor the runner.
    """

    def __init__(self, runner: Runner, plain: MethodType, x: Tensor, precision: str) -> None:
        _, shape, stride = runner.fresh[0]
        self.surroundings = [(ask, answer) for ask, answer, _ in SURROUNDINGS] + [
            (torch.is_grad_enabled, False),  # with gradients on, every parameter has to be asked
            (torch.get_float32_matmul_precision, precision),
        ]
        self.attributes = [(attribute, attribute.__get__(x)) for attribute in INPUT_ATTRIBUTES]
        self.methods = [(method, method(x)) for method in INPUT_METHODS]
        guard = runner.guard
        self.guard, self.function = guard, plain.__func__
        self.plan, self.weights = runner.parts[0][1], runner.weights
        self.take = partial(runner.arenas.take, runner.plan.arena_bytes, runner.native)
        self.give = runner.arenas.give
        self.make = maker(shape, stride)
        self.call = runner.native.Shortcut(
            self.surroundings,
            self.attributes,
            self.methods,
            Tensor,
            self.function,
            guard.structure,
            guard.weights,
            optimizer_steps,
            guard,
            self.plan,
            self.take,
            self.give,
            self.make,
            _data_ptr,
        )


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
    alone = len(runner.parts) == 1 and runner.parts[0][0].native
    if not alone or runner.direct is None or x.dtype is not torch.float32:
        return None
    return Shortcut(runner, plain, x, precision)

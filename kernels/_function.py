"""The base of this library's autograd functions."""

import inspect
from typing import Any

import torch


class Function(torch.autograd.Function):
    """A torch.autograd.Function whose forward is inspected once. PyTorch reads its signature at every call,
    from the code object (60 us), unless it finds one that lies ready (20 us)."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forward = cls.__dict__.get("forward")
        if isinstance(forward, staticmethod):
            forward.__func__.__signature__ = inspect.signature(forward.__func__)  # type: ignore[attr-defined]

"""Feature maps that backward computes again instead of keeping.

A convolution keeps its input for the gradient of its weight. Where that input is act(batch norm of x), and
batch norm keeps x for its own gradient, the convolution keeps x, too, and the few numbers of each channel:
one map for two ops instead of two. Backward normalises once more, a pass over x; the result has the bits of
the forward pass. Second derivatives go from the convolution to x past y itself: the derivative of a gradient
with respect to y is not seen.

    note(y, source)        batch norm tells where y comes from
    is_known(y)            whether something else will be kept in the place of y
    forget(y)              from now on y itself is kept
    hand_on(y, alias)      the same of an alias of y that another node of the graph returns
    keep(y)                what an op saves in the place of y: the source's tensors, or y itself
    restore(kept, how)     y again, from those
    before(kept, how)      x and the numbers that make y of it
    affine(x, ...)         the same for y = act(x * scale + shift), which was never a tensor
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as is_compiling

from . import _gpu_batch_norm, _gpu_training
from ._activation import activated

_ATTRIBUTE = "_fb_source"


class How(NamedTuple):
    """y = act((x - mean) * scale + bias), scale = weight / sqrt(var + eps); frozen: mean, var were given.
    by: whose kernels made y, and make it again."""

    eps: float
    activation: str
    frozen: bool
    by: str = "native"


class Source(NamedTuple):
    """Where a map comes from. `versions`: of these and of the map itself, when it was made."""

    tensors: tuple[Tensor | None, ...]  # x, weight, bias, mean, var, scale, a copy of bias
    how: How
    versions: tuple[int, ...]
    made_by: Any  # the node of the graph

    def __reduce__(self) -> Any:
        """Copies and pickles of a map have no source; torch.load(weights_only=True) takes an empty dict."""
        return OrderedDict, ()


def _source_of(y: Tensor) -> Source | None:
    """What `note` has said of y, whatever happened since."""
    return None if is_compiling() else getattr(y, _ATTRIBUTE, None) or None


def forget(y: Tensor) -> None:
    """y is somebody else's from now on: what is kept of it is y, and it does not hold its source."""
    y.__dict__.pop(_ATTRIBUTE, None)


def _versions(tensors: tuple[Tensor | None, ...], y: Tensor) -> tuple[int, ...]:
    return *(t._version for t in tensors if t is not None), y._version


def note(y: Tensor, tensors: tuple[Tensor | None, ...], how: How) -> None:
    """Say that y is the batch norm of tensors[0]; y holds them from now on, as its graph does anyway."""
    x, _, bias = tensors[:3]
    if (
        is_compiling()
        or type(y) is not Tensor
        or type(x) is not Tensor
        or y.is_inference()
        or x.is_inference()
    ):
        return
    # A copy: an optimizer may step between forward and backward, and scale is of before that.
    tensors = (*tensors, None if bias is None else bias.detach().clone())
    setattr(y, _ATTRIBUTE, Source(tensors, how, _versions(tensors, y), y.grad_fn))


def is_known(y: Tensor) -> bool:
    """Whether `keep` gives the tensors of a source."""
    return keep(y)[1] is not None


def hand_on(y: Tensor, alias: Tensor) -> None:
    """Say of an alias what is known of y."""
    source = _source_of(y)
    if source is not None and alias is not y and source.made_by is y.grad_fn:
        setattr(alias, _ATTRIBUTE, source._replace(made_by=alias.grad_fn))


def keep(y: Tensor) -> tuple[tuple[Tensor | None, ...], How | None]:
    """Tensors to save instead of y, and what to hand to `restore` with them.

    y itself and None, where y is not known to be a batch norm, where anything was changed since, and where
    somebody looks at y in backward.
    """
    source = _source_of(y)
    if source is None or source.versions != _versions(source.tensors, y) or source.made_by is not y.grad_fn:
        return (y,), None
    if y.retains_grad or y._backward_hooks:
        return (y,), None
    return source.tensors, source.how


def affine(x: Tensor, scale: Tensor, shift: Tensor, activation: str) -> tuple[tuple[Tensor | None, ...], How]:
    """What `before` and `restore` take, without a way to derivatives, for y = act(x * scale + shift)."""
    return (x, None, None, None, None, scale, shift), How(0.0, activation, True)


def before(kept: tuple[Tensor | None, ...], how: How | None) -> tuple[Tensor, tuple[Any, ...]]:
    """What y is made of, for kernels that compute it as they read: x and mean, scale, bias, activation; mean
    is None in x * scale + bias."""
    if how is None:
        return kept[0], (None, None, None, "none")
    x, _, _, mean, _, scale, bias = kept
    bias = torch.zeros_like(scale) if bias is None else bias
    return x, (mean, scale, bias, how.activation)


def restore(kept: tuple[Tensor | None, ...], how: How | None) -> Tensor:
    """y from what `keep` gave. With grad mode on it is connected to the graph of the tensors."""
    if how is None:
        assert kept[0] is not None
        return kept[0]
    x, weight, bias, mean, var, scale, copied_bias = kept
    if torch.is_grad_enabled():
        moments = (mean, var) if how.frozen else (None, None)
        y = F.batch_norm(x, *moments, weight, bias, not how.frozen, 0.0, how.eps)
        return activated(y, how.activation)
    if how.by == _gpu_training.FAMILY:
        return _gpu_batch_norm.again(x, mean, scale, copied_bias, how.activation)
    mean = torch.zeros_like(scale) if mean is None else mean
    return torch.ops.fast_backbones.batch_norm_again(x, mean, scale, copied_bias, how.activation)

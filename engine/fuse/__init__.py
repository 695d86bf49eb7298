"""Rewrites of the graph, each exact in real arithmetic; `fuse` applies them in this order.

    rewrite               what it finds                              what it makes of it
    --------------------  -----------------------------------------  ------------------------------------
    drop_identity         dropout, clone, padding by nothing         nothing
    drop_permutes         permute, layer_norm, linear, permute back  layer_norm and 1x1 convolution of the map
    find_shuffles         view, transpose, view of channels          shuffle
    split_attention       softmax over two stacked maps, mul, sum    their sum, each with a gate
    convolve_channels     conv1d over the channels of a pooled map   1xS convolution of the same bytes
    find_response_norms   square, pad, avg_pool3d, pow, divide       local_response_norm
    map_input_channels    slices of the image, scaled, concatenated  affine with numbers per channel
    fold_padding          padding, convolutions or pools             the same with more padding
    flatten_into_linear   flatten of a map, linear                   linear, its columns in memory order
    fuse_tail             global average pool, flatten               pool that writes [N, C]
    fuse_epilogues        X, then norm / gate / sum / activation     X with an epilogue
    squeeze_before_conv   mean(W h) beside W h, 1x1                  W mean(h), known before W h
    fuse_epilogues        what this has left with one reader         1x1 with gate, sum, activation
    fuse_prologues        norm, activation, convolutions             convolutions that do it as they load
    make_separable        depthwise, 1x1                             separable_conv2d
    pool_after_conv       average pool of stride 1, 1x1              1x1 to fewer channels, pool + bias
    merge_siblings        1x1 convolutions of one input              one convolution and its slices
    show_slices           slices, split, chunk                       nothing: views of the map's bytes
    write_into_slices     cat                                        nothing: producers write their slice

A rewrite happens only if nobody else reads what disappears, and only if the library has a kernel of the same
kind for the new node: what is not there yet costs a pass over memory, not a convolution. Where it does not
happen, `graph.miss` keeps the sentence for explain().

    identity.py   pixels.py   parts.py   patterns.py   shape.py   epilogue.py   prologue.py   squeeze.py
    separable.py   pool.py   siblings.py   concat.py   trial.py (the question to the library)
"""

from __future__ import annotations

from collections.abc import Callable

from ..candidates import Refusal
from ..graph import Graph
from .concat import show_slices, write_into_slices
from .epilogue import fuse_epilogues
from .identity import drop_identity
from .parts import convolve_channels, find_shuffles, split_attention
from .patterns import find_response_norms, map_input_channels
from .pixels import drop_permutes
from .pool import pool_after_conv
from .prologue import fuse_prologues
from .separable import make_separable
from .shape import flatten_into_linear, fold_padding, fuse_tail
from .siblings import merge_siblings
from .squeeze import squeeze_before_conv
from .trial import Kernels

Rewrite = Callable[[Graph, Kernels], int]

REWRITES: tuple[Rewrite, ...] = (
    drop_identity, drop_permutes, find_shuffles, split_attention, convolve_channels, find_response_norms,
    map_input_channels, fold_padding, flatten_into_linear, fuse_tail, fuse_epilogues, squeeze_before_conv,
    fuse_epilogues, fuse_prologues, make_separable, pool_after_conv, merge_siblings, show_slices,
    write_into_slices,
)  # fmt: skip


def fuse(graph: Graph, refusal: Refusal) -> dict[str, int]:
    """Apply every rewrite; returns how often each one fitted.

    refusal: asks the library for a kernel, see candidates.py.
    """
    graph.drop_unused()
    kernels = Kernels(refusal)
    counts: dict[str, int] = {}
    for rewrite in REWRITES:
        counts[rewrite.__name__] = counts.get(rewrite.__name__, 0) + rewrite(graph, kernels)
    return counts

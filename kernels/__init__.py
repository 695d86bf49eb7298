"""Fused operations on tensors, one file per op: formula, reference, candidates, public function.

Every op runs in training and in inference, under autograd, autocast, torch.compile, torch.export and
torch.func, for every dtype and device PyTorch has: what the compiled kernels refuse runs through the formula
in plain PyTorch. `explain` says who runs and why, `backend` pins it.

    y = kernels.conv2d(x, weight, bias, padding=1, residual=shortcut, activation="relu")
    print(kernels.explain("conv2d", x, weight, bias, padding=1))
    with kernels.backend("reference"): ...
"""

from . import memory
from ._dispatch import backend, current_backend, explain, ops
from ._ext import build_info
from .avg_pool2d import avg_pool2d, avg_pool2d_ref
from .batch_norm import batch_norm, batch_norm_ref
from .batch_norm_conv2d import batch_norm_conv2d, batch_norm_conv2d_ref
from .conv2d import conv2d, conv2d_ref
from .depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_ref
from .global_avg_pool import global_avg_pool, global_avg_pool_ref
from .grouped_conv2d import grouped_conv2d, grouped_conv2d_ref
from .l2_normalize import l2_normalize, l2_normalize_ref
from .linear import linear, linear_ref
from .local_response_norm import local_response_norm, local_response_norm_ref
from .max_pool2d import max_pool2d, max_pool2d_ref
from .pointwise_conv2d import pointwise_conv2d, pointwise_conv2d_ref
from .separable_conv2d import separable_conv2d, separable_conv2d_ref
from .softmax_cross_entropy import softmax_cross_entropy, softmax_cross_entropy_ref
from .squared_distances import squared_distances, squared_distances_ref
from .squeeze_excite import squeeze_excite, squeeze_excite_ref
from .stem_conv2d import stem_conv2d, stem_conv2d_ref

__all__ = [
    "conv2d",
    "grouped_conv2d",
    "pointwise_conv2d",
    "stem_conv2d",
    "separable_conv2d",
    "depthwise_conv2d",
    "max_pool2d",
    "avg_pool2d",
    "global_avg_pool",
    "linear",
    "local_response_norm",
    "l2_normalize",
    "squared_distances",
    "squeeze_excite",
    "batch_norm",
    "batch_norm_conv2d",
    "softmax_cross_entropy",
    "conv2d_ref",
    "grouped_conv2d_ref",
    "pointwise_conv2d_ref",
    "stem_conv2d_ref",
    "separable_conv2d_ref",
    "depthwise_conv2d_ref",
    "max_pool2d_ref",
    "avg_pool2d_ref",
    "global_avg_pool_ref",
    "linear_ref",
    "local_response_norm_ref",
    "l2_normalize_ref",
    "squared_distances_ref",
    "squeeze_excite_ref",
    "batch_norm_ref",
    "batch_norm_conv2d_ref",
    "softmax_cross_entropy_ref",
    "backend",
    "build_info",
    "current_backend",
    "explain",
    "memory",
    "ops",
]

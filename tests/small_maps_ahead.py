"""Compiles the launches of training ops on maps of few pixels and channels, for a GPU that is not there.

Triton compiles other code where an argument is 1 or a multiple of 16, which its interpreter does not: one
image, one pixel, one channel, one tile. Prints how many were compiled and the names of those that spill. In a
process of its own, because kernels of the interpreter cannot be compiled.
"""

import sys

import torch
from fast_backbones.kernels._triton.launch import compile_ahead, resources, specialization

from fast_backbones import kernels
from fast_backbones.kernels import _gpu_training

SIZES = [(1, 16, 1, 2), (2, 16, 1, 1), (5, 3, 7, 1), (2, 17, 1, 9), (1, 1, 4, 4), (33, 32, 3, 3)]


def made(*sizes, dtype=torch.float32):
    return torch.empty(*sizes, device="meta", dtype=dtype, requires_grad=True)


def launches(sizes, dtype):
    """Of a forward and backward of each op."""
    c = sizes[1]
    x = made(*sizes, dtype=dtype).detach().to(memory_format=torch.channels_last).requires_grad_()
    small = [made(*size, dtype=dtype) for size in ((4, c), (4,), (c, 4), (c,))]
    weight, bias, mean, var = (made(c) for _ in range(4))
    with _gpu_training.recorded() as found, kernels.backend("gpu"):
        for shortcut in (None, torch.empty_like(x).requires_grad_()):
            how = {"residual": shortcut, "activation": "relu"}
            kernels.squeeze_excite(x, *small, **how).sum().backward()
            kernels.batch_norm(x, weight, bias, **how).sum().backward()
            moments = mean.detach(), var.detach()
            kernels.batch_norm(x, weight, bias, *moments, training=False, **how).sum().backward()
        for stride in (1, 2):
            window = {"stride": stride, "padding": 1}
            kernels.depthwise_conv2d(x, made(c, 1, 3, 3, dtype=dtype), **window).sum().backward()
            if c % 16 == 0:
                kernels.conv2d(x, made(c, 4, 3, 3, dtype=dtype), groups=c // 4, **window).sum().backward()
    return found


def main(capability):
    known, spilled = set(), set()
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in SIZES:
            for launch in launches(sizes, dtype):
                key = (launch.name, str(launch.constants), specialization(launch))
                if key not in known:
                    known.add(key)
                    if resources(compile_ahead(launch, capability).asm["cubin"])[1]:
                        spilled.add(launch.name)
    print(len(known), *sorted(spilled))


if __name__ == "__main__":
    main(int(sys.argv[1]))

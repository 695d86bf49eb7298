"""Launches of the CUDA C++ kernels (csrc/cuda), in the form that kernels/_triton gives its own.

    depthwise_conv2d    strips of rows in registers, any type
    grouped_conv2d      3x3 on tensor cores by mma.sync, 16 bits

Both write into a tensor that is there, a slice of a wider map if need be.
"""

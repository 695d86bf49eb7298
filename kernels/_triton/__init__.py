"""Triton kernels, one file per operation, imported where CUDA tensors are first met (or by the tests).

    launch.py     what a launch is: kernel, grid, arguments; to run one, and to compile one ahead of time
    blocks.py     what kernels share: activations, epilogue, indices
    <op>.py       formula and loop nest, the kernel, its tile sizes, `pack`, `launch`
    ops.py        all of them by the names that a plan knows, and what they refuse

    batch_norm.py, squeeze_excite.py, depthwise_gradients.py, grouped_gradients.py
                  for training, forward and backward; kernels/_gpu_*.py put them together
    sums.py       their sums over pixels in two stages
    masks.py      where an activation passed, as bits

A kernel reads and writes feature maps as [N, C, H, W] tensors that lie as NHWC in memory, pixel after pixel,
`pixel stride` elements apart; a map may be some channels of wider pixels. Maps are float32, float16 or
bfloat16; sums, scales, biases and everything behind a sum are float32.

With TRITON_INTERPRET=1 in the environment before the first import, the kernels run on the CPU, in Triton's
interpreter.
"""

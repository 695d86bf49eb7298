// The CUDA kernels as C++ functions: pointers, sizes and a stream, no torch. Every launcher returns nullptr, or CUDA's
// own words about what went wrong. Sums are float32 whatever the element type.
#pragma once

#include <cstdint>

#include "index.h"

namespace fb::cuda {

enum class Dtype { float32, float16, bfloat16 };

using Stream = void*;  // cudaStream_t

// y[n, p, q, c] = max over (r, s) of x[n, p * stride_h + r - pad_h, q * stride_w + s - pad_w, c], padding left out.
// A NaN in the window gives NaN, a window of padding alone gives -inf, both as in PyTorch.
const char* max_pool2d(Dtype dtype, Layout layout, const void* x, void* y, const PoolShape<int64_t>& shape,
                       Stream stream);

// y[n, c] = mean over (h, w) of x[n, h, w, c]. The order of summation depends on H and W alone: same bits for every batch.
const char* global_avg_pool(Dtype dtype, Layout layout, const void* x, void* y, int64_t n, int64_t h, int64_t w,
                            int64_t c, Stream stream);

}  // namespace fb::cuda

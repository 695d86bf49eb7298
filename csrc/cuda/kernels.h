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

// What follows a sum: y = act(sum * scale[k] + bias[k]). Null pointers are ones and zeros.
struct Finish {
  const float *scale, *bias;
  int activation;
};

// y[n, p, q, c] = finish(sum_{r, s} pre_act(x[n, h, w, c]) * weight[r, s, c]), zero outside the image;
// h = p * stride_h + r * dilation_h - pad_h, w likewise. Sums in float32, taps in order.
const char* depthwise_conv2d(Dtype dtype, const void* x, const void* weight, void* y, const ConvShape& shape,
                             int pre_activation, Finish finish, Stream stream);

// 3x3 in groups of `per_group` = 4, 8, 16, 32 or 64 channels, as many out as in, stride 1 or 2 both ways, float16 or
// bfloat16, on tensor cores. C is a multiple of 64; x, y and the packed weight are on multiples of 16 bytes.
const char* grouped_conv2d(Dtype dtype, int per_group, const void* x, const void* packed, void* y,
                           const ConvShape& shape, Finish finish, Stream stream);

}  // namespace fb::cuda

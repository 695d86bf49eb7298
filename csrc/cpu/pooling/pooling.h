// Vector kernels of max pooling and global average pooling over NHWC pixels.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace fb::pooling {

constexpr int64_t kMaxTaps = 64;

// y[c] = max over `count` pixels x[i][c]; the first of equal values; NaN if any is NaN.
struct Window {
  const float* x[kMaxTaps];
  int64_t count;
  float* y;
  int64_t channels;
};

// y[c] = (sum over `count` pixels x[i * stride + c]) / count, a cascade of sums of 8.
struct Mean {
  const float* x;
  int64_t stride;
  int64_t count;
  float* y;
  int64_t channels;
};

struct Kernels {
  void (*window)(const Window&);
  void (*mean)(const Mean&);
};

extern const Kernels kPortable, kAvx2, kAvx512;

const Kernels& kernels();

}  // namespace fb::pooling

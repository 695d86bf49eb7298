// Kernel of layer normalisation over the channels of a pixel.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace fb::layer_norm {

// A run of pixels: y[c] = (x[c] - mean) / sqrt(variance + eps) * scale[c] + shift[c].
struct Pixels {
  const float* x;
  int64_t ldx;
  const float* scale;  // or null, as shift
  const float* shift;
  float* y;
  int64_t ldy;
  int64_t count;
  int64_t channels;
  double eps;
};

struct Kernels {
  void (*pixels)(const Pixels&);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace fb::layer_norm

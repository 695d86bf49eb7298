// Kernel of per-channel scaling: y[i, c] = act( (x[i, c] * scale[c] + shift[c]) * gate[c] + residual[i, c] ).
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::affine {

// A run of pixels of one image. What is null is left out.
struct Pixels {
  const float* x;
  int64_t ldx;  // floats between pixels
  const float* scale;
  const float* shift;
  const float* gate;
  const float* residual;
  int64_t ldr;
  float* y;  // may be x
  int64_t ldy;
  int64_t count;
  int64_t channels;
};

struct Kernels {
  void (*pixels[kLastActivation + 1])(const Pixels&);  // by activation
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace fb::affine

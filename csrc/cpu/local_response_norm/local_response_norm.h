// Kernel of local response normalisation across channels.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace fb::local_response_norm {

enum Root { kHalf, kThreeQuarters, kOne };  // beta

// A run of pixels: y[c] = x[c] / (offset + factor * sum of x^2 over channels [c - size / 2, c + (size - 1) / 2])^beta.
struct Pixels {
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;
  float* squares;       // scratch: kBlock rows of `pitch` floats
  int64_t pitch;
  int64_t count;
  int64_t channels;
  int64_t size;
  float factor;         // alpha / size
  float offset;
};

constexpr int64_t kBlock = 8;    // pixels whose squares are made together
constexpr int64_t kMostLanes = 16;

struct Kernels {
  void (*pixels[3])(const Pixels&);  // by Root
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace fb::local_response_norm

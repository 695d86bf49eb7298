// Row kernels of the grouped 3x3 convolution with few channels per group.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace fb::grouped_conv2d {

// One vector of output channels (kLanes of them) for a row of output pixels.
struct Row {
  const float* x;        // first of the three copied input rows, padding included; the source vector of a pixel is kLanes floats
  int64_t row_step;      // floats between input rows
  const float* weight;   // [r][c of the group][s][kLanes]
  const float* bias;     // kLanes floats or null
  const float* residual; // pixel q at q * residual_stride, or null
  int64_t residual_stride;
  float* y;
  int64_t y_stride;
  int64_t pixels;
  int64_t relu;
};

struct Kernels {
  int lanes;
  // By channels per group 4, 8, 16, 32 and stride 1, 2.
  void (*row[4][2])(const Row&);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace fb::grouped_conv2d

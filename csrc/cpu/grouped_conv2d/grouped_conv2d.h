// Row kernels of the grouped 3x3 convolution with few channels per group.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::grouped_conv2d {

// One channel block (a vector of input channels, or a group where that is wider) of a row of output pixels.
struct Row {
  const float* x;        // first of the three copied input rows, padding included; a pixel is one channel block wide, copied by Kernels::copy
  int64_t row_step;      // floats between input rows
  const float* weight;   // [vector of the block][r][c of the group][s][kLanes]
  const float* bias;     // of the block, or null
  const float* residual; // pixel q at q * residual_stride, or null
  int64_t residual_stride;
  float* y;
  int64_t y_stride;
  int64_t pixels;
  int64_t activation;  // none, relu or relu6
};

struct Kernels {
  int lanes;
  // By output channels per group 4, 8, 16, 32 and stride 1, 2; with as many input channels, and with half as many.
  void (*row[4][2])(const Row&);
  void (*widening_row[4][2])(const Row&);
  void (*copy[5])(const float* x, int64_t step, int64_t count, int64_t ahead, float* out);  // by input channels per group 2 ... 32
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace fb::grouped_conv2d

// Row kernels of the grouped 3x3 convolution with few channels per group.
//
// A word of copied input and of weights is a channel in float32, or a pair of neighbouring channels in bfloat16 (conv2d/conv2d.h).
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::grouped_conv2d {

// One channel block (a vector of input channels, or a group where that is wider) of a row of output pixels.
struct Row {
  const float* x;        // first of the three copied input rows, padding included; a pixel is one channel block wide, copied by Kernels::copy
  int64_t row_step;      // words between input rows
  const float* weight;   // [vector of the block][r][word of the group][s][kLanes]
  const float* scale;    // of the block, or null
  const float* bias;     // of the block, or null
  const float* residual; // pixel q at q * residual_stride, or null
  int64_t residual_stride;
  float* y;
  int64_t y_stride;
  int64_t pixels;
  int64_t activation;
};

// One channel block of a row of input pixels, `step` floats apart, copied next to each other. What the next block reads, `ahead` floats on,
// is fetched.
struct Copy {
  const float* x;
  int64_t step, count, ahead;
  const float *scale, *shift;  // of the block, or null: what is copied is activation(x * scale + shift); float32 only
  int64_t activation;
  float* out;
};

struct Kernels {
  int lanes;
  int channels_per_word;
  // By output channels per word 1, 2, 4, output channels per group 4, 8, 16, 32, and stride 1, 2; null where there is no such layer.
  void (*row[3][4][2])(const Row&);
  void (*copy[6])(const Copy&);  // by words per group 1, 2 ... 32
};

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace fb::grouped_conv2d

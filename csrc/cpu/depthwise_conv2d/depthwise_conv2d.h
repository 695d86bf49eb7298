// Row kernel of the depthwise convolution: one filter per channel. Also called by separable_conv2d.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::depthwise_conv2d {

constexpr int64_t kMaxWindow = 7;  // rows and columns of a filter

// A run of pixels and channels of one output row:
//
//   y[q, c] = act( sum_rs pre(x[r][q*stride + s*dilation - pad, c]) * weight[r, s, c] + bias[c] )
//
// for q in [first, first + pixels). pre(v) = pre_activation(v * pre_scale + pre_shift), scale and shift both or neither. Columns outside
// [0, width) and missing rows count as zero, after pre. Products are added in the order r, s, by multiply-adds that start at zero, so the
// bits of an output do not depend on how a map is cut into runs. Activations: none, relu, relu6; `activate` does the others in place.
struct Row {
  const float* x[kMaxWindow];  // column 0 of the r input rows; null where the row lies in the padding
  int64_t ldx;                 // floats between the pixels of an input row
  int64_t width;               // pixels of an input row
  const float* weight;         // [r * s] taps of `channels` floats, ldw apart
  int64_t ldw;
  const float* bias;           // or null
  const float* pre_scale;      // or null
  const float* pre_shift;      // or null
  float* y;                    // output pixel `first`
  int64_t ldy;
  int64_t first, pixels;
  int64_t channels;
  int64_t r, s, stride, dilation, pad;  // s, stride, dilation and pad of the columns; rows were chosen by the caller
  int64_t pre_activation, activation;   // values of Activation
};

struct Kernels {
  void (*row)(const Row&);
  void (*activate)(float* y, int64_t stride, int64_t rows, int64_t columns, int64_t activation);
};

extern const Kernels kPortable, kAvx2, kAvx512;

const Kernels& kernels();

}  // namespace fb::depthwise_conv2d

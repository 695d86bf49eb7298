// Gradients of the grouped 3x3 convolution with few channels per group, y[n, p, q, k] = sum_rsc x[n, p*stride + r - pad, ..., c] * w[k, c, r, s],
// c in the group of k:
//
//   dx[n, h, w, c]  = sum_rsk dy[n, p, q, k] * w[k, c, r, s]      over the taps with p*stride + r - pad = h, and q likewise
//   dw[k, c, r, s]  = sum_npq dy[n, p, q, k] * x[n, p*stride + r - pad, q*stride + s - pad, c]
//
// With stride 1 dx is a grouped convolution of dy with filters turned round and transposed: the forward kernel computes it.
#pragma once

#include <cstdint>
#include <string>

#include "../isa.h"
#include "../op.h"

namespace fb::grouped_conv2d_backward {

// A channel block is a vector, or a group where that is wider. Copied pixels are one block wide, their lanes transposed by
// grouped_conv2d::Kernels::copy.

// One channel block of a row of dx, stride 2.
struct InputRow {
  const float* grad[2];  // copied rows of dy by ascending r, a pixel of zeros before them and kPairs behind
  const float* weight
      [2];  // of their r, as the forward packs them with its inputs and outputs exchanged: [vector][r][word of the group][s][lane]
  int64_t rows;
  float* y;
  int64_t y_stride;
  int64_t width;
  int64_t pad;
  bool stream;  // past the caches; vectors of y are cache lines
};

// What some rows of dy, one channel block, add to dw, which is [vector][r][channel of the group][s][lane].
struct WeightRows {
  const float* grad;  // copied
  const float* x;     // copied rows, no padding; the group of the first lane
  int64_t x_step;     // floats between rows
  int64_t first;      // the row of the image that tap 0 of the first row of dy sees, less x's first
  int64_t height;     // rows of x
  int64_t width;
  int64_t rows, pixels;  // of dy
  int64_t pad;
  float* sums;
};

struct Kernels {
  int lanes;
  int64_t pairs;                          // the longest tile of input_row, in pairs of columns
  void (*input_row[4])(const InputRow&);  // by channels per group 4, 8, 16, 32
  void (*weight_rows[2][4][2])(
      const WeightRows&);  // by output channels per input channel 1, 2, output channels per group, stride
  void (*add)(double* total, const float* sums, int64_t count);
};

extern const Kernels kPortable, kAvx2, kAvx512;

// "" when input_gradient, of stride 2, and weight_gradient can; the forward's refusal comes first.
std::string input_refusal(const OpSpec& spec);

// `spec` is the forward's, kind grouped_conv2d; a pixel of dy is ldg floats wide, dx is dense. `weight` is [K, C / groups, 3, 3].
void input_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const float* weight, float* dx);

// dw[k * steps[0] + c * steps[1] + r * steps[2] + s * steps[3]]: the same bits for any number of threads. Reads x of the pointers, and
// pre_scale and pre_shift.
void weight_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const Pointers& x, float* dw, const int64_t steps[4]);

}  // namespace fb::grouped_conv2d_backward

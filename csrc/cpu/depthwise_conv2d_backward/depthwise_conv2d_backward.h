// Gradients of the depthwise convolution y[n, p, q, c] = sum_rs x[n, p*stride + r*dilation - pad, ..., c] * w[r, s, c]:
//
//   dx[n, h, w, c] = sum_rs dy[n, p, q, c] * w[r, s, c]      over the taps with p*stride + r*dilation - pad = h, and q likewise
//   dw[r, s, c]    = sum_npq dy[n, p, q, c] * x[n, p*stride + r*dilation - pad, q*stride + s*dilation - pad, c]
//
// With stride 1 dx is a depthwise convolution of dy with the filters turned round. The forward's kernel is as fast at that for 3x3, slower
// for larger windows, whose pixels it loads once for each tap.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "../op.h"

namespace fb::depthwise_conv2d_backward {

constexpr int64_t kMaxWindow = 7;

// A row of dx. Products are added by ascending r and descending s, by multiply-adds that start at zero.
struct InputRow {
  const float* grad[kMaxWindow];    // the rows of dy that this row of x went into, by ascending r
  const float* weight[kMaxWindow];  // [s] taps of their r
  int64_t rows;
  int64_t ldg;  // floats between pixels of dy
  int64_t q;    // pixels of a row of dy
  int64_t ldw;  // floats between taps
  float* y;
  int64_t ldy, width, channels;
  int64_t s, stride, dilation, pad;  // of the columns
  bool stream;                       // past the caches; y is whole cache lines
};

// What a row of dy adds to dw. Each tap is summed over a tile of pixels in a register, over tiles in `sums`.
struct WeightRow {
  const float* grad;
  int64_t ldg, pixels;
  const float* x[kMaxWindow];  // column 0 of the r input rows; null where the row lies in the padding
  int64_t ldx, width;
  float* sums;  // [r * s] of `channels` floats, ldw apart
  int64_t ldw, channels;
  int64_t r, s, stride, dilation, pad;
};

struct Kernels {
  void (*input_row)(const InputRow&);
  void (*weight_row)(const WeightRow&);
  void (*add)(double* total, const float* sums, int64_t count);
};

extern const Kernels kPortable, kAvx2, kAvx512;

// `spec` is the forward's, kind depthwise_conv2d; a pixel of dy is ldg floats wide, dx is dense. `weight` is packed as for the forward.
void input_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const float* weight, float* dx);

// dw[c * steps[0] + r * steps[1] + s * steps[2]]: the same bits for any number of threads.
void weight_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const float* x, float* dw, const int64_t steps[3]);

}  // namespace fb::depthwise_conv2d_backward

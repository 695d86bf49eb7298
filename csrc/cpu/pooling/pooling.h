// Vector kernels of max pooling and average pooling over NHWC pixels.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"
#include "../op.h"

namespace fb::pooling {

constexpr int64_t kMaxTaps = 64;
constexpr int64_t kChain = 8;  // values that an average adds one after the other

// A run of output pixels whose windows are alike: y[q * ldy + c] = max over i < count of x[i][q * step + c]; the first of equal values;
// NaN if any is NaN.
struct Windows {
  const float* x[kMaxTaps];  // the taps of the first window
  uint8_t tap[kMaxTaps];     // their numbers, r * S + s
  int64_t count;
  int64_t step;
  float* y;
  int64_t ldy;
  uint8_t* taps;  // taps[q * channels + c] = the number of the largest; null: not wanted
  int64_t pixels;
  int64_t channels;
};

// The gradient of a row of x: dx[w, c] = sum over rows i, over columns q of windows with a tap s at column w, of dy[i][q * ldg + c] where
// taps[i][q * channels + c] is r[i] * columns_of_window + s. Rows and columns ascend.
struct MaxGradientRow {
  const float* dy[kMaxTaps];
  const uint8_t* taps[kMaxTaps];
  int64_t r[kMaxTaps];
  int64_t rows, ldg;
  int64_t columns_of_window, stride, pad;
  int64_t q;  // windows of a row
  float* dx;  // dense
  int64_t width, channels;
};

// y[c] = (sum over `count` pixels x[i * stride + c]) / count, a cascade of sums of 8.
struct Mean {
  const float* x;
  int64_t stride;
  int64_t count;
  float* y;
  int64_t channels;
};

// Rows or columns of one window that lie inside the image, and how many of them the average counts.
struct Extent {
  int64_t begin, end, count;
};

// A row of output pixels: y[q, c] = act( sum over rows and columns[q] of x / (row_count * columns[q].count) + bias[c] ). Every column of
// a window is summed first, from top to bottom, then the columns from left to right; more than kChain values in
// cascades of 8.
struct AverageRow {
  const float* x;         // column 0 of the window's first row inside the image
  int64_t row_step;       // floats between input rows
  int64_t ldx;
  int64_t rows;           // of the window inside the image
  int64_t row_count;      // rows that the average counts
  const Extent* columns;  // by output pixel
  int64_t sliding_begin, sliding_end;  // pixels whose windows are 3 columns wide, each one column after the last, and at most kChain high
  const float* bias;      // or null
  int64_t activation;     // kNone, kRelu, kRelu6
  float* y;
  int64_t ldy;
  int64_t pixels;
  int64_t channels;
};

struct Kernels {
  void (*windows)(const Windows&);
  void (*max_gradient)(const MaxGradientRow&);
  void (*mean)(const Mean&);
  void (*average_row)(const AverageRow&);
};

extern const Kernels kPortable, kAvx2, kAvx512;

const Kernels& kernels();

// y of the max pooling that spec describes, and for each of its elements which tap of the window was the largest: [n, p, q, c].
void max_with_taps(const OpSpec& spec, const Pointers& x, uint8_t* taps);

// The gradient of x [n, h, w, c], dense, from that of y and the taps.
void max_gradient(const OpSpec& spec, const float* dy, int64_t ldg, const uint8_t* taps, float* dx);

}  // namespace fb::pooling

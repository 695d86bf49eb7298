// Vector kernels of max pooling and average pooling over NHWC pixels.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::pooling {

constexpr int64_t kMaxTaps = 64;
constexpr int64_t kChain = 8;  // values that an average adds one after the other

// A run of output pixels whose windows are alike: y[q * ldy + c] = max over i < count of x[i][q * step + c]; the first of equal values;
// NaN if any is NaN.
struct Windows {
  const float* x[kMaxTaps];  // the taps of the first window
  int64_t count;
  int64_t step;
  float* y;
  int64_t ldy;
  int64_t pixels;
  int64_t channels;
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
  void (*mean)(const Mean&);
  void (*average_row)(const AverageRow&);
};

extern const Kernels kPortable, kAvx2, kAvx512;

const Kernels& kernels();

}  // namespace fb::pooling

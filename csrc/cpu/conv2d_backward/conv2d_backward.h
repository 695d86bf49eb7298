// The gradient of the filters of a convolution, a matrix product over pixels for each tap of the window:
//
//   dw[k, c, r, s] = sum_npq dy[n, p, q, k] * a[n, p*stride + r*dilation - pad, q*stride + s*dilation - pad, c]
//   a = act((x - mean) * scale + bias), or x                                                            a = 0 in the padding
//
//   task = (some filters, some pixels)
//     for some taps                     as many as have their sums in L2
//       for 128 pixels                  dy copied to [tile][pixel][filter of the tile]
//         for tap, for panel            a computed to [pixel][channel of the panel]: stays in L1
//           for tile of <= 14 filters   registers, added to dw behind the 128 products; meanwhile the next panel is fetched
//
// Batch norm and activation in front of the convolution are computed while x is copied, so a is never written to memory. Tasks are cut by the
// layer's sizes alone, and their sums added in order: the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "../op.h"
#include "../rows.h"

namespace fb::conv2d_backward {

// y[m * panel + j] = (add ? y[m * panel + j] : 0) + sum_p a[p * rows + m] * b[p * panel + j]
struct Tile {
  const float *a, *b;
  int64_t depth;
  float* y;
  bool add;
  const float *next_dy, *next_x;  // a line of each is fetched into L2 per product: the next one of dy, of x next_x_step floats on
  int64_t next_x_step;
};

// How x becomes a; all pointers null: not at all; no mean: 0.
struct Norm {
  const float *mean, *scale, *bias;
  int64_t activation;  // kNone, kRelu, kRelu6
};

// out[i * panel + c] = a of pixel i, `step` floats after the last one; a panel's channels at most.
struct Panel {
  const float* x;
  int64_t step, pixels, channels;
  Norm norm;
  float* out;
};

// out[i * rows + m] = dy[i * step + m]; `rows` up to max_rows. Writes up to a vector behind the last.
struct Rows {
  const float* dy;
  int64_t step, pixels, rows;
  float* out;
};

struct Kernels {
  int panel;
  int max_rows;
  void (*const* tile)(const Tile&);  // tile[rows], 1..max_rows
  void (*panel_of)(const Panel&);
  void (*rows_of)(const Rows&);
};

extern const Kernels kPortable, kAvx2, kAvx512;

// `spec` is the forward's, of one group; dw[k * steps[0] + c * steps[1] + r * steps[2] + s * steps[3]]. At least one image.
void weight_gradient(const OpSpec& spec, RowMap dy, RowMap x, const Norm& norm, float* dw, const int64_t steps[4]);

}  // namespace fb::conv2d_backward

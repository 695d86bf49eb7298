// Grouped 3x3, one row of output pixels, one vector of output channels:
//
//   y[q, k] = act( sum_r sum_c sum_s x[r][q*stride + s][group(k), c] * w[r, c, s, k] + bias[k] + residual[q, k] )
//
//   for r, c of the group          3 weight vectors, one for each s
//     for input column             spread: lane k gets channel c of its own group (a shuffle for 4 and 8 channels, a broadcast above)
//       3 fma                      into the output pixels that see this column; a column is spread once, not once per tap
//
// Registers, AVX-512: 14 accumulators + 3 weights + 1 spread = 18 of 32 (two vectors of output channels would spill at 14).
// Rows end with a full tile that overlaps the one before: the same values are computed twice, nothing is masked.
#pragma once

#include "grouped_conv2d.h"

namespace {

using fb::grouped_conv2d::Row;

template <int kGroup, int kStride, int kPixels>
FB_INLINE void pixels(const Row& row, int64_t q0) {
  constexpr int kSource = kGroup > kLanes ? kGroup : kLanes;  // floats per copied input pixel
  constexpr int kColumns = (kPixels - 1) * kStride + 3;
  V acc[kPixels];
#pragma GCC unroll 16
  for (int q = 0; q < kPixels; ++q) acc[q] = vzero();
  const float* w = row.weight;
  for (int r = 0; r < 3; ++r) {
    const float* x = row.x + r * row.row_step + q0 * kStride * kSource;
    const auto channel = [&](int c) __attribute__((always_inline)) {
      const V w0 = vload(w), w1 = vload(w + kLanes), w2 = vload(w + 2 * kLanes);
      w += 3 * kLanes;
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j) {
        const V v = vspread<kGroup>(x + j * kSource, c);
        // Column j is tap s of pixel (j - s) / stride. Ascending j keeps the order s = 0, 1, 2 for every pixel.
        if (j % kStride == 0 && j / kStride < kPixels) vfma_into(acc[j / kStride], v, w0);
        if (j >= 1 && (j - 1) % kStride == 0 && (j - 1) / kStride < kPixels) vfma_into(acc[(j - 1) / kStride], v, w1);
        if (j >= 2 && (j - 2) % kStride == 0 && (j - 2) / kStride < kPixels) vfma_into(acc[(j - 2) / kStride], v, w2);
      }
    };
    if constexpr (kGroup == 4) {
      channel(0);
      channel(1);
      channel(2);
      channel(3);
    } else {
#pragma GCC unroll 1  // unrolled, the 8 shuffle patterns of kGroup 8 would live in registers and spill the accumulators
      for (int c = 0; c < kGroup; ++c) channel(c);
    }
  }
  const V bias = row.bias != nullptr ? vload(row.bias) : vzero();
#pragma GCC unroll 16
  for (int q = 0; q < kPixels; ++q) {
    V v = vadd(acc[q], bias);
    if (row.residual != nullptr) v = vadd(v, vload(row.residual + (q0 + q) * row.residual_stride));
    if (row.relu) v = vrelu(v);
    vstore(row.y + (q0 + q) * row.y_stride, v);
  }
}

template <int kGroup, int kStride, int kPixels>
FB_INLINE void tiles(const Row& row) {
  int64_t q = 0;
  for (; q + kPixels <= row.pixels; q += kPixels) pixels<kGroup, kStride, kPixels>(row, q);
  if (q < row.pixels) pixels<kGroup, kStride, kPixels>(row, row.pixels - kPixels);
}

template <int kGroup, int kStride>
void row(const Row& row) {
  if (row.pixels >= kWidestTile) {
    tiles<kGroup, kStride, kWidestTile>(row);
  } else if (row.pixels >= 7) {
    tiles<kGroup, kStride, 7>(row);
  } else if (row.pixels >= 3) {
    tiles<kGroup, kStride, 3>(row);
  } else {
    tiles<kGroup, kStride, 1>(row);
  }
}

}  // namespace

#define FB_GROUPED_ROWS \
  {{row<4, 1>, row<4, 2>}, {row<8, 1>, row<8, 2>}, {row<16, 1>, row<16, 2>}, {row<32, 1>, row<32, 2>}}

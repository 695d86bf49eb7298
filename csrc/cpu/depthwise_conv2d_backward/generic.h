// Vectors run over channels, as in the forward; tiles of a row, all channels of a tile before the next: memory is walked in its order.
//
// dx: columns that are `stride` apart see the same taps, so that each of the `stride` phases of a row is a convolution of stride 1 with a
// part of the filter, and nothing is multiplied by zeros between pixels of dy.
//
// dw, 3x3: 9 sums in registers over a tile of 16 pixels. For 9 fma a load of dy and 9 of x, which are in L1: maps that do not fit a cache
// come from memory at half that speed.
#pragma once

#include "depthwise_conv2d_backward.h"

namespace {

using fb::depthwise_conv2d_backward::InputRow;
using fb::depthwise_conv2d_backward::kMaxWindow;
using fb::depthwise_conv2d_backward::WeightRow;

constexpr int64_t kTile = 7;
constexpr int64_t kWeightTile = 16;

// Pixels [begin, end) of a tile get tap s times the pixels of dy from `first` on.
struct Tap {
  int64_t s, first, begin, end;
};

// kTile columns `stride` apart from column w on, those of [0, count).
template <typename Part>
FB_INLINE void input_tile(const InputRow& row, const Tap* taps, int64_t tap_count, int64_t w, int64_t count, int64_t c,
                          const Part& part) {
  V acc[kTile];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) acc[i] = vzero();
  for (int64_t r = 0; r < row.rows; ++r) {
    for (int64_t t = 0; t < tap_count; ++t) {
      const Tap& tap = taps[t];
      const V weight = part.load(row.weight[r] + tap.s * row.ldw + c);
      const float* const grad = row.grad[r] + c;
      if (tap.begin == 0 && tap.end == kTile) {
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) vfma_into(acc[i], part.load(grad + (tap.first + i) * row.ldg), weight);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) {
          if (i >= tap.begin && i < tap.end) vfma_into(acc[i], part.load(grad + (tap.first + i) * row.ldg), weight);
        }
      }
    }
  }
  float* const y = row.y + w * row.ldy + c;
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    if (i < count) part.store(y + i * row.stride * row.ldy, acc[i]);
  }
}

void input_row(const InputRow& row) {
  for (int64_t w0 = 0; w0 < row.width; w0 += kTile * row.stride) {
    for (int64_t w = w0; w < w0 + row.stride && w < row.width; ++w) {
      const int64_t left = (row.width - w + row.stride - 1) / row.stride, count = left < kTile ? left : kTile;
      Tap taps[kMaxWindow];
      int64_t tap_count = 0;
      for (int64_t s = 0; s < row.s; ++s) {
        const int64_t column = w + row.pad - s * row.dilation;
        if (column % row.stride != 0) continue;
        Tap tap{s, column / row.stride, 0, count};
        if (tap.first < 0) tap.begin = -tap.first;
        if (tap.first + tap.end > row.q) tap.end = row.q - tap.first;
        if (tap.begin < tap.end) taps[tap_count++] = tap;
      }
      for_vectors(row.channels, [&](int64_t c, const auto& part)
                                    __attribute__((always_inline)) { input_tile(row, taps, tap_count, w, count, c, part); });
    }
  }
}

// Pixels of [begin, end) of a row, of which those of [lo, hi) see all kS columns.
template <int kR, int kS, typename Part>
FB_INLINE void weight_tile(const WeightRow& row, int64_t first_r, int64_t begin, int64_t end, int64_t lo, int64_t hi, int64_t c,
                           const Part& part) {
  V acc[kR][kS];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kS; ++s) acc[r][s] = vzero();
  const float* const grad = row.grad + c;
  const auto edge = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
    for (int64_t q = from; q < to; ++q) {
      const V g = part.load(grad + q * row.ldg);
#pragma GCC unroll 8
      for (int s = 0; s < kS; ++s) {
        const int64_t column = q * row.stride + s * row.dilation - row.pad;
        if (column < 0 || column >= row.width) continue;
#pragma GCC unroll 8
        for (int r = 0; r < kR; ++r) vfma_into(acc[r][s], part.load(row.x[first_r + r] + column * row.ldx + c), g);
      }
    }
  };
  const int64_t a = lo < begin ? begin : lo > end ? end : lo, b = hi < a ? a : hi > end ? end : hi;
  edge(begin, a);
  const int64_t step = row.dilation * row.ldx;
  for (int64_t q = a; q < b; ++q) {
    const V g = part.load(grad + q * row.ldg);
    const int64_t at = (q * row.stride - row.pad) * row.ldx + c;
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const float* const x = row.x[first_r + r] + at;
#pragma GCC unroll 8
      for (int s = 0; s < kS; ++s) vfma_into(acc[r][s], part.load(x + s * step), g);
    }
  }
  edge(b, end);
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kS; ++s) {
      float* const sum = row.sums + ((first_r + r) * kS + s) * row.ldw + c;
      part.store(sum, vadd(part.load(sum), acc[r][s]));
    }
}

template <int kR, int kS>
FB_INLINE void weight_tiles(const WeightRow& row, int64_t first_r) {
  const int64_t reach = (kS - 1) * row.dilation, room = row.width + row.pad - reach;
  const int64_t lo = (row.pad + row.stride - 1) / row.stride, hi = room <= 0 ? 0 : (room - 1) / row.stride + 1;
  for (int64_t q = 0; q < row.pixels; q += kWeightTile) {
    const int64_t end = q + kWeightTile < row.pixels ? q + kWeightTile : row.pixels;
    for_vectors(row.channels, [&](int64_t c, const auto& part)
                                  __attribute__((always_inline)) { weight_tile<kR, kS>(row, first_r, q, end, lo, hi, c, part); });
  }
}

template <int kS>
void weight_rows(const WeightRow& row) {
  if constexpr (kS == 3) {
    if (row.r == 3 && row.x[0] != nullptr && row.x[1] != nullptr && row.x[2] != nullptr) return weight_tiles<3, 3>(row, 0);
  }
  for (int64_t r = 0; r < row.r; ++r) {
    if (row.x[r] != nullptr) weight_tiles<1, kS>(row, r);
  }
}

void weight_row(const WeightRow& row) {
  static constexpr void (*kRows[kMaxWindow])(const WeightRow&) = {weight_rows<1>, weight_rows<2>, weight_rows<3>, weight_rows<4>,
                                                                  weight_rows<5>, weight_rows<6>, weight_rows<7>};
  kRows[row.s - 1](row);
}

void add(double* total, const float* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
}

}  // namespace

#define FB_DEPTHWISE_BACKWARD_KERNELS {input_row, weight_row, add}

// Vectors run over channels, as in the forward; tiles of a row, all channels of a tile before the next: memory is walked in its order.
//
// dx: columns that are `stride` apart see the same taps, so that each of the `stride` phases of a row is a convolution of stride 1 with a
// part of the filter, and nothing is multiplied by zeros between pixels of dy. Where the taps see neighbouring pixels of dy (dilation 1),
// a pixel is loaded once for all of them: 7 sums + up to 7 weights + 1.
//
// dw: the sums of 3x3 taps, or of one r, stay in registers over a tile of a row; 4 pixels go together, column by column of x, so that a
// load serves up to kS fma. 9 sums + 4 + 1 = 14 of 16 (AVX2).
#pragma once

#include "depthwise_conv2d_backward.h"

namespace {

using fb::depthwise_conv2d_backward::InputRow;
using fb::depthwise_conv2d_backward::kMaxWindow;
using fb::depthwise_conv2d_backward::WeightRow;

constexpr int kTile = 7;
constexpr int64_t kWeightTile = 16;
constexpr int kPixels = 4;

// The taps of one phase of a tile by ascending column of dy; kTile columns of dx `stride` apart from w on, of which `count` exist.
struct Phase {
  int64_t s[kMaxWindow], first[kMaxWindow];  // tap, and the column of dy that it multiplies for w
  int64_t taps, w, count;
  bool neighbours;     // each tap's column follows the last one's
  int64_t begin, end;  // columns that exist, from first[0] on, then
};

FB_INLINE Phase phase_of(const InputRow& row, int64_t w) {
  Phase phase;
  const int64_t left = row.width - w;
  phase.w = w;
  phase.count = left >= kTile * row.stride ? kTile : (left + row.stride - 1) / row.stride;
  phase.taps = 0;
  phase.neighbours = true;
  for (int64_t s = row.s - 1; s >= 0; --s) {
    int64_t column = w + row.pad - s * row.dilation;
    if (row.stride == 2) {  // no division: one for each tap took a sixth of the time
      if ((column & 1) != 0) continue;
      column >>= 1;
    } else if (row.stride > 2) {
      if (column % row.stride != 0) continue;
      column /= row.stride;
    }
    if (phase.taps > 0 && column != phase.first[phase.taps - 1] + 1) phase.neighbours = false;
    phase.s[phase.taps] = s;
    phase.first[phase.taps++] = column;
  }
  phase.begin = phase.taps > 0 && phase.first[0] < 0 ? -phase.first[0] : 0;
  phase.end = phase.taps > 0 ? row.q - phase.first[0] : 0;
  return phase;
}

template <int kTaps, bool kInside, typename Part>
FB_INLINE void input_neighbours(const InputRow& row, const Phase& phase, V (&acc)[kTile], int64_t c, const Part& part) {
  for (int64_t r = 0; r < row.rows; ++r) {
    V weight[kTaps];
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) weight[t] = part.load(row.weight[r] + phase.s[t] * row.ldw + c);
    const float* const grad = row.grad[r] + phase.first[0] * row.ldg + c;
#pragma GCC unroll 16
    for (int j = 0; j < kTile + kTaps - 1; ++j) {
      if (!kInside && (j < phase.begin || j >= phase.end)) continue;
      const V g = part.load(grad + j * row.ldg);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) {
        if (j >= t && j - t < kTile) vfma_into(acc[j - t], g, weight[t]);
      }
    }
  }
  if (kInside && row.rows > 0) {  // the row of dy that the next row of dx sees, too
    const float* const next = row.grad[row.rows - 1] + (row.q + phase.first[0]) * row.ldg + c;
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) vprefetch_l2(next + j * row.ldg);
  }
}

template <typename Part>
FB_INLINE void input_scattered(const InputRow& row, const Phase& phase, V (&acc)[kTile], int64_t c, const Part& part) {
  for (int64_t r = 0; r < row.rows; ++r) {
    for (int64_t t = 0; t < phase.taps; ++t) {
      const V weight = part.load(row.weight[r] + phase.s[t] * row.ldw + c);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        const int64_t column = phase.first[t] + i;
        if (column >= 0 && column < row.q) vfma_into(acc[i], part.load(row.grad[r] + column * row.ldg + c), weight);
      }
    }
  }
}

// kTaps 0: any number, anywhere.
template <int kTaps, bool kInside>
FB_INLINE void phase_channels(const InputRow& row, const Phase& phase) {
  for_vectors(row.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    V acc[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) acc[i] = vzero();
    if constexpr (kTaps == 0) {
      input_scattered(row, phase, acc, c, part);
    } else {
      input_neighbours<kTaps, kInside>(row, phase, acc, c, part);
    }
    float* const y = row.y + phase.w * row.ldy + c;
    if (row.stream) {
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        if (kInside || i < phase.count) vstream(y + i * row.stride * row.ldy, acc[i]);
      }
      return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      if (kInside || i < phase.count) {
        part.store(y + i * row.stride * row.ldy, acc[i]);
        vprefetch_write(y + (i * row.stride + row.width) * row.ldy);
      }
    }
  });
}

template <int kTaps>
void input_phase(const InputRow& row, const Phase& phase) {
  const bool inside = kTaps > 0 && phase.begin == 0 && phase.end >= kTile + kTaps - 1 && phase.count == kTile;
  if (inside) return phase_channels < kTaps, kTaps != 0 > (row, phase);
  phase_channels<kTaps, false>(row, phase);
}

void input_row(const InputRow& row) {
  static constexpr void (*kPhases[kMaxWindow + 1])(const InputRow&, const Phase&) = {
      input_phase<0>, input_phase<1>, input_phase<2>, input_phase<3>,
      input_phase<4>, input_phase<5>, input_phase<6>, input_phase<7>};
  for (int64_t w0 = 0; w0 < row.width; w0 += kTile * row.stride) {
    for (int64_t w = w0; w < w0 + row.stride && w < row.width; ++w) {
      const Phase phase = phase_of(row, w);
      kPhases[phase.neighbours ? phase.taps : 0](row, phase);
    }
  }
  if (row.stream) vstreamed();
}

// One vector of channels of a row: sums of kS taps of kR rows from first_r on.
template <int kR, int kS, typename Part>
struct Window {
  const WeightRow& row;
  int64_t first_r, c;
  Part part;
  V acc[kR][kS];

  FB_INLINE const float* x(int r, int64_t column) const { return row.x[first_r + r] + column * row.ldx + c; }
  FB_INLINE V grad(int64_t q) const { return part.load(row.grad + q * row.ldg + c); }

  FB_INLINE void border(int64_t q) {
    const V g = grad(q);
#pragma GCC unroll 8
    for (int s = 0; s < kS; ++s) {
      const int64_t column = q * row.stride + s * row.dilation - row.pad;
      if (column < 0 || column >= row.width) continue;
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) vfma_into(acc[r][s], part.load(x(r, column)), g);
    }
  }

  FB_INLINE void pixel(int64_t q) {
    const V g = grad(q);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const float* const p = x(r, q * row.stride - row.pad);
#pragma GCC unroll 8
      for (int s = 0; s < kS; ++s) vfma_into(acc[r][s], part.load(p + s * row.dilation * row.ldx), g);
    }
  }

  template <int kStride>
  FB_INLINE void pixels(int64_t q) {
    V g[kPixels];
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) g[i] = grad(q + i);
    // The rows that the next row of dy adds to these: 128x56x56 takes 4.5 ms, 5.9 without (one thread).
    if (first_r + kR == row.r) {
      const float* const p = x(kR - 1, row.width + q * kStride - row.pad);
#pragma GCC unroll 8
      for (int r = 0; r < kStride; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kPixels * kStride; ++j) vprefetch_l2(p + (r * row.width + j) * row.ldx);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) vprefetch_l2(row.grad + (q + i + row.pixels) * row.ldg + c);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const float* const p = x(r, q * kStride - row.pad);
#pragma GCC unroll 16
      for (int j = 0; j < (kPixels - 1) * kStride + kS; ++j) {
        const V v = part.load(p + j * row.ldx);
#pragma GCC unroll 8
        for (int s = 0; s < kS; ++s) {
          if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kPixels) vfma_into(acc[r][s], v, g[(j - s) / kStride]);
        }
      }
    }
  }
};

// Pixels of [begin, end) of a row, of which those of [lo, hi) see all kS columns. kStride 0: any stride and dilation.
template <int kR, int kS, int kStride, typename Part>
FB_INLINE void weight_tile(const WeightRow& row, int64_t first_r, int64_t begin, int64_t end, int64_t lo, int64_t hi, int64_t c,
                           const Part& part) {
  Window<kR, kS, Part> window{row, first_r, c, part, {}};
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kS; ++s) window.acc[r][s] = vzero();
  int64_t q = begin;
  for (; q < lo && q < end; ++q) window.border(q);
  const int64_t inner = hi < end ? hi : end;
  if constexpr (kStride > 0) {
    for (; q + kPixels <= inner; q += kPixels) window.template pixels<kStride>(q);
  }
  for (; q < inner; ++q) window.pixel(q);
  for (; q < end; ++q) window.border(q);
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kS; ++s) {
      float* const sum = row.sums + ((first_r + r) * kS + s) * row.ldw + c;
      part.store(sum, vadd(part.load(sum), window.acc[r][s]));
    }
}

template <int kR, int kS, int kStride>
FB_INLINE void weight_tiles(const WeightRow& row, int64_t first_r) {
  const int64_t reach = (kS - 1) * row.dilation, room = row.width + row.pad - reach;
  const int64_t lo = (row.pad + row.stride - 1) / row.stride, hi = room <= 0 ? 0 : (room - 1) / row.stride + 1;
  for (int64_t q = 0, end; q < row.pixels; q = end) {
    end = (q < lo ? lo : q) + kWeightTile;
    if (end > row.pixels) end = row.pixels;
    for_vectors(row.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      weight_tile<kR, kS, kStride>(row, first_r, q, end, lo, hi, c, part);
    });
  }
}

template <int kS, int kStride>
FB_INLINE void weight_rows_of(const WeightRow& row) {
  if constexpr (kS == 3) {
    if (row.r == 3 && row.x[0] != nullptr && row.x[1] != nullptr && row.x[2] != nullptr)
      return weight_tiles<3, 3, kStride>(row, 0);
  }
  for (int64_t r = 0; r < row.r; ++r) {
    if (row.x[r] != nullptr) weight_tiles<1, kS, kStride>(row, r);
  }
}

template <int kS>
void weight_rows(const WeightRow& row) {
  if (row.dilation == 1 && row.stride == 1) return weight_rows_of<kS, 1>(row);
  if (row.dilation == 1 && row.stride == 2) return weight_rows_of<kS, 2>(row);
  weight_rows_of<kS, 0>(row);
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

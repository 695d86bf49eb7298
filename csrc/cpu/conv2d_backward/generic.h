// Register tiles of kRows filters x kVectors vectors of channels, and the copies that feed them. AVX-512: 14 x 2 accumulators + 2 of b +
// 1 broadcast = 31 of 32 registers; AVX2: 6 x 2 + 2 + 1 = 15 of 16.
#pragma once

#include "../simd/activation.h"
#include "../simd/by_activation.h"
#include "../simd/part.h"
#include "conv2d_backward.h"

namespace {

using fb::conv2d_backward::Panel;
using fb::conv2d_backward::Rows;
using fb::conv2d_backward::Tile;

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;

template <int kRows>
void tile(const Tile& t) {
  V acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) acc[m][j] = vzero();
  if (t.add) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int j = 0; j < kPanel; j += 16) vprefetch_write(t.y + m * kPanel + j);
  }
  const float *a = t.a, *b = t.b, *next_dy = t.next_dy, *next_x = t.next_x;
  for (int64_t p = 0; p < t.depth; ++p) {
    vprefetch_l2(next_dy);
    vprefetch_l2(next_x);
    next_dy += 16;
    next_x += t.next_x_step;
    asm volatile("" ::: "memory");  // the next step's loads must not move up: there is one register to spare
    V row[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) row[j] = vload(b + j * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const V x = vbroadcast(a[m]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) vfma_into(acc[m][j], x, row[j]);
    }
    a += kRows;
    b += kPanel;
  }
  if (t.add) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) acc[m][j] = vadd(vload(t.y + m * kPanel + j * kLanes), acc[m][j]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) vstore(t.y + m * kPanel + j * kLanes, acc[m][j]);
}

// A whole panel: what a channel needs stays in registers. kNorm: 0 nothing, 1 scale and bias, 2 a mean before them.
template <int kNorm, int64_t kActivation>
FB_INLINE void whole_panel(const Panel& t) {
  V mean[kVectors], scale[kVectors], bias[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    mean[j] = kNorm > 1 ? vload(t.norm.mean + j * kLanes) : vzero();
    scale[j] = kNorm > 0 ? vload(t.norm.scale + j * kLanes) : vzero();
    bias[j] = kNorm > 0 ? vload(t.norm.bias + j * kLanes) : vzero();
  }
  const float* x = t.x;
  float* out = t.out;
#pragma GCC unroll 2
  for (int64_t i = 0; i < t.pixels; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      V v = vload(x + j * kLanes);
      if constexpr (kNorm > 1) v = vsub(v, mean[j]);
      if constexpr (kNorm > 0) {
        V sum = bias[j];
        vfma_into(sum, v, scale[j]);
        v = vclip(sum, kActivation);
      }
      vstore(out + j * kLanes, v);
    }
    x += t.step;
    out += kPanel;
  }
}

template <int kNorm, int64_t kActivation>
FB_INLINE void panel_with(const Panel& t) {
  if (t.channels == kPanel) return whole_panel<kNorm, kActivation>(t);
  const float* x = t.x;
  float* out = t.out;
  for (int64_t i = 0; i < t.pixels; ++i, x += t.step, out += kPanel) {
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      V v = part.load(x + c);
      if constexpr (kNorm > 1) v = vsub(v, part.load(t.norm.mean + c));
      if constexpr (kNorm > 0) {
        V sum = part.load(t.norm.bias + c);
        vfma_into(sum, v, part.load(t.norm.scale + c));
        v = vclip(sum, kActivation);
      }
      vstore(out + c, v);
    });
  }
}

void panel_of(const Panel& t) {
  if (t.norm.scale == nullptr) return panel_with<0, fb::kNone>(t);
  by_activation(t.norm.activation, [&](auto activation) __attribute__((always_inline)) {
    t.norm.mean == nullptr ? panel_with<1, activation.value>(t) : panel_with<2, activation.value>(t);
  });
}

void rows_of(const Rows& t) {
  const Part<true> part{static_cast<int>(t.rows)};
  for (int64_t i = 0; i < t.pixels; ++i) vstore(t.out + i * t.rows, part.load(t.dy + i * t.step));
}

}  // namespace

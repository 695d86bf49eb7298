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
      for (int j = 0; j < kPanel; j += 16) vprefetch_write(t.y + m * t.y_stride + j);
  }
  const float *a = t.a, *b = t.b, *next_dy = t.next_dy, *next_x = t.next_x;
  for (int64_t p = 0; p < t.depth; ++p) {
    vprefetch_l2(next_dy);
    vprefetch_l2(next_x);
    next_dy += 16;
    next_x += 16;
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
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    float* const y = t.y + m * t.y_stride;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const int64_t left = t.columns - j * kLanes;
      if (left >= kLanes) {
        vstore(y + j * kLanes, t.add ? vadd(vload(y + j * kLanes), acc[m][j]) : acc[m][j]);
      } else if (left > 0) {
        const Part<true> part{static_cast<int>(left)};
        part.store(y + j * kLanes, t.add ? vadd(part.load(y + j * kLanes), acc[m][j]) : acc[m][j]);
      }
    }
  }
}

template <int64_t kActivation>
FB_INLINE void normed_panel(const Panel& t) {
  float* out = t.out;
  const float* x = t.x;
  for (int64_t i = 0; i < t.pixels; ++i, x += t.step, out += kPanel) {
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      V v = part.load(t.norm.bias + c);
      vfma_into(v, vsub(part.load(x + c), part.load(t.norm.mean + c)), part.load(t.norm.scale + c));
      vstore(out + c, vclip(v, kActivation));
    });
  }
}

void panel_of(const Panel& t) {
  if (t.norm.mean == nullptr) {
    float* out = t.out;
    const float* x = t.x;
    for (int64_t i = 0; i < t.pixels; ++i, x += t.step, out += kPanel) {
      for_vectors(t.channels,
                  [&](int64_t c, const auto& part) __attribute__((always_inline)) { vstore(out + c, part.load(x + c)); });
    }
    return;
  }
  by_activation(t.norm.activation, [&](auto activation) __attribute__((always_inline)) { normed_panel<activation.value>(t); });
}

void rows_of(const Rows& t) {
  const Part<true> part{static_cast<int>(t.rows)};
  for (int64_t i = 0; i < t.pixels; ++i) vstore(t.out + i * t.rows, part.load(t.dy + i * t.step));
}

}  // namespace

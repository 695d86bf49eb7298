// One register tile: kRows output pixels x kVectors vectors of output channels.
//
//   y[m, :] = act( (sum_k a[m, k] b[k, :] * scale + bias) * gate + residual[m, :] )
//
//   for segment                    a run of k; the runs of one pixel: C floats (1x1), S*C floats per filter row (k x k)
//     for k in segment             one row of b from the packed panel, kRows broadcasts, kRows * kVectors products
//   after every block of products  total += partial, partial = 0
//
// Registers, AVX-512: 14 x 2 accumulators + 2 of b + 1 broadcast = 31 of 32.  AVX2: 6 x 2 + 2 + 1 = 15 of 16.
// A panel with half of its columns or fewer (the last of k = 48, groups of 14 channels) takes tiles of one vector: 1.5 times as fast.
// `vproduct_into`, which the including file names, is an fma, or the sum of two products where a word is a pair of bfloat16.
// Rows are addressed from every third row's pointer (x86 scales an index by 1 and 2): 14 rows need 5 pointers.
#pragma once

#include "../simd/activation.h"
#include "conv2d.h"

namespace {

using fb::conv2d::Segment;
using fb::conv2d::Tile;

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kPrefetchSteps = 16;

template <int kRows, int kUsed>
struct Accumulators {
  V v[kRows][kUsed];
};

template <int kRows, int kUsed>
FB_INLINE void multiply(Accumulators<kRows, kUsed>& acc, const float* a, int64_t stride, const float*& b, const float*& next_b, const float*& next_a, int64_t length) {
  constexpr int kBases = (kRows + 2) / 3;
  const float* base[kBases];
#pragma GCC unroll 8
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * stride;
  // Not unrolled: 28 fma hide the 8 scalar instructions, and GCC spills accumulators in the unrolled form.
  for (int64_t k = 0; k < length; ++k) {
    asm volatile("" ::: "memory");  // the next step's loads must not move up: there is one register to spare
    V row[kUsed];
#pragma GCC unroll 4
    for (int j = 0; j < kUsed; ++j) row[j] = vload(b + j * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j * 16 < kUsed * kLanes; ++j) vprefetch(b + kPrefetchSteps * kPanel + j * 16);
    vprefetch_l2(next_b);
    vprefetch_l2(next_a);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const V x = vbroadcast(base[m / 3][(m % 3) * stride]);
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) vproduct_into(acc.v[m][j], x, row[j]);
    }
    b += kPanel;
    next_b += 16;
    next_a += 16;
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) base[i] += 1;
  }
}

// Vector j of a row of `columns` values: whole, cut or absent.
template <bool kFull>
FB_INLINE V load_columns(const float* row, int j, int64_t columns) {
  const int64_t left = columns - j * kLanes;
  if (kFull || left >= kLanes) return vload(row + j * kLanes);
  return left > 0 ? vload_tail(row + j * kLanes, static_cast<int>(left)) : vzero();
}

template <bool kFull>
FB_INLINE void store_columns(float* row, int j, int64_t columns, V v) {
  const int64_t left = columns - j * kLanes;
  if (kFull || left >= kLanes) {
    vstore(row + j * kLanes, v);
  } else if (left > 0) {
    vstore_tail(row + j * kLanes, v, static_cast<int>(left));
  }
}

// Scale, bias, gate, residual, activation, store: one pass over the accumulators each, so that a tile decides once and not 28 times.
template <bool kFull, int kRows, int kUsed>
FB_INLINE void finish(const Tile& t, Accumulators<kRows, kUsed>& acc) {
  const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) body(m, j, acc.v[m][j]);
  };
  if (t.scale != nullptr) {
    V scale[kUsed];
#pragma GCC unroll 4
    for (int j = 0; j < kUsed; ++j) scale[j] = load_columns<kFull>(t.scale, j, t.columns);
    each([&](int, int j, V& v) __attribute__((always_inline)) { v = vmul(v, scale[j]); });
  }
  if (t.bias != nullptr) {
    V bias[kUsed];
#pragma GCC unroll 4
    for (int j = 0; j < kUsed; ++j) bias[j] = load_columns<kFull>(t.bias, j, t.columns);
    each([&](int, int j, V& v) __attribute__((always_inline)) { v = vadd(v, bias[j]); });
  }
  if (t.gate != nullptr) {
    V gate[kUsed];
#pragma GCC unroll 4
    for (int j = 0; j < kUsed; ++j) gate[j] = load_columns<kFull>(t.gate, j, t.columns);
    each([&](int, int j, V& v) __attribute__((always_inline)) { v = vmul(v, gate[j]); });
  }
  if (t.residual != nullptr) {
    each([&](int m, int j, V& v) __attribute__((always_inline)) {
      v = vadd(v, load_columns<kFull>(t.residual + m * t.residual_stride, j, t.columns));
    });
  }
  if (t.activation != fb::kNone) {
    each([&](int, int, V& v) __attribute__((always_inline)) { v = vrelu(v); });
    if (t.activation == fb::kRelu6) each([&](int, int, V& v) __attribute__((always_inline)) { v = vcap6(v); });
  }
  each([&](int m, int j, V& v) __attribute__((always_inline)) { store_columns<kFull>(t.y + m * t.y_stride, j, t.columns, v); });
}

// Only the first kUsed vectors of the panel. Fetching the lines of y and of the residual here, before the products, gained nothing.
template <int kRows, int kUsed>
void tile(const Tile& t) {
  Accumulators<kRows, kUsed> acc;
  const auto clear = [&] {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) acc.v[m][j] = vzero();
  };
  float total[kRows * kUsed * kLanes];
  bool have_total = false;
  const float* b = t.b;
  const float* a = t.a;
  const float* next_b = t.next_b;
  const float* next_a = t.next_a;
  clear();
  for (int64_t i = 0; i < t.segment_count; ++i) {
    const Segment segment = t.segments[i];
    multiply(acc, a + segment.offset, t.a_stride, b, next_b, next_a, segment.length);
    if (segment.block_end && (have_total || i + 1 < t.segment_count)) {
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < kUsed; ++j) {
          float* slot = total + (m * kUsed + j) * kLanes;
          if (have_total) acc.v[m][j] = vadd(vload(slot), acc.v[m][j]);
          if (i + 1 < t.segment_count) vstore(slot, acc.v[m][j]);
        }
      if (i + 1 < t.segment_count) clear();
      have_total = true;
    }
  }
  if (t.columns == kUsed * kLanes) {
    finish<true>(t, acc);
  } else {
    finish<false>(t, acc);
  }
}

}  // namespace

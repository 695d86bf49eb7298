// One output row of a convolution of few channels from planes: vectors run over pixels, where a pixel's channels would leave most lanes
// empty.
//
//   for 2 vectors of pixels
//     for tap (r, s, c)              2 loads, kChannels broadcasts, 2 * kChannels fma
//     bias, activation
//     pixels of kChannels floats     4x4 transposes inside the 128-bit parts of a vector
//
// The order of the products is that of a tile (generic.h), and so are the bits. Included after a vector header.
#pragma once

#include <cstring>
#include <utility>

#include "../simd/activation.h"
#include "conv2d.h"

namespace {

using fb::conv2d::PlanarRow;

constexpr int kParts = kLanes / 4;
typedef float Quad __attribute__((vector_size(16)));

// Elements two by two (kWidth 1) or pairs two by two (kWidth 2) from a and b, of the lower or the upper half of each 128-bit part.
template <int kWidth, bool kUpper>
constexpr int unpacked(int lane) {
  const int within = lane % 4, from = within / kWidth % 2;
  const int source = lane / 4 * 4 + (kUpper ? 2 : 0) + (kWidth == 1 ? within / 2 : within % 2);
  return source + from * kLanes;
}

template <int kWidth, bool kUpper, int... kLane>
FB_INLINE V unpack(V a, V b, std::integer_sequence<int, kLane...>) {
  return (V)__builtin_shufflevector(a, b, unpacked<kWidth, kUpper>(kLane)...);
}

template <int kWidth, bool kUpper>
FB_INLINE V unpack(V a, V b) {
  return unpack<kWidth, kUpper>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// out[j], part i: the values of four rows at pixel 4 i + j.
FB_INLINE void transpose_parts(const V (&rows)[4], V (&out)[4]) {
  const V low0 = unpack<1, false>(rows[0], rows[1]), high0 = unpack<1, true>(rows[0], rows[1]);
  const V low1 = unpack<1, false>(rows[2], rows[3]), high1 = unpack<1, true>(rows[2], rows[3]);
  out[0] = unpack<2, false>(low0, low1);
  out[1] = unpack<2, true>(low0, low1);
  out[2] = unpack<2, false>(high0, high1);
  out[3] = unpack<2, true>(high0, high1);
}

template <int kPart>
FB_INLINE Quad part_of(V v) {
  if constexpr (kParts == 1) {
    return (Quad)v;
  } else {
    return __builtin_shufflevector(v, v, 4 * kPart, 4 * kPart + 1, 4 * kPart + 2, 4 * kPart + 3);
  }
}

// kCount rows (at most 4) of kLanes pixels become `pixels` pixels of kCount floats, ld apart.
template <int kCount, int... kPart>
FB_INLINE void store_transposed(const V (&rows)[4], float* y, int64_t ld, int64_t pixels, std::integer_sequence<int, kPart...>) {
  V columns[4];
  transpose_parts(rows, columns);
  const auto store = [&](int64_t pixel, Quad quad) __attribute__((always_inline)) {
    if (pixel < pixels) std::memcpy(y + pixel * ld, &quad, kCount * sizeof(float));
  };
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) (store(4 * kPart + j, part_of<kPart>(columns[j])), ...);
}

template <int kChannels, int kFirst, int kVectors>
FB_INLINE void store_pixels(const V (&acc)[kChannels][kVectors], int vector, float* y, int64_t ld, int64_t pixels) {
  constexpr int kCount = kChannels - kFirst < 4 ? kChannels - kFirst : 4;
  V rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) rows[i] = i < kCount ? acc[kFirst + (i < kCount ? i : 0)][vector] : vzero();
  store_transposed<kCount>(rows, y + kFirst, ld, pixels, std::make_integer_sequence<int, kParts>{});
}

template <int kChannels>
void planar_row(const PlanarRow& t) {
  constexpr int kRegisters = kLanes == 16 ? 32 : 16;
  constexpr int kVectors = 2 * kChannels + 3 <= kRegisters ? 2 : 1;
  for (int64_t q = 0; q < t.pixels; q += kVectors * kLanes) {
    V acc[kChannels][kVectors];
#pragma GCC unroll 8
    for (int k = 0; k < kChannels; ++k)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) acc[k][j] = vzero();
    const float* weight = t.weight;
    for (int64_t i = 0; i < t.taps; ++i, weight += t.ldw) {
      const float* x = t.x + t.offsets[i] + q;
      V v[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) v[j] = vload(x + j * kLanes);
#pragma GCC unroll 8
      for (int k = 0; k < kChannels; ++k) {
        const V w = vbroadcast(weight[k]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) vfma_into(acc[k][j], v[j], w);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kChannels; ++k) {
      const V scale = vbroadcast(t.scale != nullptr ? t.scale[k] : 1.0f);
      const V bias = vbroadcast(t.bias != nullptr ? t.bias[k] : 0.0f);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        if (t.scale != nullptr) acc[k][j] = vmul(acc[k][j], scale);
        if (t.bias != nullptr) acc[k][j] = vadd(acc[k][j], bias);
        acc[k][j] = vclip(acc[k][j], t.activation);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const int64_t pixel = q + j * kLanes, left = t.pixels - pixel;
      if (left <= 0) break;
      float* y = t.y + pixel * t.ldy;
      const auto store = [&](int64_t pixels) __attribute__((always_inline)) {
        store_pixels<kChannels, 0>(acc, j, y, t.ldy, pixels);
        if constexpr (kChannels > 4) store_pixels<kChannels, 4>(acc, j, y, t.ldy, pixels);
      };
      if (left >= kLanes) {
        store(kLanes);
      } else {
        store(left);
      }
    }
  }
}

void (*const planar_rows[])(const PlanarRow&) = {nullptr,       planar_row<1>, planar_row<2>, planar_row<3>, planar_row<4>,
                                                 planar_row<5>, planar_row<6>, planar_row<7>, planar_row<8>};

}  // namespace

// Local response normalisation of pixels.
//
//   for block of 8 pixels
//     squares of all channels, between zeros       [8][size/2 zeros | channels | zeros]
//     for pixel, for vector of channels            sum of `size` loads one float apart; two roots and a division
//
// Squares are written for several pixels before the first is read: a load that overlaps two stores still on their way would wait.
// x^0.75 is sqrt(x) * sqrt(sqrt(x)): roots are exact to half a unit on every instruction set, so the bits are the same.
#pragma once

#include "local_response_norm.h"

namespace {

using fb::local_response_norm::kBlock;
using fb::local_response_norm::Pixels;
using fb::local_response_norm::Root;

// Writes whole vectors: lanes past the channels get the zeros that belong there.
FB_INLINE void make_squares(const float* x, int64_t channels, float* out) {
  for_vectors(channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    const V v = part.load(x + c);
    vstore(out + c, vmul(v, v));
  });
}

template <Root kRoot>
FB_INLINE V divided(V x, V t) {
  if constexpr (kRoot == fb::local_response_norm::kOne) return vdiv(x, t);
  const V root = vsqrt(t);
  if constexpr (kRoot == fb::local_response_norm::kHalf) return vdiv(x, root);
  return vdiv(x, vmul(root, vsqrt(root)));
}

// squares: of the first channel of the window of channel 0.
template <Root kRoot>
FB_INLINE void normalise(const Pixels& t, const float* x, const float* squares, float* y) {
  for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    V sum = vload(squares + c);
    for (int64_t i = 1; i < t.size; ++i) sum = vadd(sum, vload(squares + c + i));
    V base = vbroadcast(t.offset);
    vfma_into(base, sum, vbroadcast(t.factor));
    part.store(y + c, divided<kRoot>(part.load(x + c), base));
  });
}

template <Root kRoot>
void pixels(const Pixels& t) {
  const int64_t before = t.size / 2;
  for (int64_t i = 0; i < kBlock; ++i) {
    float* row = t.squares + i * t.pitch;
    for (int64_t j = 0; j < before; ++j) row[j] = 0.0f;
    for (int64_t j = before + t.channels; j < t.pitch; ++j) row[j] = 0.0f;
  }
  for (int64_t first = 0; first < t.count; first += kBlock) {
    const int64_t count = t.count - first < kBlock ? t.count - first : kBlock;
    for (int64_t i = 0; i < count; ++i) make_squares(t.x + (first + i) * t.ldx, t.channels, t.squares + i * t.pitch + before);
    for (int64_t i = 0; i < count; ++i)
      normalise<kRoot>(t, t.x + (first + i) * t.ldx, t.squares + i * t.pitch, t.y + (first + i) * t.ldy);
  }
}

}  // namespace

#define FB_LOCAL_RESPONSE_NORM_KERNELS \
  {pixels<fb::local_response_norm::kHalf>, pixels<fb::local_response_norm::kThreeQuarters>, pixels<fb::local_response_norm::kOne>}

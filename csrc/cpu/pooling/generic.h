// Pooling of whole pixels: vectors run over channels, the window is a list of pixels.
#pragma once

#include "pooling.h"

namespace {

using fb::pooling::MaxGradientRow;
using fb::pooling::Mean;
using fb::pooling::Windows;

constexpr int kMeanLevels = 3;  // parts of 512 pixels at the top

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

FB_INLINE V bytes_as_floats(const uint8_t* p, int count) {
  Bytes bytes{};
  __builtin_memcpy(&bytes, p, static_cast<size_t>(count));
  return (V)__builtin_convertvector(bytes, Floats);
}

FB_INLINE void floats_as_bytes(uint8_t* p, V v, int count) {
  const Bytes bytes = __builtin_convertvector((Floats)v, Bytes);
  __builtin_memcpy(p, &bytes, static_cast<size_t>(count));
}

template <bool kTaps>
FB_INLINE void windows_of(const Windows& t) {
  for (int64_t q = 0; q < t.pixels; ++q) {
    const int64_t ahead = q * t.step;
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      V acc = part.load(t.x[0] + ahead + c), tap = vbroadcast(static_cast<float>(t.tap[0]));
      for (int64_t i = 1; i < t.count; ++i) {
        const V x = part.load(t.x[i] + ahead + c);
        if constexpr (kTaps) {
          const uint32_t takes = (vnot_at_most(x, acc) & ~vnot_at_most(acc, acc)) | vnot_at_most(x, x);
          tap = vadd(vkeep(takes, vbroadcast(static_cast<float>(t.tap[i]))), vkeep(~takes, tap));
        }
        acc = vmax_nan(acc, x);
      }
      part.store(t.y + q * t.ldy + c, acc);
      if constexpr (kTaps) floats_as_bytes(t.taps + q * t.channels + c, tap, part.left);
    });
  }
}

void windows(const Windows& t) { t.taps != nullptr ? windows_of<true>(t) : windows_of<false>(t); }

void max_gradient_row(const MaxGradientRow& t) {
  for (int64_t w = 0; w < t.width; ++w) {
    const int64_t column = w + t.pad, first = column - t.columns_of_window + 1;
    const int64_t begin = first <= 0 ? 0 : (first + t.stride - 1) / t.stride, last = column / t.stride;
    const int64_t end = last + 1 < t.q ? last + 1 : t.q;
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      V sum = vzero();
      for (int64_t i = 0; i < t.rows; ++i) {
        for (int64_t q = begin; q < end; ++q) {
          const V tap = vbroadcast(static_cast<float>(t.r[i] * t.columns_of_window + column - q * t.stride));
          const V found = bytes_as_floats(t.taps[i] + q * t.channels + c, part.left);
          const uint32_t others = vnot_at_most(found, tap) | vnot_at_least(found, tap);
          sum = vadd(sum, vkeep(~others, part.load(t.dy[i] + q * t.ldg + c)));
        }
      }
      part.store(t.dx + w * t.channels + c, sum);
    });
  }
}

template <int kCount>
FB_INLINE void clear(V (&values)[kCount]) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) values[i] = vzero();
}

// Sums of 8 pixels, of 8 such sums, and so on: every value goes through few additions, as in PyTorch's own cascade, however many
// pixels there are. kVectors vectors of channels at once hide the latency of the additions; fill(i, values) loads pixel i.
template <int kLevel, int kVectors, typename Fill>
FB_INLINE void cascade(const Fill& fill, int64_t begin, int64_t end, V (&sum)[kVectors]) {
  constexpr int64_t kStep = int64_t{1} << (3 * kLevel);  // pixels of a part
  for (int64_t i = begin; i < end; i += kStep) {
    V part[kVectors];
    clear(part);
    if constexpr (kLevel == 0) {
      fill(i, part);
    } else {
      cascade<kLevel - 1, kVectors>(fill, i, i + kStep < end ? i + kStep : end, part);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[j] = i == begin ? part[j] : vadd(sum[j], part[j]);
  }
}

// Calls body(c, vectors, part) for runs of 4 vectors, then for single ones; `vectors` is a constant of its type.
template <int kVectors>
struct Vectors {};

template <typename Body>
FB_INLINE void for_runs(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) body(c, Vectors<4>{}, Part<false>{kLanes});
  for_vectors(channels - c, [&](int64_t rest, const auto& part) __attribute__((always_inline)) { body(c + rest, Vectors<1>{}, part); });
}

template <int kVectors, typename AnyPart>
FB_INLINE void mean_vectors(const Mean& t, int64_t c, Vectors<kVectors>, const AnyPart& part) {
  V sum[kVectors];
  clear(sum);
  const auto fill = [&](int64_t i, V (&values)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) values[j] = part.load(t.x + i * t.stride + c + j * kLanes);
  };
  cascade<kMeanLevels, kVectors>(fill, 0, t.count, sum);
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) part.store(t.y + c + j * kLanes, vdiv(sum[j], vbroadcast(static_cast<float>(t.count))));
}

void mean(const Mean& t) {
  for_runs(t.channels, [&](int64_t c, auto vectors, const auto& part) __attribute__((always_inline)) { mean_vectors(t, c, vectors, part); });
}

}  // namespace

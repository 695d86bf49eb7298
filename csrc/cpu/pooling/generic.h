// Pooling of whole pixels: vectors run over channels, the window is a list of pixels.
#pragma once

#include "pooling.h"

namespace {

using fb::pooling::Mean;
using fb::pooling::Windows;

constexpr int kMeanLevels = 3;  // parts of 512 pixels at the top

void windows(const Windows& t) {
  for (int64_t q = 0; q < t.pixels; ++q) {
    const int64_t ahead = q * t.step;
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      V acc = part.load(t.x[0] + ahead + c);
      for (int64_t i = 1; i < t.count; ++i) acc = vmax_nan(acc, part.load(t.x[i] + ahead + c));
      part.store(t.y + q * t.ldy + c, acc);
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

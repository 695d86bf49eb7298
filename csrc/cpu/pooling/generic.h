// Pooling of whole pixels: vectors run over channels, the window is a list of pixels.
#pragma once

#include "pooling.h"

namespace {

using fb::pooling::Mean;
using fb::pooling::Window;

constexpr int kMeanLevels = 3;  // parts of 512 pixels at the top

void window(const Window& t) {
  int64_t c = 0;
  for (; c + kLanes <= t.channels; c += kLanes) {
    V acc = vload(t.x[0] + c);
    for (int64_t i = 1; i < t.count; ++i) acc = vmax_nan(acc, vload(t.x[i] + c));
    vstore(t.y + c, acc);
  }
  if (c < t.channels) {
    const int left = static_cast<int>(t.channels - c);
    V acc = vload_tail(t.x[0] + c, left);
    for (int64_t i = 1; i < t.count; ++i) acc = vmax_nan(acc, vload_tail(t.x[i] + c, left));
    vstore_tail(t.y + c, acc, left);
  }
}

// Sums of 8 pixels, of 8 such sums, and so on: every value goes through few additions, as in PyTorch's own cascade, however many
// pixels there are. kVectors vectors of channels at once hide the latency of the additions.
template <int kLevel, int kVectors, typename Load>
FB_INLINE void cascade(const Load& load, int64_t begin, int64_t end, V (&sum)[kVectors]) {
  constexpr int64_t kStep = int64_t{1} << (3 * kLevel);  // pixels of a part
  for (int64_t i = begin; i < end; i += kStep) {
    V part[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) part[j] = vzero();
    if constexpr (kLevel == 0) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) part[j] = load(i, j);
    } else {
      cascade<kLevel - 1, kVectors>(load, i, i + kStep < end ? i + kStep : end, part);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[j] = i == begin ? part[j] : vadd(sum[j], part[j]);
  }
}

template <int kVectors>
FB_INLINE void mean_vectors(const Mean& t, int64_t c) {
  V sum[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) sum[j] = vzero();
  cascade<kMeanLevels, kVectors>([&](int64_t i, int j) __attribute__((always_inline)) { return vload(t.x + i * t.stride + c + j * kLanes); }, 0,
                                 t.count, sum);
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) vstore(t.y + c + j * kLanes, vdiv(sum[j], vbroadcast(static_cast<float>(t.count))));
}

void mean(const Mean& t) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= t.channels; c += 4 * kLanes) mean_vectors<4>(t, c);
  for (; c + kLanes <= t.channels; c += kLanes) mean_vectors<1>(t, c);
  if (c < t.channels) {
    const int left = static_cast<int>(t.channels - c);
    V sum[1] = {vzero()};
    cascade<kMeanLevels, 1>([&](int64_t i, int) __attribute__((always_inline)) { return vload_tail(t.x + i * t.stride + c, left); }, 0, t.count, sum);
    vstore_tail(t.y + c, vdiv(sum[0], vbroadcast(static_cast<float>(t.count))), left);
  }
}

}  // namespace

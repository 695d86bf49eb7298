// Pooling of whole pixels: vectors run over channels, the window is a list of pixels.
#pragma once

#include "pooling.h"

namespace {

using fb::pooling::Mean;
using fb::pooling::Window;

constexpr int64_t kMeanBlock = 512;

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

// kVectors vectors of channels at once hide the latency of the additions.
template <int kVectors>
FB_INLINE void mean_vectors(const Mean& t, int64_t c) {
  V total[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) total[j] = vzero();
  const V count = vbroadcast(static_cast<float>(t.count));
  for (int64_t begin = 0; begin < t.count; begin += kMeanBlock) {
    const int64_t end = begin + kMeanBlock < t.count ? begin + kMeanBlock : t.count;
    V acc[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[j] = vload(t.x + begin * t.stride + c + j * kLanes);
    for (int64_t i = begin + 1; i < end; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[j] = vadd(acc[j], vload(t.x + i * t.stride + c + j * kLanes));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) total[j] = begin == 0 ? acc[j] : vadd(total[j], acc[j]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) vstore(t.y + c + j * kLanes, vdiv(total[j], count));
}

void mean(const Mean& t) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= t.channels; c += 4 * kLanes) mean_vectors<4>(t, c);
  for (; c + kLanes <= t.channels; c += kLanes) mean_vectors<1>(t, c);
  if (c < t.channels) {
    const int left = static_cast<int>(t.channels - c);
    V total = vzero();
    for (int64_t begin = 0; begin < t.count; begin += kMeanBlock) {
      const int64_t end = begin + kMeanBlock < t.count ? begin + kMeanBlock : t.count;
      V acc = vload_tail(t.x + begin * t.stride + c, left);
      for (int64_t i = begin + 1; i < end; ++i) acc = vadd(acc, vload_tail(t.x + i * t.stride + c, left));
      total = begin == 0 ? acc : vadd(total, acc);
    }
    vstore_tail(t.y + c, vdiv(total, vbroadcast(static_cast<float>(t.count))), left);
  }
}

}  // namespace

// Layer normalisation of pixels: two passes of sums in double, eight partial sums each, so that every instruction set gives the same
// bits; then one of floats. The compiler makes vectors of the loops.
#pragma once

#include "layer_norm.h"

namespace {

using fb::layer_norm::Pixels;

constexpr int64_t kSums = 8;

FB_INLINE double total(const double* sums) {
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

FB_INLINE double mean_of(const float* x, int64_t channels) {
  double sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= channels; c += kSums)
    for (int64_t i = 0; i < kSums; ++i) sums[i] += static_cast<double>(x[c + i]);
  for (int64_t i = 0; c < channels; ++c, ++i) sums[i] += static_cast<double>(x[c]);
  return total(sums) / static_cast<double>(channels);
}

FB_INLINE double variance_of(const float* x, int64_t channels, double mean) {
  double sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= channels; c += kSums) {
    for (int64_t i = 0; i < kSums; ++i) {
      const double distance = static_cast<double>(x[c + i]) - mean;
      sums[i] += distance * distance;
    }
  }
  for (int64_t i = 0; c < channels; ++c, ++i) sums[i] += (static_cast<double>(x[c]) - mean) * (static_cast<double>(x[c]) - mean);
  return total(sums) / static_cast<double>(channels);
}

void pixels(const Pixels& t) {
  for (int64_t i = 0; i < t.count; ++i) {
    const float* x = t.x + i * t.ldx;
    float* y = t.y + i * t.ldy;
    const double mean = mean_of(x, t.channels);
    const float centre = static_cast<float>(mean),
                factor = static_cast<float>(1.0 / __builtin_sqrt(variance_of(x, t.channels, mean) + t.eps));
    if (t.scale != nullptr && t.shift != nullptr) {
      for (int64_t c = 0; c < t.channels; ++c) y[c] = (x[c] - centre) * factor * t.scale[c] + t.shift[c];
    } else if (t.scale != nullptr) {
      for (int64_t c = 0; c < t.channels; ++c) y[c] = (x[c] - centre) * factor * t.scale[c];
    } else {
      for (int64_t c = 0; c < t.channels; ++c) y[c] = (x[c] - centre) * factor;
    }
  }
}

}  // namespace

#define FB_LAYER_NORM_KERNELS {pixels}

// Weights [k, c/groups, r, s] to panels of output channels, [group][panel][(r, s, c) flattened][channel of the panel]; for bfloat16
// [group][panel][(r, s, pair of c) flattened][channel of the panel], each a word of two.
#include <algorithm>
#include <cstring>

#include "../ops.h"
#include "conv2d.h"

namespace fb {

namespace conv2d {

namespace {

int64_t packed_floats(int panel, int64_t depth, int64_t channels, int64_t groups) {
  return groups * round_up(channels / groups, panel) * depth;
}

// The upper half of a float32, rounded to nearest even; a NaN stays one.
uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace

float pair_word(float low, float high) {
  const uint32_t bits = bfloat16_bits(low) | bfloat16_bits(high) << 16;
  float word;
  std::memcpy(&word, &bits, 4);
  return word;
}

namespace {

// Filters are read as they lie, a few input channels of one panel at a time, so that what is written stays in L1.
void pack(int panel, const OpSpec& spec, const float* weight, float* out) {
  constexpr int64_t kChannels = 16;
  const int64_t channels = spec.k / spec.groups, depth_c = spec.c / spec.groups, taps = spec.r * spec.s;
  const int64_t panels = ceil_div(channels, panel), depth = depth_c * taps;
  parallel_for(spec.groups * panels, spec.k * depth, [&](int64_t index) {
    const int64_t group = index / panels, k0 = index % panels * panel;
    const int64_t width = std::min<int64_t>(panel, channels - k0);
    const float* filters = weight + (group * channels + k0) * depth;
    float* target = out + index * depth * panel;
    if (width < panel) std::fill(target, target + depth * panel, 0.0f);
    for (int64_t c0 = 0; c0 < depth_c; c0 += kChannels) {
      const int64_t c1 = std::min(c0 + kChannels, depth_c);
      for (int64_t j = 0; j < width; ++j) {
        const float* filter = filters + j * depth;
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t tap = 0; tap < taps; ++tap) target[(tap * depth_c + c) * panel + j] = filter[c * taps + tap];
      }
    }
  });
}

void pack_pairs(int panel, const OpSpec& spec, const float* weight, float* out) {
  const int64_t channels = spec.k / spec.groups, depth_c = spec.c / spec.groups, taps = spec.r * spec.s;
  const int64_t pairs = ceil_div(depth_c, 2), panels = ceil_div(channels, panel);
  parallel_for(spec.groups * panels, spec.k * depth_c * taps, [&](int64_t index) {
    const int64_t group = index / panels, k0 = index % panels * panel;
    const int64_t width = std::min<int64_t>(panel, channels - k0);
    float* target = out + index * taps * pairs * panel;
    if (width < panel) std::fill(target, target + taps * pairs * panel, 0.0f);
    for (int64_t j = 0; j < width; ++j) {
      const float* filter = weight + (group * channels + k0 + j) * depth_c * taps;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const float* low = filter + 2 * pair * taps;
        const bool both = 2 * pair + 1 < depth_c;
        for (int64_t tap = 0; tap < taps; ++tap) target[(tap * pairs + pair) * panel + j] = pair_word(low[tap], both ? low[taps + tap] : 0.0f);
      }
    }
  });
}

}  // namespace

}  // namespace conv2d

int64_t conv2d_packed_floats(const OpSpec& spec) {
  const conv2d::Kernels& kernels = conv2d::kernels(spec);
  return conv2d::packed_floats(kernels.panel, spec.r * spec.s * conv2d::words(kernels, spec.c / spec.groups), spec.k, spec.groups);
}

void conv2d_pack(const OpSpec& spec, const float* weight, float* out) {
  const conv2d::Kernels& kernels = conv2d::kernels(spec);
  (kernels.channels_per_word == 2 ? conv2d::pack_pairs : conv2d::pack)(kernels.panel, spec, weight, out);
}

}  // namespace fb

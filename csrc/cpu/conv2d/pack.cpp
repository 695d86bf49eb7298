// Weights [k, c/groups, r, s] to panels of output channels, [group][panel][(r, s, c) flattened][channel of the panel].
#include <algorithm>

#include "../ops.h"
#include "conv2d.h"

namespace fb {

namespace conv2d {

namespace {

int64_t packed_floats(int panel, int64_t depth, int64_t channels, int64_t groups) {
  return groups * round_up(channels / groups, panel) * depth;
}

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

}  // namespace

}  // namespace conv2d

int64_t conv2d_packed_floats(const OpSpec& spec) {
  return conv2d::packed_floats(conv2d::kernels(isa()).panel, spec.r * spec.s * (spec.c / spec.groups), spec.k, spec.groups);
}

void conv2d_pack(const OpSpec& spec, const float* weight, float* out) { conv2d::pack(conv2d::kernels(isa()).panel, spec, weight, out); }

}  // namespace fb

// What is read is scaled, shifted and activated before it is multiplied. Included after a vector header.
#pragma once

#include "../simd/activation.h"
#include "../simd/part.h"

namespace {

// Calls body(changed), where changed(x, c, part) is activation(x * scale + shift) of one vector of channels.
template <typename Body>
FB_INLINE void with_change(const float* scale, const float* shift, int64_t activation, const Body& body) {
  const auto scaled = [&](const float* x, int64_t c, const auto& part) __attribute__((always_inline)) {
    const V v = part.load(x + c);
    if (scale == nullptr) return v;
    V sum = part.load(shift + c);
    vfma_into(sum, v, part.load(scale + c));
    return sum;
  };
  if (activation == fb::kRelu) {
    body([&](const float* x, int64_t c, const auto& part) __attribute__((always_inline)) { return vrelu(scaled(x, c, part)); });
  } else {
    body([&](const float* x, int64_t c, const auto& part) __attribute__((always_inline)) { return vactivate(scaled(x, c, part), activation); });
  }
}

// See Kernels::change.
[[maybe_unused]] void change(const float* x, int64_t step, int64_t pixels, int64_t channels, const float* scale, const float* shift,
                             int64_t activation, float* out, int64_t out_step) {
  with_change(scale, shift, activation, [&](const auto& changed) __attribute__((always_inline)) {
    for (int64_t i = 0; i < pixels; ++i, x += step, out += out_step)
      for_vectors(channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) { part.store(out + c, changed(x, c, part)); });
  });
}

}  // namespace

// Scale, shift, gate, residual and activation of pixels, one vector of channels after the other: bound by memory.
// Scaling and shifting round once together (a multiply-add), the gate and the residual once each.
#pragma once

#include "affine.h"

namespace {

using fb::affine::Pixels;

template <int64_t kActivation, typename AnyPart>
FB_INLINE V transformed(const Pixels& t, const float* x, const float* residual, int64_t c, const AnyPart& part) {
  V v = part.load(x + c);
  if (t.scale != nullptr) {
    if (t.shift != nullptr) {
      V sum = part.load(t.shift + c);
      vfma_into(sum, v, part.load(t.scale + c));
      v = sum;
    } else {
      v = vmul(v, part.load(t.scale + c));
    }
  } else if (t.shift != nullptr) {
    v = vadd(v, part.load(t.shift + c));
  }
  if (t.gate != nullptr) v = vmul(v, part.load(t.gate + c));
  if (residual != nullptr) v = vadd(v, part.load(residual + c));
  return vactivate(v, kActivation);
}

template <int64_t kActivation>
void pixels(const Pixels& t) {
  for (int64_t i = 0; i < t.count; ++i) {
    const float* x = t.x + i * t.ldx;
    const float* residual = t.residual != nullptr ? t.residual + i * t.ldr : nullptr;
    float* y = t.y + i * t.ldy;
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      part.store(y + c, transformed<kActivation>(t, x, residual, c, part));
    });
  }
}

}  // namespace

#define FB_AFFINE_KERNELS \
  { pixels<fb::kNone>, pixels<fb::kRelu>, pixels<fb::kRelu6>, pixels<fb::kSigmoid>, pixels<fb::kTanh>, pixels<fb::kSilu>, pixels<fb::kHardsigmoid>, \
    pixels<fb::kHardswish>, pixels<fb::kGelu>, pixels<fb::kGeluTanh> }

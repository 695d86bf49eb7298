// What both forms do with a vector of finished outputs, and their table.
#pragma once

#include "../simd/activation.h"
#include "winograd_conv2d.h"

namespace {

using fb::winograd_conv2d::InputTile;
using fb::winograd_conv2d::OutputTile;

// Runs body(offset, lanes) over `count` floats, a vector at a time; fewer lanes than a vector only at the end.
template <typename Body>
FB_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

FB_INLINE V vload_some(const float* p, int count) { return count == kLanes ? vload(p) : vload_tail(p, count); }
FB_INLINE void vstore_some(float* p, V v, int count) {
  if (count == kLanes) {
    vstore(p, v);
  } else {
    vstore_tail(p, v, count);
  }
}

// Bias, residual and activation on the way to memory; nothing for pixels outside the image.
template <int kOutputs>
FB_INLINE void finish_outputs(const OutputTile& tile, const V (&out)[kOutputs], int64_t j, int count) {
  const V bias = tile.bias != nullptr ? vload_some(tile.bias + j, count) : vzero();
#pragma GCC unroll 16
  for (int i = 0; i < kOutputs; ++i) {
    if (tile.y[i] == nullptr) continue;
    V v = vadd(out[i], bias);
    if (tile.residual[i] != nullptr) v = vadd(v, vload_some(tile.residual[i] + j, count));
    vstore_some(tile.y[i] + j, vclip(v, tile.activation), count);
  }
}

}  // namespace

#include "transforms_2x2.h"
#include "transforms_4x4.h"

#define FB_WINOGRAD_KERNELS \
  { {input_transform_2x2, output_transform_2x2}, {input_transform_4x4, output_transform_4x4} }

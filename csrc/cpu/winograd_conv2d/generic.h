// What all forms do with a vector of finished outputs, and their table.
#pragma once

#include "../simd/activation.h"
#include "../simd/part.h"
#include "winograd_conv2d.h"

namespace {

using fb::winograd_conv2d::InputTile;
using fb::winograd_conv2d::OutputTile;

// Scale, bias, residual and activation on the way to memory; nothing for pixels outside the image.
template <int kOutputs, typename P>
FB_INLINE void finish_outputs(const OutputTile& tile, const V (&out)[kOutputs], int64_t j, const P& part) {
  const V scale = tile.scale != nullptr ? part.load(tile.scale + j) : vzero();
  const V bias = tile.bias != nullptr ? part.load(tile.bias + j) : vzero();
  const auto finished = [&](int i) __attribute__((always_inline)) {
    const V v = vadd(tile.scale != nullptr ? vmul(out[i], scale) : out[i], bias);
    return tile.residual[i] != nullptr ? vadd(v, part.load(tile.residual[i] + j)) : v;
  };
  if (tile.activation > fb::kRelu6) {
    V done[kOutputs];
    for (int i = 0; i < kOutputs; ++i) done[i] = tile.y[i] != nullptr ? finished(i) : vzero();
    activate_vectors(done, kOutputs, tile.activation);
    for (int i = 0; i < kOutputs; ++i)
      if (tile.y[i] != nullptr) part.store(tile.y[i] + j, done[i]);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kOutputs; ++i)
    if (tile.y[i] != nullptr) part.store(tile.y[i] + j, vclip(finished(i), tile.activation));
}

}  // namespace

#include "transforms_2x2.h"
#include "transforms_6x6.h"
#include "transforms_4x4_real.h"
#include "transforms_line.h"

#define FB_WINOGRAD_KERNELS                                                                                      \
  {                                                                                                              \
    {input_transform_2x2, output_transform_2x2}, {input_transform_6x6, output_transform_6x6<4>},                 \
        {input_transform_4x4_real, output_transform_4x4_real}, {input_transform_6x6, output_transform_6x6<2>}, { \
      input_transform_line, output_transform_line                                                                \
    }                                                                                                            \
  }

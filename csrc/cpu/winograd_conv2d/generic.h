// V = B^T d B on a 4 x 4 input tile, Y = A^T M A to a 2 x 2 output tile, for a vector of channels at a time.
//
//        1  0 -1  0          1  1  1  0
//  B^T = 0  1  1  0    A^T = 0  1 -1 -1      additions and subtractions only: exact on integer-valued data
//        0 -1  1  0
//        0  1  0 -1
#pragma once

#include "../simd/activation.h"
#include "winograd_conv2d.h"

namespace {

using fb::winograd_conv2d::InputTile;
using fb::winograd_conv2d::OutputTile;

FB_INLINE void input_vector(const V (&d)[16], V (&out)[16]) {
  V t[16];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    t[x] = vsub(d[x], d[8 + x]);
    t[4 + x] = vadd(d[4 + x], d[8 + x]);
    t[8 + x] = vsub(d[8 + x], d[4 + x]);
    t[12 + x] = vsub(d[4 + x], d[12 + x]);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 16; y += 4) {
    out[y] = vsub(t[y], t[y + 2]);
    out[y + 1] = vadd(t[y + 1], t[y + 2]);
    out[y + 2] = vsub(t[y + 2], t[y + 1]);
    out[y + 3] = vsub(t[y + 1], t[y + 3]);
  }
}

void input_transform(const InputTile& tile) {
  V d[16], out[16];
  int64_t c = 0;
  for (; c + kLanes <= tile.channels; c += kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) d[i] = vload(tile.source[i] + c);
    input_vector(d, out);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) vstore(tile.v + i * tile.v_stride + c, out[i]);
  }
  if (c < tile.channels) {
    const int left = static_cast<int>(tile.channels - c);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) d[i] = vload_tail(tile.source[i] + c, left);
    input_vector(d, out);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) vstore_tail(tile.v + i * tile.v_stride + c, out[i], left);
  }
}

void output_transform(const OutputTile& tile) {
  const int64_t activation = tile.activation;
  for (int64_t j = 0; j < tile.columns; j += kLanes) {
    const int count = static_cast<int>(tile.columns - j < kLanes ? tile.columns - j : kLanes);
    V t[8], out[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const float* m = tile.m + x * tile.m_stride + j;
      const V m0 = vload(m), m1 = vload(m + 4 * tile.m_stride), m2 = vload(m + 8 * tile.m_stride), m3 = vload(m + 12 * tile.m_stride);
      t[x] = vadd(vadd(m0, m1), m2);
      t[4 + x] = vsub(vsub(m1, m2), m3);
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      out[2 * y] = vadd(vadd(t[4 * y], t[4 * y + 1]), t[4 * y + 2]);
      out[2 * y + 1] = vsub(vsub(t[4 * y + 1], t[4 * y + 2]), t[4 * y + 3]);
    }
    const bool full = count == kLanes;
    V bias = vzero();
    if (tile.bias != nullptr) bias = full ? vload(tile.bias + j) : vload_tail(tile.bias + j, count);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (tile.y[i] == nullptr) continue;
      V v = vadd(out[i], bias);
      if (tile.residual[i] != nullptr) v = vadd(v, full ? vload(tile.residual[i] + j) : vload_tail(tile.residual[i] + j, count));
      v = vclip(v, activation);
      if (full) {
        vstore(tile.y[i] + j, v);
      } else {
        vstore_tail(tile.y[i] + j, v, count);
      }
    }
  }
}

}  // namespace

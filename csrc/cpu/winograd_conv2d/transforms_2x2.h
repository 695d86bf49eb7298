// F(2x2, 3x3): V = B^T d B on a 4 x 4 input tile, Y = A^T M A to a 2 x 2 output tile, for a vector of channels at a time.
//
//        1  0 -1  0          1  1  1  0
//  B^T = 0  1  1  0    A^T = 0  1 -1 -1      additions and subtractions only: exact on integer-valued data
//        0 -1  1  0
//        0  1  0 -1
#pragma once

namespace {

FB_INLINE void input_vector_2x2(const V (&d)[16], V (&out)[16]) {
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

void input_transform_2x2(const InputTile& tile) {
  for_vectors(tile.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    V d[16], out[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) d[i] = part.load(tile.source[i] + c);
    input_vector_2x2(d, out);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store_point(tile.v + i * tile.v_stride, c, out[i], part);
  });
}

void output_transform_2x2(const OutputTile& tile) {
  for_vectors(tile.columns, [&](int64_t j, const auto& part) __attribute__((always_inline)) {
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
    finish_outputs(tile, out, j, part);
  });
}

}  // namespace

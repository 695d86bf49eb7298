// F(4x4, 3x3) at the points 0, 3/4, -3/4, 3/2, -3/2, infinity: 36 products for 16 outputs, where the complex point needs 46.
//
// With a = 3/4, b = 3/2, in one dimension, from d0 .. d5 and with s = m(p) + m(-p), t = m(p) - m(-p) for p = a, b:
//
//   v0 = a^2 b^2 d0 - (a^2 + b^2) d2 + d4     v(+-a) = (d4 - b^2 d2) +- a (d3 - b^2 d1)
//   voo = a^2 b^2 d1 - (a^2 + b^2) d3 + d5    v(+-b) = (d4 - a^2 d2) +- b (d3 - a^2 d1)
//   y0 = m0 + sa + sb     y1 = a ta + b tb     y2 = a^2 sa + b^2 sb     y3 = a^3 ta + b^3 tb + moo
//
// The error is 4 to 5 times that of direct convolution (of ten sets of points the smallest; 0, 1, -1, 2, -2 has twice that): too much for
// the default, and a fiftieth of that of TF32 or less, so it is for torch.set_float32_matmul_precision("high"). Integers do not stay exact.
#pragma once

namespace {

namespace real_points {

constexpr float kA = 0.75f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA * kA2, kB3 = kB * kB2;  // all exact
constexpr float kProduct = kA2 * kB2, kSum = kA2 + kB2;

enum { kZero, kPlusA, kMinusA, kPlusB, kMinusB, kInfinity };

// x * factor + y
FB_INLINE V vscaled(V x, float factor, V y) {
  vfma_into(y, x, vbroadcast(factor));
  return y;
}

FB_INLINE void input_line(V d0, V d1, V d2, V d3, V d4, V d5, V (&out)[6]) {
  out[kZero] = vscaled(d0, kProduct, vscaled(d2, -kSum, d4));
  out[kInfinity] = vscaled(d1, kProduct, vscaled(d3, -kSum, d5));
  const V even_a = vscaled(d2, -kB2, d4), odd_a = vscaled(d1, -kB2, d3), even_b = vscaled(d2, -kA2, d4), odd_b = vscaled(d1, -kA2, d3);
  out[kPlusA] = vscaled(odd_a, kA, even_a);
  out[kMinusA] = vscaled(odd_a, -kA, even_a);
  out[kPlusB] = vscaled(odd_b, kB, even_b);
  out[kMinusB] = vscaled(odd_b, -kB, even_b);
}

FB_INLINE void output_line(const V (&m)[6], V (&y)[4]) {
  const V sum_a = vadd(m[kPlusA], m[kMinusA]), difference_a = vsub(m[kPlusA], m[kMinusA]);
  const V sum_b = vadd(m[kPlusB], m[kMinusB]), difference_b = vsub(m[kPlusB], m[kMinusB]);
  y[0] = vadd(vadd(sum_a, sum_b), m[kZero]);
  y[1] = vscaled(difference_a, kA, vmul(difference_b, vbroadcast(kB)));
  y[2] = vscaled(sum_a, kA2, vmul(sum_b, vbroadcast(kB2)));
  y[3] = vscaled(difference_a, kA3, vscaled(difference_b, kB3, m[kInfinity]));
}

}  // namespace real_points

void input_transform_4x4_real(const InputTile& tile) {
  for_vectors(tile.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    V lines[6][6];  // [column][point of the transformed rows]
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) {
      const auto pixel = [&](int row) __attribute__((always_inline)) { return part.load(tile.source[6 * row + x] + c); };
      real_points::input_line(pixel(0), pixel(1), pixel(2), pixel(3), pixel(4), pixel(5), lines[x]);
    }
#pragma GCC unroll 6
    for (int row = 0; row < 6; ++row) {
      V points[6];
      real_points::input_line(lines[0][row], lines[1][row], lines[2][row], lines[3][row], lines[4][row], lines[5][row], points);
#pragma GCC unroll 6
      for (int column = 0; column < 6; ++column) store_point(tile.v + (6 * row + column) * tile.v_stride, c, points[column], part);
    }
  });
}

void output_transform_4x4_real(const OutputTile& tile) {
  for_vectors(tile.columns, [&](int64_t j, const auto& part) __attribute__((always_inline)) {
    const float* m = tile.m + j;
    V lines[6][4];  // [point of the rows][output column]
#pragma GCC unroll 6
    for (int row = 0; row < 6; ++row) {
      V points[6];
#pragma GCC unroll 6
      for (int column = 0; column < 6; ++column) points[column] = vload(m + (6 * row + column) * tile.m_stride);
      real_points::output_line(points, lines[row]);
    }
    V out[16];
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      V points[6], y[4];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) points[i] = lines[i][column];
      real_points::output_line(points, y);
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) out[4 * row + column] = y[row];
    }
    finish_outputs(tile, out, j, part);
  });
}

}  // namespace

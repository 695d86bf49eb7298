// Tiles of 6x6 inputs at the points 0, 1, -1, infinity and the pair i, -i, 46 products: F(4x4, 3x3) for 16 outputs (F(2x2, 3x3): 64, direct:
// 144), and F(2x2, 5x5) for 4 (direct: 100). The inputs are transformed alike.
//
// Four real points and one complex one. In one dimension, from d0 .. d5 and with s = m1 + m2, t = m1 - m2:
//
//   v0 = d0 - d4     v1 = (d2 + d4) + (d1 + d3)     v2 = (d2 + d4) - (d1 + d3)     voo = d5 - d1     v = (d4 - d2) + (d3 - d1) i
//   y0 = m0 + s + Re m     y1 = t - Im m     y2 = s - Re m     y3 = t + Im m + moo          of two outputs, y1 = t - Im m + moo
//
// Additions and subtractions only, as small as those of F(2x2), while rational points would bring in 2, 4, 5, 8 or thirds: exact on
// integer-valued data, and measured no less accurate than F(2x2).
//
// In two dimensions rows and columns are transformed one after the other. 16 points are real in both. 4 are complex in the columns
// only, 4 in the rows only; one is complex in both and has four parts, which (with j for the columns) are the two complex
// numbers at j = i and j = -i. Each complex product x u takes three real ones (Gauss), so its point is stored as three:
//
//   k0 = (Re x + Im x) Re u     k1 = Re x (Im u - Re u)     k2 = Im x (Re u + Im u)     x u = (k0 - k2) + (k0 + k1) i
//
// Order of the 46: real points 4 * row + column (each 0, 1, 2, oo); from 16 on the complex columns of those four rows; from 28 on
// the complex rows of the four columns; at 40 the point (i, i), at 43 (i, -i).
#pragma once

namespace {

enum { kZero, kOne, kMinusOne, kInfinity, kReal, kImaginary };  // parts of a transformed row or column

FB_INLINE void input_line_6(V d0, V d1, V d2, V d3, V d4, V d5, V (&out)[6]) {
  const V even = vadd(d2, d4), odd = vadd(d1, d3);
  out[kZero] = vsub(d0, d4);
  out[kOne] = vadd(even, odd);
  out[kMinusOne] = vsub(even, odd);
  out[kInfinity] = vsub(d5, d1);
  out[kReal] = vsub(d4, d2);
  out[kImaginary] = vsub(d3, d1);
}

template <int kOut>
FB_INLINE void output_line_6(const V (&m)[6], V (&y)[kOut]) {
  const V sum = vadd(m[kOne], m[kMinusOne]), difference = vsub(m[kOne], m[kMinusOne]);
  y[0] = vadd(vadd(m[kZero], sum), m[kReal]);
  y[1] = vsub(difference, m[kImaginary]);
  if constexpr (kOut == 4) {
    y[2] = vsub(sum, m[kReal]);
    y[3] = vadd(difference, m[kImaginary]);
  }
  y[kOut - 1] = vadd(y[kOut - 1], m[kInfinity]);
}

template <typename P>
FB_INLINE void store_complex(float* v, int64_t stride, int64_t c, V real, V imaginary, const P& part) {
  store_point(v, c, vadd(real, imaginary), part);
  store_point(v + stride, c, real, part);
  store_point(v + 2 * stride, c, imaginary, part);
}

FB_INLINE void load_complex(const float* m, int64_t stride, V& real, V& imaginary) {
  const V k0 = vload(m);
  real = vsub(k0, vload(m + 2 * stride));
  imaginary = vadd(k0, vload(m + stride));
}

void input_transform_6x6(const InputTile& tile) {
  const int64_t stride = tile.v_stride;
  for_vectors(tile.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    V lines[6][6];  // [column][part of the transformed rows]
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) {
      const auto pixel = [&](int row) __attribute__((always_inline)) { return part.load(tile.source[6 * row + x] + c); };
      input_line_6(pixel(0), pixel(1), pixel(2), pixel(3), pixel(4), pixel(5), lines[x]);
    }
    float* v = tile.v;
    V parts[6];
    const auto along_columns = [&](int row) __attribute__((always_inline)) {
      input_line_6(lines[0][row], lines[1][row], lines[2][row], lines[3][row], lines[4][row], lines[5][row], parts);
    };
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) {
      along_columns(row);
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) store_point(v + (4 * row + column) * stride, c, parts[column], part);
      store_complex(v + (16 + 3 * row) * stride, stride, c, parts[kReal], parts[kImaginary], part);
    }
    V real[6];
    along_columns(kReal);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) real[i] = parts[i];
    along_columns(kImaginary);
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column)
      store_complex(v + (28 + 3 * column) * stride, stride, c, real[column], parts[column], part);
    store_complex(v + 40 * stride, stride, c, vsub(real[kReal], parts[kImaginary]), vadd(real[kImaginary], parts[kReal]), part);
    store_complex(v + 43 * stride, stride, c, vadd(real[kReal], parts[kImaginary]), vsub(parts[kReal], real[kImaginary]), part);
  });
}

template <int kOut>
void output_transform_6x6(const OutputTile& tile) {
  const int64_t stride = tile.m_stride;
  for_vectors(tile.columns, [&](int64_t j, const auto& part) __attribute__((always_inline)) {
    const float* m = tile.m + j;
    V lines[6][kOut];  // [part of the rows][output column]
    V parts[6];
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) {
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) parts[column] = vload(m + (4 * row + column) * stride);
      load_complex(m + (16 + 3 * row) * stride, stride, parts[kReal], parts[kImaginary]);
      output_line_6<kOut>(parts, lines[row]);
    }
    V real[6], imaginary[6], a_real, a_imaginary, b_real, b_imaginary;
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) load_complex(m + (28 + 3 * column) * stride, stride, real[column], imaginary[column]);
    load_complex(m + 40 * stride, stride, a_real, a_imaginary);
    load_complex(m + 43 * stride, stride, b_real, b_imaginary);
    real[kReal] = vadd(a_real, b_real);
    imaginary[kImaginary] = vsub(b_real, a_real);
    imaginary[kReal] = vadd(a_imaginary, b_imaginary);
    real[kImaginary] = vsub(a_imaginary, b_imaginary);
    output_line_6<kOut>(real, lines[kReal]);
    output_line_6<kOut>(imaginary, lines[kImaginary]);
    V out[kOut * kOut];
#pragma GCC unroll 4
    for (int column = 0; column < kOut; ++column) {
      V y[kOut];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) parts[i] = lines[i][column];
      output_line_6<kOut>(parts, y);
#pragma GCC unroll 4
      for (int row = 0; row < kOut; ++row) out[kOut * row + column] = y[row];
    }
    finish_outputs(tile, out, j, part);
  });
}

}  // namespace

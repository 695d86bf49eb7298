// F(4, 7) in one dimension, for 1x7 and 7x1: 13 products for 4 outputs instead of 28.
//
// The polynomial of the 7 taps and that of 4 outputs are multiplied modulo factors that have coefficients 0, 1 and -1 and roots of size
// one: x, x - 1, x + 1, infinity (a product each), x^2 + 1, x^2 - x + 1 and x^2 + x + 1 (three each, as a complex product). Then the
// transforms of input and output only add and subtract, but for a 2, and stay small, where the real points +-2 and +-1/2 would bring in powers
// of them up to the sixth: measured 1.0 to 1.4 times the error of direct convolution. Products of x -+ 1 are divided by 12 and those of
// the last two factors by 6, together and at the end, so that integers stay exact.
//
//   M(q) = (all other factors), U0 = sum M_n d_n, U1 = sum M_n d_(n+1)
//
//   factor       from d0 .. d9                                        products, and the outputs they go to
//   x            v0 = (d8 - d2) + (d6 - d0)                           y0
//   x -+ 1       E = d1 + 2 d3 + 2 d5 + d7,  F = d2 + 2 d4 + 2 d6 + d8
//                v1 = F + E, v2 = F - E                               (1, 1, 1, 1) and (1, -1, 1, -1)
//   infinity     v3 = (d9 - d3) + (d7 - d1)                           y3
//   x^2 + 1      U = d7 - d1, d8 - d2:   U0 - U1, -(U0 + U1), U1      (1, 0, -1, 0), (0, 1, 0, -1), their sum
//   x^2 - x + 1  U = e + o:              U0 - U1, -U0, U1             (1, 0, -1, -1), (0, 1, 1, 0), their sum
//   x^2 + x + 1  U = e - o:              U0 + U1, -U0, -U1            (1, 0, -1, 1), (0, 1, -1, 0), their difference
//                e0 = (d7 - d1) + (d5 - d3), o0 = d6 - d2, and the same one further for U1
#pragma once

namespace {

// (once + 2 twice) / 12: exact where it can be, and without a division, which takes 16 cycles.
FB_INLINE V vtwelfth(V once, V twice) {
  const V x = vadd(once, vadd(twice, twice)), twelfth = vbroadcast(1.0f / 12.0f);
  V quotient = vmul(x, twelfth), rest = x;
  vfma_into(rest, quotient, vbroadcast(-12.0f));
  vfma_into(quotient, rest, twelfth);
  return quotient;
}

void input_transform_line(const InputTile& tile) {
  for_vectors(tile.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    V d[10];
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) d[i] = part.load(tile.source[i] + c);
    const auto store = [&](int point, V x) __attribute__((always_inline)) { store_point(tile.v + point * tile.v_stride, c, x, part); };
    const V zero = vzero(), two = vbroadcast(2.0f);
    const V d71 = vsub(d[7], d[1]), d82 = vsub(d[8], d[2]), d62 = vsub(d[6], d[2]), d73 = vsub(d[7], d[3]);
    store(0, vadd(d82, vsub(d[6], d[0])));
    V odd = vadd(d[1], d[7]), even = vadd(d[2], d[8]);
    vfma_into(odd, vadd(d[3], d[5]), two);
    vfma_into(even, vadd(d[4], d[6]), two);
    store(1, vadd(even, odd));
    store(2, vsub(even, odd));
    store(3, vadd(vsub(d[9], d[3]), d71));
    store(4, vsub(d71, d82));
    store(5, vsub(zero, vadd(d71, d82)));
    store(6, d82);
    const V e0 = vadd(d71, vsub(d[5], d[3])), e1 = vadd(d82, vsub(d[6], d[4]));
    const V minus0 = vadd(e0, d62), minus1 = vadd(e1, d73), plus0 = vsub(e0, d62), plus1 = vsub(e1, d73);
    store(7, vsub(minus0, minus1));
    store(8, vsub(zero, minus0));
    store(9, minus1);
    store(10, vadd(plus0, plus1));
    store(11, vsub(zero, plus0));
    store(12, vsub(zero, plus1));
  });
}

void output_transform_line(const OutputTile& tile) {
  for_vectors(tile.columns, [&](int64_t j, const auto& part) __attribute__((always_inline)) {
    V m[13], y[4];
#pragma GCC unroll 13
    for (int i = 0; i < 13; ++i) m[i] = vload(tile.m + i * tile.m_stride + j);
    const V sum = vadd(m[1], m[2]), difference = vsub(m[1], m[2]);
    const V i0 = vadd(m[4], m[6]), i1 = vadd(m[5], m[6]);
    const V minus = vadd(m[7], m[9]), plus = vadd(m[10], m[12]);
    y[0] = vadd(vadd(m[0], i0), vtwelfth(sum, vadd(minus, plus)));
    y[1] = vadd(i1, vtwelfth(difference, vadd(vadd(m[8], m[9]), vsub(m[11], m[12]))));
    y[2] = vsub(vtwelfth(sum, vsub(vsub(m[8], m[7]), vadd(m[10], m[11]))), i0);
    y[3] = vadd(vsub(m[3], i1), vtwelfth(difference, vsub(plus, minus)));
    finish_outputs(tile, y, j, part);
  });
}

}  // namespace

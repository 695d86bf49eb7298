// U = G w G^T of each form, in double: its own rounding would be as large as that of a whole sum.
#include "winograd_conv2d.h"

// ThreadSanitizer crashes in resolvers, which run before it is set up.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define FB_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define FB_CLONES
#endif

namespace fb::winograd_conv2d {

namespace {

using Line = double[kFilters];

// Parts of a filter line (a, b, c) in one dimension. F(2): the points 0, 1, -1, infinity.
inline void line_2x2(const double* a, const double* b, const double* c, Line* out) {
  for (int64_t j = 0; j < kFilters; ++j) {
    out[0][j] = a[j];
    out[1][j] = (a[j] + b[j] + c[j]) * 0.5;
    out[2][j] = (a[j] - b[j] + c[j]) * 0.5;
    out[3][j] = c[j];
  }
}

// Six inputs: the points 0, 1, -1, infinity, and real and imaginary part at i, which stands for -i too and so counts twice.
template <int kTaps>
inline __attribute__((always_inline)) void line_6(const double* const (&taps)[kTaps], Line* out) {
  for (int64_t j = 0; j < kFilters; ++j) {
    double sums[4] = {};  // of every fourth tap: i, like 1 and -1, has no other powers
    for (int i = 0; i < kTaps; ++i) sums[i % 4] += taps[i][j];
    const double even = sums[0] + sums[2], odd = sums[1] + sums[3];
    out[0][j] = taps[0][j];
    out[1][j] = (even + odd) * 0.25;
    out[2][j] = (even - odd) * 0.25;
    out[3][j] = taps[kTaps - 1][j];
    out[4][j] = (sums[0] - sums[2]) * 0.5;
    out[5][j] = (sums[1] - sums[3]) * 0.5;
  }
}

// F(4) at the points 0, a, -a, b, -b, infinity of transforms_4x4_real.h.
inline void line_4x4_real(const double* x, const double* y, const double* z, Line* out) {
  constexpr double a = 0.75, b = 1.5;
  const auto point = [&](double p, double norm, int64_t j) { return (x[j] + p * y[j] + p * p * z[j]) / norm; };
  for (int64_t j = 0; j < kFilters; ++j) {
    out[0][j] = x[j] / (a * a * b * b);
    out[1][j] = point(a, 2 * a * a * (a * a - b * b), j);
    out[2][j] = point(-a, 2 * a * a * (a * a - b * b), j);
    out[3][j] = point(b, 2 * b * b * (b * b - a * a), j);
    out[4][j] = point(-b, 2 * b * b * (b * b - a * a), j);
    out[5][j] = z[j];
  }
}

inline void store(const double* values, float* u) {
  for (int64_t j = 0; j < kFilters; ++j) u[j] = static_cast<float>(values[j]);
}

// All points real: lines of the filter, then lines of those; point kPoints * row + column.
template <int kPoints, typename F>
inline __attribute__((always_inline)) void transform_real(const float* w, float* u, const F& line) {
  Line taps[9], lines[3][kPoints], points[kPoints];
  for (int i = 0; i < 9; ++i)
    for (int64_t j = 0; j < kFilters; ++j) taps[i][j] = w[i * kFilters + j];
  for (int column = 0; column < 3; ++column) line(taps[column], taps[3 + column], taps[6 + column], lines[column]);
  for (int row = 0; row < kPoints; ++row) {
    line(lines[0][row], lines[1][row], lines[2][row], points);
    for (int column = 0; column < kPoints; ++column) store(points[column], u + (kPoints * row + column) * kFilters);
  }
}

// The three factors of Gauss's product.
inline void store_complex(const double* real, const double* imaginary, float* u) {
  for (int64_t j = 0; j < kFilters; ++j) {
    u[j] = static_cast<float>(real[j]);
    u[kFilters + j] = static_cast<float>(imaginary[j] - real[j]);
    u[2 * kFilters + j] = static_cast<float>(real[j] + imaginary[j]);
  }
}

// A point that is complex in both dimensions, of parts 1, j (columns), i (rows), ij, at j = sign * i; halved, since its products are added
// up in pairs.
inline void store_both_complex(const Line* real, const Line* imaginary, double sign, float* u) {
  Line a, b;
  for (int64_t x = 0; x < kFilters; ++x) {
    a[x] = (real[4][x] - sign * imaginary[5][x]) * 0.5;
    b[x] = (imaginary[4][x] + sign * real[5][x]) * 0.5;
  }
  store_complex(a, b, u);
}

// The points of transforms_6x6.h.
template <int kTaps>
inline __attribute__((always_inline)) void transform_complex(const float* w, float* u) {
  Line taps[kTaps * kTaps], lines[kTaps][6], parts[6], real[6];
  for (int i = 0; i < kTaps * kTaps; ++i)
    for (int64_t j = 0; j < kFilters; ++j) taps[i][j] = w[i * kFilters + j];
  for (int column = 0; column < kTaps; ++column) {
    const double* rows[kTaps];
    for (int row = 0; row < kTaps; ++row) rows[row] = taps[kTaps * row + column];
    line_6<kTaps>(rows, lines[column]);
  }
  const auto along_columns = [&](int row, Line* out) {
    const double* columns[kTaps];
    for (int column = 0; column < kTaps; ++column) columns[column] = lines[column][row];
    line_6<kTaps>(columns, out);
  };
  for (int row = 0; row < 4; ++row) {
    along_columns(row, parts);
    for (int column = 0; column < 4; ++column) store(parts[column], u + (4 * row + column) * kFilters);
    store_complex(parts[4], parts[5], u + (16 + 3 * row) * kFilters);
  }
  along_columns(4, real);
  along_columns(5, parts);
  for (int column = 0; column < 4; ++column) store_complex(real[column], parts[column], u + (28 + 3 * column) * kFilters);
  store_both_complex(real, parts, 1.0, u + 40 * kFilters);
  store_both_complex(real, parts, -1.0, u + 43 * kFilters);
}

}  // namespace

FB_CLONES
void transform_2x2(const float* w, float* u) { transform_real<4>(w, u, line_2x2); }

FB_CLONES
void transform_4x4(const float* w, float* u) { transform_complex<3>(w, u); }

FB_CLONES
void transform_2x2_five(const float* w, float* u) { transform_complex<5>(w, u); }

FB_CLONES
void transform_4x4_real(const float* w, float* u) { transform_real<6>(w, u, line_4x4_real); }

// The taps modulo each factor of transforms_line.h, times the inverse of all other factors there, without the 12 and the 6 by which the
// output transform divides.
FB_CLONES
void transform_line(const float* w, float* u) {
  // x^n modulo x^2 + p x + 1 is a + b x
  constexpr int kPowers[3][7][2] = {{{1, 0}, {0, 1}, {-1, 0}, {0, -1}, {1, 0}, {0, 1}, {-1, 0}},
                                    {{1, 0}, {0, 1}, {-1, 1}, {-1, 0}, {0, -1}, {1, -1}, {1, 0}},
                                    {{1, 0}, {0, 1}, {-1, -1}, {1, 0}, {0, 1}, {-1, -1}, {1, 0}}};
  constexpr int kP[3] = {0, -1, 1};
  constexpr double kInverse[3][2] = {{0.0, 0.5}, {1.0, 1.0}, {-1.0, 1.0}};
  for (int64_t j = 0; j < kFilters; ++j) {
    double even = 0, odd = 0, a[3] = {}, b[3] = {};
    for (int n = 0; n < 7; ++n) {
      const double tap = w[n * kFilters + j];
      (n % 2 == 0 ? even : odd) += tap;
      for (int factor = 0; factor < 3; ++factor) {
        a[factor] += kPowers[factor][n][0] * tap;
        b[factor] += kPowers[factor][n][1] * tap;
      }
    }
    u[j] = -w[j];
    u[kFilters + j] = static_cast<float>(even + odd);
    u[2 * kFilters + j] = static_cast<float>(even - odd);
    u[3 * kFilters + j] = w[6 * kFilters + j];
    for (int factor = 0; factor < 3; ++factor) {
      const double c = kInverse[factor][0], d = kInverse[factor][1];
      const double real = a[factor] * c - b[factor] * d, other = a[factor] * d + b[factor] * c - kP[factor] * b[factor] * d;
      float* out = u + (4 + 3 * factor) * kFilters + j;
      out[0] = static_cast<float>(real);
      out[kFilters] = static_cast<float>(other);
      out[2 * kFilters] = static_cast<float>(kP[factor] == 1 ? real - other : real + other);
    }
  }
}

void transform_filters(const Form& form, const float* w, float* u) {
  if (&form == &kForm2x2) return transform_2x2(w, u);
  if (&form == &kForm4x4) return transform_4x4(w, u);
  if (&form == &kForm2x2Five) return transform_2x2_five(w, u);
  if (&form == &kForm4x4Real) return transform_4x4_real(w, u);
  transform_line(w, u);
}

}  // namespace fb::winograd_conv2d

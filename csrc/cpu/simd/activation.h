// Activations on vectors, on four of them side by side, and on rows. Included after a vector header, inside its target region.
//
//   exp(x)     = 2^n (1 + r + r^2 q(r)),  n = round(x / ln 2),  r = x - n ln 2,  q of degree 4: 2^-28 from exp
//   sigmoid(x) = 1 / (1 + e) where x >= 0, else e / (1 + e),  e = exp(-|x|): no overflow, sigmoid(0) = 0.5; the rounding of 1 + e
//                and of the division are made good by one correction
//   tanh(x)    = x + x^3 p(x^2) where |x| < 0.55, p of degree 4; else 1 - 2 e / (1 + e), e = exp(-2 |x|), with the sign of x
//   gelu(x)    = x c where x < 0, else x (1 - c),  c = erfc(z) / 2 = exp(z p(z)) / 2,  z = |x| / sqrt(2), p of degree 9: within 2^-24
//                of c; 0 where z > 4.2 (c < 1.5e-9)
//   and by the formulas of PyTorch: silu(x) = x sigmoid(x), hardsigmoid(x) = relu6(x + 3) / 6, hardswish(x) = x relu6(x + 3) / 6,
//   gelu_tanh(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
//
// Every step is an IEEE operation or a written-out fma, so AVX2 and AVX-512 give the same bits. Over all floats sigmoid and tanh are within 1.6
// units in the last place, subnormal results included (portable: sigmoid 2.4, its correction is itself rounded); NaN stays NaN. The
// coefficients are minimax fits by Remez exchange.
#pragma once

#include "../activation.h"
#include "side.h"

namespace {

// T is V or Side.

// coefficient + value * factor
template <typename T>
FB_INLINE T vhorner(float coefficient, const T& value, const T& factor) {
  T out = vfill<T>(coefficient);
  vfma_into(out, value, factor);
  return out;
}

constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold

// p * 2^n for `shifted` = n + kRoundingShift. The factor is applied in two halves: results below 2^-126 need both.
FB_INLINE V vtimes_power(V p, V shifted) {
  const Bits power = (Bits)shifted - 0x4b400000, half = power >> 1;
  const V first = (V)(((UnsignedBits)half + 127u) << 23), second = (V)(((UnsignedBits)(power - half) + 127u) << 23);
  return p * first * second;
}
FB_SIDE_OF_TWO(vtimes_power)

// exp(x) for x in [-104, 0], or NaN.
template <typename T>
FB_INLINE T vexp_of_negative(const T& x) {
  const T shifted = vhorner(kRoundingShift, x, vfill<T>(1.44269504f));
  const T n = vsub(shifted, vfill<T>(kRoundingShift));
  T r = x;
  vfma_into(r, n, vfill<T>(-0.693359375f));  // ln 2 in two parts; n times the first is exact
  vfma_into(r, n, vfill<T>(2.12194440e-4f));
  T q = vfill<T>(0.00138144670593f);
  q = vhorner(0.00836878041118f, q, r);
  q = vhorner(0.0416683942109f, q, r);
  q = vhorner(0.166665201078f, q, r);
  q = vhorner(0.499999934125f, q, r);
  T p = r;
  vfma_into(p, q, vmul(r, r));
  return vtimes_power(vadd(p, vfill<T>(1.0f)), shifted);
}

template <typename T>
FB_INLINE T vat_least(const T& x, float limit) {  // NaN stays
  return vwhere_below(x, vfill<T>(limit), vfill<T>(limit), x);
}

template <typename T>
FB_INLINE T vat_most(const T& x, float limit) {  // NaN stays
  return vwhere_below(vfill<T>(limit), x, vfill<T>(limit), x);
}

template <typename T>
FB_INLINE T vsigmoid(const T& x) {
  const T one = vfill<T>(1.0f);
  const T e = vexp_of_negative(vat_least(vwith_sign(x, vfill<T>(-0.0f)), -104.0f));
  const T d = vadd(one, e), d_rest = vsub(e, vsub(d, one)), inverse = vdiv(one, d);  // 1 + e = d + d_rest exactly
  const T top = vwhere_below(x, vfill<T>(0.0f), e, one);
  T y = vmul(top, inverse), rest = top;
  const T minus = vnegative(y);
  vfma_into(rest, minus, d);
  vfma_into(rest, minus, d_rest);
  vfma_into(y, rest, inverse);
  return y;
}

template <typename T>
FB_INLINE T vtanh(const T& x) {
  const T a = vmagnitude(x), one = vfill<T>(1.0f), square = vmul(a, a);
  T p = vfill<T>(-0.00627423944028f);
  p = vhorner(0.021071678935f, p, square);
  p = vhorner(-0.05385230986f, p, square);
  p = vhorner(0.133325861377f, p, square);
  p = vhorner(-0.333333175596f, p, square);
  T small = a;
  vfma_into(small, a, vmul(square, p));
  const T e = vexp_of_negative(vat_least(vmul(a, vfill<T>(-2.0f)), -104.0f));
  const T large = vsub(one, vdiv(vadd(e, e), vadd(one, e)));
  return vwith_sign(vwhere_below(a, vfill<T>(0.55f), small, large), x);
}

// min(max(0, x), 6); NaN and -0.0 stay.
template <typename T>
FB_INLINE T vcap6(const T& x) {
  return vat_most(x, 6.0f);
}
template <typename T>
FB_INLINE T vrelu6(const T& x) {
  return vcap6(vrelu(x));
}

template <typename T>
FB_INLINE T vhardsigmoid(const T& x) {
  return vdiv(vrelu6(vadd(x, vfill<T>(3.0f))), vfill<T>(6.0f));
}
template <typename T>
FB_INLINE T vhardswish(const T& x) {
  return vdiv(vmul(x, vrelu6(vadd(x, vfill<T>(3.0f)))), vfill<T>(6.0f));
}

template <typename T>
FB_INLINE T vgelu(const T& x) {
  constexpr float kLast = 4.2f;  // of the interval on which p was fitted
  const T distance = vmul(vmagnitude(x), vfill<T>(0.70710678f));
  const T z = vat_most(distance, kLast);
  T p = vfill<T>(-5.084206691e-07f);
  p = vhorner(1.119415538e-05f, p, z);
  p = vhorner(-0.0001052628584f, p, z);
  p = vhorner(0.0005363290547f, p, z);
  p = vhorner(-0.001408192329f, p, z);
  p = vhorner(-0.0001910048449f, p, z);
  p = vhorner(0.01940959878f, p, z);
  p = vhorner(-0.1028750240f, p, z);
  p = vhorner(-0.6366025805f, p, z);
  p = vhorner(-1.128380060f, p, z);
  const T e = vmul(vexp_of_negative(vmul(z, p)), vfill<T>(0.5f));
  const T zero = vfill<T>(0.0f), c = vwhere_below(vfill<T>(kLast), distance, zero, e);
  return vmul(x, vwhere_below(x, zero, c, vsub(vfill<T>(1.0f), c)));
}

template <typename T>
FB_INLINE T vgelu_tanh(const T& x) {
  T inner = x;  // x + 0.044715 x^3
  vfma_into(inner, vmul(vmul(x, x), x), vfill<T>(0.044715f));
  return vmul(x, vsigmoid(vmul(inner, vfill<T>(1.59576912f))));
}

// One of none, relu, relu6: what an inner loop can afford.
FB_INLINE V vclip(V v, int64_t activation) {
  if (activation != fb::kNone) {
    v = vrelu(v);
    if (activation == fb::kRelu6) v = vcap6(v);
  }
  return v;
}

template <typename T>
FB_INLINE T vactivate(const T& v, int64_t activation) {
  switch (activation) {
    case fb::kRelu:
      return vrelu(v);
    case fb::kRelu6:
      return vrelu6(v);
    case fb::kSigmoid:
      return vsigmoid(v);
    case fb::kTanh:
      return vtanh(v);
    case fb::kSilu:
      return vmul(v, vsigmoid(v));
    case fb::kHardsigmoid:
      return vhardsigmoid(v);
    case fb::kHardswish:
      return vhardswish(v);
    case fb::kGelu:
      return vgelu(v);
    case fb::kGeluTanh:
      return vgelu_tanh(v);
    default:
      return v;
  }
}

// In place on `count` vectors in a row. For kernels whose loops mostly do without: a call, which keeps the costly ones out of them.
[[maybe_unused, gnu::noinline]] void activate_vectors(V* v, int64_t count, int64_t activation) {
  int64_t n = 0;
  for (; n + kSide <= count; n += kSide) {
    Side side;
    FB_FOR_EACH_SIDE side.v[i] = v[n + i];
    side = vactivate(side, activation);
    FB_FOR_EACH_SIDE v[n + i] = side.v[i];
  }
  for (; n < count; ++n) v[n] = vactivate(v[n], activation);
}

// In place on `rows` rows of `columns` floats that start `stride` floats apart. Four vectors at once, of whatever rows.
[[maybe_unused]] void activate_rows(float* y, int64_t stride, int64_t rows, int64_t columns, int64_t activation) {
  if (activation == fb::kNone) return;
  if (stride == columns) {
    columns *= rows;
    rows = 1;
  }
  const int64_t whole = columns - columns % kLanes;
  float* next = y;
  int64_t column = 0;
  const auto take = [&]() __attribute__((always_inline)) {
    if (column == whole) {
      next += stride - whole;
      column = 0;
    }
    float* const taken = next;
    next += kLanes;
    column += kLanes;
    return taken;
  };
  int64_t vectors = rows * (whole / kLanes);
  for (; vectors >= kSide; vectors -= kSide) {
    float* at[kSide];
    Side side;
    FB_FOR_EACH_SIDE at[i] = take();
    FB_FOR_EACH_SIDE side.v[i] = vload(at[i]);
    side = vactivate(side, activation);
    FB_FOR_EACH_SIDE vstore(at[i], side.v[i]);
  }
  for (; vectors > 0; --vectors) {
    float* const at = take();
    vstore(at, vactivate(vload(at), activation));
  }
  if (whole == columns) return;
  const int left = static_cast<int>(columns - whole);
  for (float* tail = y + whole; rows > 0; --rows, tail += stride)
    vstore_tail(tail, vactivate(vload_tail(tail, left), activation), left);
}

}  // namespace

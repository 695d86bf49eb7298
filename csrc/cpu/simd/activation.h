// Activations on vectors and on rows. Included after a vector header, inside its target region.
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

namespace {

typedef int32_t Bits __attribute__((vector_size(sizeof(V))));
typedef uint32_t UnsignedBits __attribute__((vector_size(sizeof(V))));

FB_INLINE V vmagnitude(V x) { return (V)((Bits)x & 0x7fffffff); }
FB_INLINE V vwith_sign(V magnitude, V sign) { return (V)((Bits)magnitude | ((Bits)sign & INT32_MIN)); }

// coefficient + value * factor
FB_INLINE V vhorner(float coefficient, V value, V factor) {
  V out = vbroadcast(coefficient);
  vfma_into(out, value, factor);
  return out;
}

// exp(x) for x in [-104, 0], or NaN. The factor 2^n is applied in two halves: results below 2^-126 need both.
FB_INLINE V vexp_of_negative(V x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  const V shifted = vhorner(kShift, x, vbroadcast(1.44269504f));
  const V n = vsub(shifted, vbroadcast(kShift));
  V r = x;
  vfma_into(r, n, vbroadcast(-0.693359375f));  // ln 2 in two parts; n times the first is exact
  vfma_into(r, n, vbroadcast(2.12194440e-4f));
  V q = vbroadcast(0.00138144670593f);
  q = vhorner(0.00836878041118f, q, r);
  q = vhorner(0.0416683942109f, q, r);
  q = vhorner(0.166665201078f, q, r);
  q = vhorner(0.499999934125f, q, r);
  V p = r;
  vfma_into(p, q, r * r);
  p = vadd(p, vbroadcast(1.0f));
  const Bits power = (Bits)shifted - 0x4b400000, half = power >> 1;
  const V first = (V)(((UnsignedBits)half + 127u) << 23), second = (V)(((UnsignedBits)(power - half) + 127u) << 23);
  return p * first * second;
}

FB_INLINE V vat_least(V x, float limit) { return x < vbroadcast(limit) ? vbroadcast(limit) : x; }  // NaN stays

FB_INLINE V vsigmoid(V x) {
  const V one = vbroadcast(1.0f);
  const V e = vexp_of_negative(vat_least(vwith_sign(x, vbroadcast(-0.0f)), -104.0f));
  const V d = vadd(one, e), d_rest = vsub(e, vsub(d, one)), inverse = vdiv(one, d);  // 1 + e = d + d_rest exactly
  const V top = x < vzero() ? e : one;
  V y = top * inverse, rest = top;
  vfma_into(rest, -y, d);
  vfma_into(rest, -y, d_rest);
  vfma_into(y, rest, inverse);
  return y;
}

FB_INLINE V vtanh(V x) {
  const V a = vmagnitude(x), one = vbroadcast(1.0f), square = a * a;
  V p = vbroadcast(-0.00627423944028f);
  p = vhorner(0.021071678935f, p, square);
  p = vhorner(-0.05385230986f, p, square);
  p = vhorner(0.133325861377f, p, square);
  p = vhorner(-0.333333175596f, p, square);
  V small = a;
  vfma_into(small, a, square * p);
  const V e = vexp_of_negative(vat_least(a * vbroadcast(-2.0f), -104.0f));
  const V large = vsub(one, vdiv(vadd(e, e), vadd(one, e)));
  return vwith_sign(a < vbroadcast(0.55f) ? small : large, x);
}

// min(max(0, x), 6); NaN and -0.0 stay.
FB_INLINE V vcap6(V x) { return x > vbroadcast(6.0f) ? vbroadcast(6.0f) : x; }
FB_INLINE V vrelu6(V x) { return vcap6(vrelu(x)); }

FB_INLINE V vhardsigmoid(V x) { return vdiv(vrelu6(vadd(x, vbroadcast(3.0f))), vbroadcast(6.0f)); }
FB_INLINE V vhardswish(V x) { return vdiv(vmul(x, vrelu6(vadd(x, vbroadcast(3.0f)))), vbroadcast(6.0f)); }

FB_INLINE V vgelu(V x) {
  constexpr float kLast = 4.2f;  // of the interval on which p was fitted
  const V distance = vmul(vmagnitude(x), vbroadcast(0.70710678f));
  const V z = distance > vbroadcast(kLast) ? vbroadcast(kLast) : distance;  // NaN stays
  V p = vbroadcast(-5.084206691e-07f);
  p = vhorner(1.119415538e-05f, p, z);
  p = vhorner(-0.0001052628584f, p, z);
  p = vhorner(0.0005363290547f, p, z);
  p = vhorner(-0.001408192329f, p, z);
  p = vhorner(-0.0001910048449f, p, z);
  p = vhorner(0.01940959878f, p, z);
  p = vhorner(-0.1028750240f, p, z);
  p = vhorner(-0.6366025805f, p, z);
  p = vhorner(-1.128380060f, p, z);
  const V e = vmul(vexp_of_negative(vmul(z, p)), vbroadcast(0.5f));
  const V c = distance > vbroadcast(kLast) ? vzero() : e;
  return vmul(x, x < vzero() ? c : vsub(vbroadcast(1.0f), c));
}

FB_INLINE V vgelu_tanh(V x) {
  V inner = x;  // x + 0.044715 x^3
  vfma_into(inner, vmul(vmul(x, x), x), vbroadcast(0.044715f));
  return vmul(x, vsigmoid(vmul(inner, vbroadcast(1.59576912f))));
}

// One of none, relu, relu6: what an inner loop can afford.
FB_INLINE V vclip(V v, int64_t activation) {
  if (activation != fb::kNone) {
    v = vrelu(v);
    if (activation == fb::kRelu6) v = vcap6(v);
  }
  return v;
}

FB_INLINE V vactivate(V v, int64_t activation) {
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

// The same for kernels whose loops mostly do without: the costly ones are a call.
[[maybe_unused, gnu::noinline]] V vactivate_apart(V v, int64_t activation) { return vactivate(v, activation); }
FB_INLINE V vfinish(V v, int64_t activation) { return activation > fb::kRelu6 ? vactivate_apart(v, activation) : vclip(v, activation); }

// In place on `rows` rows of `columns` floats that start `stride` floats apart.
[[maybe_unused]] void activate_rows(float* y, int64_t stride, int64_t rows, int64_t columns, int64_t activation) {
  if (activation == fb::kNone) return;
  if (stride == columns) {
    columns *= rows;
    rows = 1;
  }
  for (int64_t row = 0; row < rows; ++row, y += stride) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) vstore(y + i, vactivate(vload(y + i), activation));
    if (i == columns) continue;
    const int left = static_cast<int>(columns - i);
    vstore_tail(y + i, vactivate(vload_tail(y + i, left), activation), left);
  }
}

}  // namespace

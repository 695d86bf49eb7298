// 16 floats in a zmm register. Included inside an AVX-512 target region only.
#pragma once

// GCC 12's own intrinsics headers trip this warning (their _mm512_undefined_ps reads itself).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace {

using V = __m512;
constexpr int kLanes = 16;

}  // namespace

#include "lanes.h"

namespace {

FB_INLINE V vzero() { return _mm512_setzero_ps(); }
FB_INLINE V vload(const float* p) { return _mm512_loadu_ps(p); }
FB_INLINE void vstore(float* p, V v) { _mm512_storeu_ps(p, v); }
FB_INLINE V vbroadcast(float x) { return _mm512_set1_ps(x); }
// acc += a * b in place. Written out because GCC otherwise picks the forms that overwrite a or b and spills the accumulators
// of large register tiles.
FB_INLINE void vfma_into(V& acc, V a, V b) { asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
FB_INLINE V vadd(V a, V b) { return _mm512_add_ps(a, b); }
FB_INLINE V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
FB_INLINE V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
FB_INLINE V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
FB_INLINE V vsqrt(V x) { return _mm512_sqrt_ps(x); }
// max(0, x) that keeps NaN and -0.0, as torch.relu does: the second operand wins when unordered or equal.
FB_INLINE V vrelu(V x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
// Running maximum as torch.max_pool2d does: a NaN stays, of two equal values (+0, -0) the first stays.
FB_INLINE V vmax_nan(V acc, V x) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(_mm512_max_ps(x, acc), is_nan, x);
}
// Bit i: lane i of a is not below, or not above, that of b or equal to it; a NaN is neither.
FB_INLINE uint32_t vnot_at_most(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
FB_INLINE uint32_t vnot_at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ); }
// v where the bit is set, else 0.
FB_INLINE V vkeep(uint32_t bits, V v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }
FB_INLINE __mmask16 vtail(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
FB_INLINE V vload_tail(const float* p, int count) { return _mm512_maskz_loadu_ps(vtail(count), p); }
FB_INLINE void vstore_tail(float* p, V v, int count) { _mm512_mask_storeu_ps(p, vtail(count), v); }
FB_INLINE void vprefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
FB_INLINE void vprefetch_l2(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
FB_INLINE void vprefetch_write(const float* p) { __builtin_prefetch(p, 1); }

// Repeats kUnit floats (1, 2 or 4) over all lanes: a load, no shuffle.
template <int kUnit>
FB_INLINE V vrepeat(const float* p) {
  if constexpr (kUnit == 4) {
    return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
  } else if constexpr (kUnit == 2) {
    return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const DoubleWord*>(p)));
  } else {
    return _mm512_set1_ps(*p);
  }
}

// Transposes the lanes seen as a kRows x (kLanes / kRows) matrix.
template <int kRows>
FB_INLINE V vtranspose(V v) {
  constexpr int kColumns = kLanes / kRows;
  if constexpr (kRows == 1 || kColumns == 1) return v;
  alignas(64) static constexpr auto index = transposed_lanes<kRows>();
  return _mm512_permutexvar_ps(_mm512_load_si512(index.lane), v);
}

}  // namespace

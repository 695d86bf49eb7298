// 8 floats in a ymm register, with FMA. Included inside an AVX2 target region only. Meanings as in vec_avx512.h.
#pragma once

namespace {

using V = __m256;
constexpr int kLanes = 8;

}  // namespace

#include "lanes.h"

namespace {

FB_INLINE V vzero() { return _mm256_setzero_ps(); }
FB_INLINE V vload(const float* p) { return _mm256_loadu_ps(p); }
FB_INLINE void vstore(float* p, V v) { _mm256_storeu_ps(p, v); }
FB_INLINE V vbroadcast(float x) { return _mm256_set1_ps(x); }
FB_INLINE void vfma_into(V& acc, V a, V b) { asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }
FB_INLINE V vadd(V a, V b) { return _mm256_add_ps(a, b); }
FB_INLINE V vsub(V a, V b) { return _mm256_sub_ps(a, b); }
FB_INLINE V vmul(V a, V b) { return _mm256_mul_ps(a, b); }
FB_INLINE V vdiv(V a, V b) { return _mm256_div_ps(a, b); }
FB_INLINE V vsqrt(V x) { return _mm256_sqrt_ps(x); }
FB_INLINE V vrelu(V x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }
FB_INLINE V vmax_nan(V acc, V x) {
  return _mm256_blendv_ps(_mm256_max_ps(x, acc), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
FB_INLINE uint32_t vnot_at_most(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ))); }
FB_INLINE uint32_t vnot_at_least(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGE_UQ))); }
FB_INLINE V vkeep(uint32_t bits, V v) {
  const __m256i each = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each);
  return _mm256_and_ps(_mm256_castsi256_ps(set), v);
}
FB_INLINE __m256i vtail(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
FB_INLINE V vload_tail(const float* p, int count) { return _mm256_maskload_ps(p, vtail(count)); }
FB_INLINE void vstore_tail(float* p, V v, int count) { _mm256_maskstore_ps(p, vtail(count), v); }
FB_INLINE void vprefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
FB_INLINE void vprefetch_l2(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
FB_INLINE void vprefetch_write(const float* p) { __builtin_prefetch(p, 1); }

template <int kUnit>
FB_INLINE V vrepeat(const float* p) {
  if constexpr (kUnit == 2) {
    return _mm256_castpd_ps(_mm256_set1_pd(*reinterpret_cast<const DoubleWord*>(p)));
  } else {
    return _mm256_set1_ps(*p);
  }
}

template <int kRows>
FB_INLINE V vtranspose(V v) {
  constexpr int kColumns = kLanes / kRows;
  if constexpr (kRows == 1 || kColumns == 1) return v;
  alignas(32) static constexpr auto index = transposed_lanes<kRows>();
  return _mm256_permutevar8x32_ps(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(index.lane)));
}

}  // namespace

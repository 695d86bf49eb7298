// 4 floats as a compiler vector: NEON, SSE2 or scalar code, whatever the target offers. Meanings as in vec_avx512.h.
// Multiply and add round separately here: results equal the other sets on exact (integer-valued) data only.
#pragma once

namespace {

typedef float V __attribute__((vector_size(16)));
typedef float UnalignedV __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int kLanes = 4;

FB_INLINE V vzero() { return V{0.0f, 0.0f, 0.0f, 0.0f}; }
FB_INLINE V vload(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
FB_INLINE void vstore(float* p, V v) { *reinterpret_cast<UnalignedV*>(p) = v; }
FB_INLINE V vbroadcast(float x) { return V{x, x, x, x}; }
FB_INLINE void vfma_into(V& acc, V a, V b) { acc = a * b + acc; }
FB_INLINE V vadd(V a, V b) { return a + b; }
FB_INLINE V vsub(V a, V b) { return a - b; }
FB_INLINE V vmul(V a, V b) { return a * b; }
FB_INLINE V vdiv(V a, V b) { return a / b; }
FB_INLINE V vsqrt(V x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
FB_INLINE V vrelu(V x) { return x < vzero() ? vzero() : x; }
FB_INLINE V vmax_nan(V acc, V x) { return (x > acc) | (x != x) ? x : acc; }
FB_INLINE uint32_t vnot_at_most(V a, V b) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(a[i] <= b[i])) << i;
  return bits;
}
FB_INLINE uint32_t vnot_at_least(V a, V b) { return vnot_at_most(-a, -b); }
FB_INLINE V vkeep(uint32_t bits, V v) {
  for (int i = 0; i < kLanes; ++i) v[i] = (bits >> i & 1) != 0 ? v[i] : 0.0f;
  return v;
}
FB_INLINE V vload_tail(const float* p, int count) {
  V v = vzero();
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
FB_INLINE void vstore_tail(float* p, V v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
FB_INLINE void vprefetch(const float* p) { __builtin_prefetch(p); }
FB_INLINE void vprefetch_l2(const float* p) { __builtin_prefetch(p, 0, 2); }
FB_INLINE void vprefetch_write(const float* p) { __builtin_prefetch(p, 1); }

template <int kUnit>
FB_INLINE V vrepeat(const float* p) {
  static_assert(kUnit == 1, "groups are at least a vector wide here");
  return vbroadcast(*p);
}

template <int kRows>
FB_INLINE V vtranspose(V v) {
  if constexpr (kRows == 2) {
    return V{v[0], v[2], v[1], v[3]};
  } else {
    return v;  // one row or one column
  }
}

}  // namespace

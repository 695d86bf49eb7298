// Four vectors side by side, with the functions of a vector. A chain of a hundred cycles of latency, as of an activation, leaves the
// processor idle; four chains that take turns fill it, and share the loads of their constants. Included after a vector header.
#pragma once

namespace {

constexpr int kSide = 4;

struct Side {
  V v[kSide];
};

#define FB_FOR_EACH_SIDE _Pragma("GCC unroll 4") for (int i = 0; i < kSide; ++i)
#define FB_SIDE_OF_ONE(function)                  \
  FB_INLINE Side function(const Side& a) {        \
    Side out;                                     \
    FB_FOR_EACH_SIDE out.v[i] = function(a.v[i]); \
    return out;                                   \
  }
#define FB_SIDE_OF_TWO(function)                          \
  FB_INLINE Side function(const Side& a, const Side& b) { \
    Side out;                                             \
    FB_FOR_EACH_SIDE out.v[i] = function(a.v[i], b.v[i]); \
    return out;                                           \
  }

FB_SIDE_OF_TWO(vadd)
FB_SIDE_OF_TWO(vsub)
FB_SIDE_OF_TWO(vmul)
FB_SIDE_OF_TWO(vdiv)
FB_SIDE_OF_ONE(vrelu)

FB_INLINE void vfma_into(Side& acc, const Side& a, const Side& b) { FB_FOR_EACH_SIDE vfma_into(acc.v[i], a.v[i], b.v[i]); }

// The same number in every lane: vfill<V>(x) is vbroadcast(x).
template <typename T>
FB_INLINE T vfill(float x) {
  const V v = vbroadcast(x);
  if constexpr (sizeof(T) == sizeof(V)) {
    return v;
  } else {
    T out;
    FB_FOR_EACH_SIDE out.v[i] = v;
    return out;
  }
}

// What only activations need of a vector.
typedef int32_t Bits __attribute__((vector_size(sizeof(V))));
typedef uint32_t UnsignedBits __attribute__((vector_size(sizeof(V))));

FB_INLINE V vnegative(V x) { return -x; }
FB_INLINE V vmagnitude(V x) { return (V)((Bits)x & 0x7fffffff); }
FB_INLINE V vwith_sign(V magnitude, V sign) { return (V)((Bits)magnitude | ((Bits)sign & INT32_MIN)); }

// a < b ? then : otherwise; NaN is below nothing.
FB_INLINE V vwhere_below(V a, V b, V then, V otherwise) { return a < b ? then : otherwise; }

FB_SIDE_OF_ONE(vnegative)
FB_SIDE_OF_ONE(vmagnitude)
FB_SIDE_OF_TWO(vwith_sign)

FB_INLINE Side vwhere_below(const Side& a, const Side& b, const Side& then, const Side& otherwise) {
  Side out;
  FB_FOR_EACH_SIDE out.v[i] = vwhere_below(a.v[i], b.v[i], then.v[i], otherwise.v[i]);
  return out;
}

}  // namespace

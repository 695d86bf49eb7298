#include "../simd/region.h"
#include "grouped_conv2d_backward.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
namespace {
constexpr int kMostPairs = 8, kMostChannels = 8, kPixels = 4;

template <int kUnit>
constexpr bool kRepeatsInFma = kUnit == 1;

// acc += vrepeat<kUnit>(p) * b
template <int kUnit>
FB_INLINE void vfma_repeated(V& acc, const float* p, V b) {
  if constexpr (kUnit == 1) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*p));
  } else {
    vfma_into(acc, vrepeat<kUnit>(p), b);
  }
}

// A store of an aligned vector that does not read the cache line first; what makes all of them visible.
FB_INLINE void vstream(float* p, V v) { _mm512_stream_ps(p, v); }
FB_INLINE void vstreamed() { _mm_sfence(); }
}  // namespace
#include "generic.h"
FB_END_TARGET
const fb::grouped_conv2d_backward::Kernels fb::grouped_conv2d_backward::kAvx512 = FB_GROUPED_BACKWARD_KERNELS;
#endif

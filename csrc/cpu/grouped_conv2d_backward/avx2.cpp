#include "../simd/region.h"
#include "grouped_conv2d_backward.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
namespace {
constexpr int kMostPairs = 4, kMostChannels = 4, kPixels = 2;

template <int>
constexpr bool kRepeatsInFma = false;

template <int kUnit>
FB_INLINE void vfma_repeated(V& acc, const float* p, V b) {
  vfma_into(acc, vrepeat<kUnit>(p), b);
}

// A store of an aligned vector that does not read the cache line first; what makes all of them visible.
FB_INLINE void vstream(float* p, V v) { _mm256_stream_ps(p, v); }
FB_INLINE void vstreamed() { _mm_sfence(); }
}  // namespace
#include "generic.h"
FB_END_TARGET
const fb::grouped_conv2d_backward::Kernels fb::grouped_conv2d_backward::kAvx2 = FB_GROUPED_BACKWARD_KERNELS;
#endif

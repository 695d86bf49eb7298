#include "../simd/region.h"
#include "depthwise_conv2d_backward.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "../simd/part.h"
namespace {
// A store of an aligned vector that does not read the cache line first; what makes all of them visible.
FB_INLINE void vstream(float* p, V v) { _mm256_stream_ps(p, v); }
FB_INLINE void vstreamed() { _mm_sfence(); }
}  // namespace
#include "generic.h"
FB_END_TARGET
const fb::depthwise_conv2d_backward::Kernels fb::depthwise_conv2d_backward::kAvx2 = FB_DEPTHWISE_BACKWARD_KERNELS;
#endif

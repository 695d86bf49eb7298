// Transformed inputs are stored as bfloat16, two channels in a word (conv2d/conv2d.h), for products of pairs.
#include "../simd/region.h"
#include "winograd_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/part.h"
namespace {

// A channel that fills up the last word is zero: so were its pixels.
FB_INLINE void store_point(float* v, int64_t c, V x, const Part<false>&) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(v + c / 2), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
FB_INLINE void store_point(float* v, int64_t c, V x, const Part<true>& part) {
  _mm256_mask_storeu_epi32(v + c / 2, static_cast<__mmask8>(vtail((part.left + 1) / 2)), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

}  // namespace
#include "generic.h"
FB_END_TARGET
const fb::winograd_conv2d::Kernels fb::winograd_conv2d::kAvx512Bf16 = FB_WINOGRAD_KERNELS;
#endif

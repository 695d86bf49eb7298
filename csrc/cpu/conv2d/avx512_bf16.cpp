// Products of bfloat16: a word is a pair of channels, and one instruction adds both products of 16 pairs to 16 float32 sums.
#include "../simd/region.h"
#include "conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/product_bf16.h"
#include "change.h"
namespace {

// Channels c .. c + 31 to words, rounded to nearest even.
template <typename C, typename P>
FB_INLINE __m512i pairs(const C& changed, const float* x, int64_t c, const P& low, const P& high) {
  const V first = changed(x, c, low);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(changed(x, c + kLanes, high), first));
}

// See Kernels::change.
void change_to_pairs(const float* x, int64_t step, int64_t pixels, int64_t channels, const float* scale, const float* shift, int64_t activation,
                     float* out, int64_t out_step) {
  const int64_t whole = channels / (2 * kLanes) * (2 * kLanes);
  const int left = static_cast<int>(channels - whole);
  const Part<false> full{kLanes};
  const Part<true> low{left < kLanes ? left : kLanes}, high{left < kLanes ? 0 : left - kLanes};
  const __mmask16 inside = vtail((left + 1) / 2), low_inside = vtail(low.left), high_inside = vtail(high.left);
  with_change(scale, shift, activation, [&](const auto& changed) __attribute__((always_inline)) {
    for (int64_t i = 0; i < pixels; ++i, x += step, out += out_step) {
      for (int64_t c = 0; c < whole; c += 2 * kLanes) _mm512_storeu_si512(out + c / 2, pairs(changed, x, c, full, full));
      if (left == 0) continue;
      // An activation may make something else than 0 of the lanes that do not exist.
      const V first = _mm512_maskz_mov_ps(low_inside, changed(x, whole, low)), second = _mm512_maskz_mov_ps(high_inside, changed(x, whole + kLanes, high));
      _mm512_mask_storeu_epi32(out + whole / 2, inside, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }
  });
}

}  // namespace
#include "generic.h"
#include "avx512_tiles.h"
FB_END_TARGET
const fb::conv2d::Kernels fb::conv2d::kAvx512Bf16 = {kPanel, 14, 2, tiles, narrow, activate_rows, change_to_pairs, nullptr};
#endif

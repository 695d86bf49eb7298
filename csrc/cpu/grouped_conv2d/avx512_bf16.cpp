// Words of two channels in bfloat16: one instruction multiplies both and adds them to the sum.
#include "../simd/region.h"
#include "grouped_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/product_bf16.h"
namespace {

constexpr int kWidestTile = 14;
constexpr int kChannelsPerWord = 2;

FB_INLINE V load_words(const float* x) {
  return _mm512_castsi512_ps(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(vload(x + kLanes), vload(x))));
}

}  // namespace
#include "generic.h"
FB_END_TARGET
const fb::grouped_conv2d::Kernels fb::grouped_conv2d::kAvx512Bf16 = {
    kLanes,
    kChannelsPerWord,
    {FB_GROUPED_NO_ROWS,
     {FB_GROUPED_ROWS(2, 4), FB_GROUPED_ROWS(4, 8), FB_GROUPED_ROWS(8, 16), FB_GROUPED_ROWS(16, 32)},
     {FB_GROUPED_ROWS(1, 4), FB_GROUPED_ROWS(2, 8), FB_GROUPED_ROWS(4, 16), FB_GROUPED_ROWS(8, 32)}},
    {copy<1>, copy<2>, copy<4>, copy<8>, copy<16>, nullptr}};
#endif

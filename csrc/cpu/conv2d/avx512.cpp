#include "../simd/region.h"
#include "conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "change.h"
namespace {
FB_INLINE void vproduct_into(V& sum, V a, V b) { vfma_into(sum, a, b); }
}
#include "generic.h"
namespace {
void (*const tiles[])(const fb::conv2d::Tile&) = {
    nullptr, tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>, tile<7, 2>, tile<8, 2>,
    tile<9, 2>, tile<10, 2>, tile<11, 2>, tile<12, 2>, tile<13, 2>, tile<14, 2>};
void (*const narrow[])(const fb::conv2d::Tile&) = {
    nullptr, tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>, tile<7, 1>, tile<8, 1>,
    tile<9, 1>, tile<10, 1>, tile<11, 1>, tile<12, 1>, tile<13, 1>, tile<14, 1>};
}
FB_END_TARGET
const fb::conv2d::Kernels fb::conv2d::kAvx512 = {kPanel, 14, 1, tiles, narrow, activate_rows, change};
#endif

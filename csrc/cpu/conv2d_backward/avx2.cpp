#include "../simd/region.h"
#include "conv2d_backward.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "generic.h"
namespace {
void (*const tiles[])(const Tile&) = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
}
FB_END_TARGET
const fb::conv2d_backward::Kernels fb::conv2d_backward::kAvx2 = {kPanel, 6, tiles, panel_of, rows_of};
#endif

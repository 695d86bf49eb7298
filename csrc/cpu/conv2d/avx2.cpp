#include "../simd/region.h"
#include "conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "change.h"
#include "../simd/product.h"
#include "generic.h"
#include "planar.h"
namespace {
void (*const tiles[])(const fb::conv2d::Tile&) = {
    nullptr, tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>};
void (*const narrow[])(const fb::conv2d::Tile&) = {
    nullptr, tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>};
}
FB_END_TARGET
const fb::conv2d::Kernels fb::conv2d::kAvx2 = {kPanel, 6, 1, tiles, narrow, activate_rows, change, planar_rows};
#endif

#include "../simd/region.h"
#include "conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
namespace {
constexpr int kVectors = 2;
}
#include "generic.h"
namespace {
void (*const tiles[])(const fb::conv2d::Tile&) = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
}
FB_END_TARGET
const fb::conv2d::Kernels fb::conv2d::kAvx2 = {kPanel, 6, tiles, activate_rows, change};
#endif

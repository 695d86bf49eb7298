#include "../simd/region.h"
#include "conv2d_backward.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "generic.h"
namespace {
void (*const tiles[])(const Tile&) = {nullptr, tile<1>, tile<2>,  tile<3>,  tile<4>,  tile<5>,  tile<6>, tile<7>,
                                      tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};
}
FB_END_TARGET
const fb::conv2d_backward::Kernels fb::conv2d_backward::kAvx512 = {kPanel, 14, tiles, panel_of, rows_of};
#endif

#include "../simd/region.h"
#include "grouped_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
namespace {
constexpr int kWidestTile = 8;
}
#include "floats.h"
FB_END_TARGET
const fb::grouped_conv2d::Kernels fb::grouped_conv2d::kAvx2 = FB_GROUPED_FLOATS;
#endif

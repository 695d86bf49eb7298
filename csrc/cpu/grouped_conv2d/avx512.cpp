#include "../simd/region.h"
#include "grouped_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
namespace {
constexpr int kWidestTile = 14;
}
#include "floats.h"
FB_END_TARGET
const fb::grouped_conv2d::Kernels fb::grouped_conv2d::kAvx512 = FB_GROUPED_FLOATS;
#endif

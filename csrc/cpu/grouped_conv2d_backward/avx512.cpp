#include "../simd/region.h"
#include "grouped_conv2d_backward.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
namespace {
constexpr int kMostPairs = 8, kMostChannels = 8;
}
#include "generic.h"
FB_END_TARGET
const fb::grouped_conv2d_backward::Kernels fb::grouped_conv2d_backward::kAvx512 = FB_GROUPED_BACKWARD_KERNELS;
#endif

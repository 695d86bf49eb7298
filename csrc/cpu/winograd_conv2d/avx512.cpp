#include "../simd/region.h"
#include "winograd_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "float_points.h"
#include "generic.h"
FB_END_TARGET
const fb::winograd_conv2d::Kernels fb::winograd_conv2d::kAvx512 = FB_WINOGRAD_KERNELS;
#endif

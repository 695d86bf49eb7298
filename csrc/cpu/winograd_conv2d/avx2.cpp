#include "../simd/region.h"
#include "winograd_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "float_points.h"
#include "generic.h"
FB_END_TARGET
const fb::winograd_conv2d::Kernels fb::winograd_conv2d::kAvx2 = FB_WINOGRAD_KERNELS;
#endif

#include "../simd/region.h"
#include "depthwise_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
FB_END_TARGET
const fb::depthwise_conv2d::Kernels fb::depthwise_conv2d::kAvx2 = {row, activate_rows};
#endif

#include "../simd/region.h"
#include "depthwise_conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
FB_END_TARGET
const fb::depthwise_conv2d::Kernels fb::depthwise_conv2d::kAvx512 = {row, activate_rows};
#endif

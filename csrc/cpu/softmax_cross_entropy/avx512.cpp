#include "../simd/region.h"
#include "softmax_cross_entropy.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
FB_END_TARGET
const fb::softmax_cross_entropy::Kernels fb::softmax_cross_entropy::kAvx512 = FB_SOFTMAX_CROSS_ENTROPY_KERNELS;
#endif

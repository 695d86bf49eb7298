#include "../simd/region.h"
#include "softmax_cross_entropy.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
FB_END_TARGET
const fb::softmax_cross_entropy::Kernels fb::softmax_cross_entropy::kAvx2 = FB_SOFTMAX_CROSS_ENTROPY_KERNELS;
#endif

#include "../simd/region.h"
#include "pooling.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
#include "average.h"
FB_END_TARGET
const fb::pooling::Kernels fb::pooling::kAvx2 = {windows, max_gradient_row, mean, average_row};
#endif

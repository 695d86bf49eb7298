#include "../simd/region.h"
#include "peaks.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/product.h"
#include "generic.h"
FB_END_TARGET
double fb::peaks::fma_avx512(int64_t rounds) { return product_rounds(rounds); }
#endif

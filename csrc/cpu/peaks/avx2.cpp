#include "../simd/region.h"
#include "peaks.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "../simd/product.h"
#include "generic.h"
FB_END_TARGET
double fb::peaks::fma_avx2(int64_t rounds) { return product_rounds(rounds); }
#endif

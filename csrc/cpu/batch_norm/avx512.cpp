#include "../simd/region.h"
#include "batch_norm.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "../simd/element.h"
#include "../simd/mask.h"
#include "generic.h"
FB_END_TARGET
const fb::batch_norm::Table fb::batch_norm::kAvx512 = FB_BATCH_NORM_KERNELS;
#endif

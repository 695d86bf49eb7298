#include "../simd/region.h"
#include "local_response_norm.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "../simd/part.h"
#include "generic.h"
FB_END_TARGET
const fb::local_response_norm::Kernels fb::local_response_norm::kAvx512 = {FB_LOCAL_RESPONSE_NORM_KERNELS};
#endif

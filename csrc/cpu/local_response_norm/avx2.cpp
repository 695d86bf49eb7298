#include "../simd/region.h"
#include "local_response_norm.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "../simd/part.h"
#include "generic.h"
FB_END_TARGET
const fb::local_response_norm::Kernels fb::local_response_norm::kAvx2 = {FB_LOCAL_RESPONSE_NORM_KERNELS};
#endif

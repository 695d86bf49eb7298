#include "../simd/region.h"
#include "squeeze_excite.h"
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
const fb::squeeze_excite::Table fb::squeeze_excite::kAvx512 = FB_SQUEEZE_EXCITE_KERNELS;
#endif

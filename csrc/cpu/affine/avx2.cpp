#include "../simd/region.h"
#include "affine.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx2,fma")
#include "../simd/vec_avx2.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
FB_END_TARGET
const fb::affine::Kernels fb::affine::kAvx2 = {FB_AFFINE_KERNELS};
#endif

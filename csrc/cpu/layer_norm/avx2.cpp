#include "../simd/region.h"
#include "layer_norm.h"
#if defined(__x86_64__)
FB_BEGIN_TARGET("avx2,fma")
#include "generic.h"
FB_END_TARGET
const fb::layer_norm::Kernels fb::layer_norm::kAvx2 = {FB_LAYER_NORM_KERNELS};
#endif

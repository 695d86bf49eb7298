#include "../simd/region.h"
#include "conv2d.h"
#if defined(__x86_64__)
#include <immintrin.h>
FB_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#include "../simd/vec_avx512.h"
#include "change.h"
#include "../simd/product.h"
#include "generic.h"
#include "planar.h"
#include "avx512_tiles.h"
FB_END_TARGET
const fb::conv2d::Kernels fb::conv2d::kAvx512 = {kPanel, 14, 1, tiles, narrow, activate_rows, change, planar_rows};
#endif

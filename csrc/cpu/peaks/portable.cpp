#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "peaks.h"
namespace {
FB_INLINE void vproduct_into(V& sum, V a, V b) { vfma_into(sum, a, b); }
}
#include "generic.h"
double fb::peaks::fma_portable(int64_t rounds) { return product_rounds(rounds); }

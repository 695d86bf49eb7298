#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "peaks.h"
#include "../simd/product.h"
#include "generic.h"
double fb::peaks::fma_portable(int64_t rounds) { return product_rounds(rounds); }

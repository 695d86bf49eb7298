#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "peaks.h"
#include "generic.h"
double fb::peaks::fma_portable(int64_t rounds) { return fma_rounds(rounds); }

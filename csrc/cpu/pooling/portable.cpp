#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "generic.h"
const fb::pooling::Kernels fb::pooling::kPortable = {window, mean};

#include "../simd/region.h"
#include "affine.h"
#include "../simd/vec_portable.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
const fb::affine::Kernels fb::affine::kPortable = {FB_AFFINE_KERNELS};

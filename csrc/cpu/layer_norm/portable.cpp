#include "../simd/region.h"
#include "layer_norm.h"
#include "generic.h"
const fb::layer_norm::Kernels fb::layer_norm::kPortable = {FB_LAYER_NORM_KERNELS};

#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "generic.h"
const fb::depthwise_conv2d::Kernels fb::depthwise_conv2d::kPortable = {row};

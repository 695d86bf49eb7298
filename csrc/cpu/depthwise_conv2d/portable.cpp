#include "../simd/region.h"
#include "depthwise_conv2d.h"
#include "../simd/vec_portable.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
const fb::depthwise_conv2d::Kernels fb::depthwise_conv2d::kPortable = {row, activate_rows};

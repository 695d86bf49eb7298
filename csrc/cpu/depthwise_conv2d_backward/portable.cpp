#include "../simd/region.h"
#include "depthwise_conv2d_backward.h"
#include "../simd/vec_portable.h"
#include "../simd/part.h"
#include "generic.h"
const fb::depthwise_conv2d_backward::Kernels fb::depthwise_conv2d_backward::kPortable = FB_DEPTHWISE_BACKWARD_KERNELS;

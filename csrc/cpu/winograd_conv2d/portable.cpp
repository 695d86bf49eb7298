#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "winograd_conv2d.h"
#include "float_points.h"
#include "generic.h"
const fb::winograd_conv2d::Kernels fb::winograd_conv2d::kPortable = FB_WINOGRAD_KERNELS;

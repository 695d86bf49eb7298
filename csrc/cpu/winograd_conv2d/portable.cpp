#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "generic.h"
const fb::winograd_conv2d::Transforms fb::winograd_conv2d::kPortable = {input_transform, output_transform};

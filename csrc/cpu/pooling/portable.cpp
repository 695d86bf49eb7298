#include "../simd/region.h"
#include "pooling.h"
#include "../simd/vec_portable.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
#include "average.h"
const fb::pooling::Kernels fb::pooling::kPortable = {windows, max_gradient_row, mean, average_row};

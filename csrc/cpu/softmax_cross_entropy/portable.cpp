#include "../simd/region.h"
#include "softmax_cross_entropy.h"
#include "../simd/vec_portable.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "generic.h"
const fb::softmax_cross_entropy::Kernels fb::softmax_cross_entropy::kPortable = FB_SOFTMAX_CROSS_ENTROPY_KERNELS;

#include "../simd/region.h"
#include "batch_norm.h"
#include "../simd/vec_portable.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "../simd/element.h"
#include "../simd/mask.h"
#include "generic.h"
const fb::batch_norm::Table fb::batch_norm::kPortable = FB_BATCH_NORM_KERNELS;

#include "../simd/region.h"
#include "local_response_norm.h"
#include "../simd/vec_portable.h"
#include "../simd/part.h"
#include "generic.h"
const fb::local_response_norm::Kernels fb::local_response_norm::kPortable = {FB_LOCAL_RESPONSE_NORM_KERNELS};

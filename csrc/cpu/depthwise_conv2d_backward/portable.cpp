#include "../simd/region.h"
#include "depthwise_conv2d_backward.h"
#include "../simd/vec_portable.h"
#include "../simd/part.h"
namespace {
// A store of an aligned vector that does not read the cache line first; what makes all of them visible.
FB_INLINE void vstream(float* p, V v) { vstore(p, v); }
FB_INLINE void vstreamed() {}
}  // namespace
#include "generic.h"
const fb::depthwise_conv2d_backward::Kernels fb::depthwise_conv2d_backward::kPortable = FB_DEPTHWISE_BACKWARD_KERNELS;

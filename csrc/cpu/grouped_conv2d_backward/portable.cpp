#include "../simd/region.h"
#include "grouped_conv2d_backward.h"
#include "../simd/vec_portable.h"
namespace {
constexpr int kMostPairs = 4, kMostChannels = 4, kPixels = 2;

template <int>
constexpr bool kRepeatsInFma = false;

template <int kUnit>
FB_INLINE void vfma_repeated(V& acc, const float* p, V b) {
  vfma_into(acc, vrepeat<kUnit>(p), b);
}

// A store of an aligned vector that does not read the cache line first; what makes all of them visible.
FB_INLINE void vstream(float* p, V v) { vstore(p, v); }
FB_INLINE void vstreamed() {}
}  // namespace
#include "generic.h"
const fb::grouped_conv2d_backward::Kernels fb::grouped_conv2d_backward::kPortable = FB_GROUPED_BACKWARD_KERNELS;

#include "../simd/region.h"
#include "grouped_conv2d_backward.h"
#include "../simd/vec_portable.h"
namespace {
constexpr int kMostPairs = 4, kMostChannels = 4;
}
#include "generic.h"
const fb::grouped_conv2d_backward::Kernels fb::grouped_conv2d_backward::kPortable = FB_GROUPED_BACKWARD_KERNELS;

#include "../simd/region.h"
#include "../simd/vec_portable.h"
namespace {
constexpr int kWidestTile = 8;
}
#include "floats.h"
const fb::grouped_conv2d::Kernels fb::grouped_conv2d::kPortable = FB_GROUPED_FLOATS;

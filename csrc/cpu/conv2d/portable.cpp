#include "../simd/region.h"
#include "../simd/vec_portable.h"
namespace {
constexpr int kVectors = 2;
}
#include "generic.h"
namespace {
void (*const tiles[])(const fb::conv2d::Tile&) = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>};
}
const fb::conv2d::Kernels fb::conv2d::kPortable = {kPanel, 4, tiles, activate_rows, change};

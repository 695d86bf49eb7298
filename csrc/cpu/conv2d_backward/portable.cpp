#include "../simd/region.h"
#include "conv2d_backward.h"
#include "../simd/vec_portable.h"
#include "generic.h"
namespace {
void (*const tiles[])(const Tile&) = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>};
}
const fb::conv2d_backward::Kernels fb::conv2d_backward::kPortable = {kPanel, 4, tiles, panel_of, rows_of};

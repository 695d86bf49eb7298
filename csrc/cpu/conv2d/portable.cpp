#include "../simd/region.h"
#include "../simd/vec_portable.h"
#include "change.h"
#include "../simd/product.h"
#include "generic.h"
#include "planar.h"
namespace {
void (*const tiles[])(const fb::conv2d::Tile&) = {
    nullptr, tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>};
void (*const narrow[])(const fb::conv2d::Tile&) = {
    nullptr, tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>};
}
const fb::conv2d::Kernels fb::conv2d::kPortable = {kPanel, 4, 1, tiles, narrow, activate_rows, change, planar_rows};

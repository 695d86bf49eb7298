// Words of one channel in float32: groups keep their number of channels or double it.
#pragma once

#include "../simd/product.h"

namespace {

constexpr int kChannelsPerWord = 1;
FB_INLINE V load_words(const float* x) { return vload(x); }

}  // namespace

#include "generic.h"

#define FB_GROUPED_FLOATS                                                                                           \
  {kLanes,                                                                                                          \
   kChannelsPerWord,                                                                                                \
   {{FB_GROUPED_ROWS(4, 4), FB_GROUPED_ROWS(8, 8), FB_GROUPED_ROWS(16, 16), FB_GROUPED_ROWS(32, 32)},               \
    {FB_GROUPED_ROWS(2, 4), FB_GROUPED_ROWS(4, 8), FB_GROUPED_ROWS(8, 16), FB_GROUPED_ROWS(16, 32)},                \
    FB_GROUPED_NO_ROWS},                                                                                            \
   {nullptr, copy<2>, copy<4>, copy<8>, copy<16>, copy<32>}}

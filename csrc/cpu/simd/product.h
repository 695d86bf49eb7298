// What a multiplication in an inner loop is: an fma. Included after a vector header; product_bf16.h takes its place.
#pragma once

namespace {

FB_INLINE void vproduct_into(V& sum, V a, V b) { vfma_into(sum, a, b); }

}  // namespace

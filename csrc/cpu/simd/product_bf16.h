// What a multiplication in an inner loop is: two products of bfloat16, added to one float32 sum. In place of product.h, in an AVX512-BF16
// target region only.
#pragma once

namespace {

// Written out for the same reason as vfma_into. The lower halves are added last; subnormal numbers count as zero.
FB_INLINE void vproduct_into(V& sum, V a, V b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

}  // namespace

// Transformed inputs are stored as they are. Included after a vector header, before generic.h.
#pragma once

#include "../simd/part.h"

namespace {

template <typename P>
FB_INLINE void store_point(float* v, int64_t c, V x, const P& part) {
  part.store(v + c, x);
}

}  // namespace

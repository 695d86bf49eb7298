// Pixels of a map laid apart, zeros or another map between them.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace fb {

// out[n, i, j] = (small[n, i / stride_h, j / stride_w] where both divide and there is such a pixel, else 0) + (added[n, i, j], or 0)
struct Spread {
  RowMap small;  // n images of p x q pixels
  int64_t n, p, q, channels;
  RowMap added;  // n images of h x w, or absent
  int64_t h, w, stride_h, stride_w;
  float* out;    // dense
};

void spread_pixels(const Spread& t);

}  // namespace fb

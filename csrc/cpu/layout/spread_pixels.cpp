#include "spread_pixels.h"

#include <algorithm>

#include "../ops.h"

namespace fb {

namespace {

void pixel(const float* small, const float* added, int64_t channels, float* out) {
  if (small != nullptr && added != nullptr) {
    for (int64_t c = 0; c < channels; ++c) out[c] = small[c] + added[c];
  } else if (small != nullptr || added != nullptr) {
    std::copy_n(small != nullptr ? small : added, channels, out);
  } else {
    std::fill_n(out, channels, 0.0f);
  }
}

}  // namespace

void spread_pixels(const Spread& t) {
  parallel_for(t.n * t.h, t.n * t.h * t.w * t.channels, [&](int64_t row) {
    const int64_t image = row / t.h, i = row % t.h, p = i / t.stride_h;
    const bool has_row = i % t.stride_h == 0 && p < t.p;
    for (int64_t j = 0; j < t.w; ++j) {
      const int64_t q = j / t.stride_w;
      const bool has_pixel = has_row && j % t.stride_w == 0 && q < t.q;
      const float* const small = has_pixel ? t.small.from((image * t.p + p) * t.q + q).data : nullptr;
      pixel(small, t.added.from(row * t.w + j).data, t.channels, t.out + (row * t.w + j) * t.channels);
    }
  });
}

}  // namespace fb

// Output rows of n images cut into tasks: each task makes a block of consecutive rows of one image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops.h"

namespace fb {

class RowBlocks {
 public:
  RowBlocks() = default;
  // About `blocks` blocks per image, of equal height but for the last one.
  RowBlocks(const OpSpec& spec, int64_t blocks)
      : n_(spec.n), p_(spec.p()), q_(spec.q()), height_(ceil_div(p_, blocks)), per_image_(ceil_div(p_, height_)), h_(spec.h), w_(spec.w),
        stride_(spec.stride_h), pad_(spec.pad_h), reach_((spec.r - 1) * spec.dilation_h + 1) {}

  int64_t tasks() const { return n_ * per_image_; }
  int64_t image(int64_t task) const { return task / per_image_; }
  Range rows(int64_t task) const {  // of its image
    const int64_t first = task % per_image_ * height_;
    return {first, std::min(first + height_, p_)};
  }
  int64_t input_rows(int64_t rows) const { return (rows - 1) * stride_ + reach_; }  // that so many output rows see, padding included
  Range input_pixels(int64_t task) const {  // whole rows inside the image
    const Range out = rows(task);
    const int64_t above = image(task) * h_, row = out.begin * stride_ - pad_;
    const int64_t first = std::clamp<int64_t>(row, 0, h_), end = std::clamp<int64_t>(row + input_rows(out.end - out.begin), first, h_);
    return {(above + first) * w_, (above + end) * w_};
  }
  Range tasks_writing(Range pixels) const {
    if (pixels.begin >= pixels.end) return {0, 0};
    return {task_of(pixels.begin), task_of(pixels.end - 1) + 1};
  }

 private:
  int64_t task_of(int64_t pixel) const {
    const int64_t row = pixel / q_;
    return row / p_ * per_image_ + row % p_ / height_;
  }

  int64_t n_ = 1, p_ = 1, q_ = 1, height_ = 1, per_image_ = 1;
  int64_t h_ = 1, w_ = 1, stride_ = 1, pad_ = 0, reach_ = 1;  // of the input's rows
};

}  // namespace fb

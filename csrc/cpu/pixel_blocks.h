// The pixels of n images cut into tasks: each task makes a block of consecutive pixels, whatever image they belong to, from the same
// pixels of x.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops.h"

namespace fb {

class PixelBlocks {
 public:
  // About `task_floats` floats of x for each task, one pixel at least.
  PixelBlocks(const OpSpec& spec, int64_t task_floats)
      : pixels_(spec.n * spec.h * spec.w), per_task_(std::clamp<int64_t>(task_floats / spec.c, 1, pixels_)) {}

  int64_t all() const { return pixels_; }
  int64_t tasks() const { return ceil_div(pixels_, per_task_); }
  Range pixels(int64_t task) const { return {task * per_task_, std::min((task + 1) * per_task_, pixels_)}; }
  Range tasks_writing(Range pixels) const {
    if (pixels.begin >= pixels.end) return {0, 0};
    return {pixels.begin / per_task_, (pixels.end - 1) / per_task_ + 1};
  }

 private:
  int64_t pixels_, per_task_;
};

}  // namespace fb

// Copies between planar [N, C, H, W] and NHWC. Only the ends of a network need them.
#include <algorithm>

#include "../ops.h"

namespace fb {

namespace {

constexpr int64_t kPixels = 256;  // pixels of a task
constexpr int64_t kBlock = 16;    // a block of 16 x 16 floats is read and written by whole cache lines

class Transpose final : public Op {
 public:
  Transpose(const OpSpec& spec, bool to_planar) : Op(spec), to_planar_(to_planar), pixels_(spec.h * spec.w), blocks_(ceil_div(pixels_, kPixels)) {}

  int64_t tasks() const override { return spec_.n * blocks_; }

  void run(int64_t task, const Pointers& pointers, const Worker&) const override {
    const int64_t image = task / blocks_, first = task % blocks_ * kPixels, last = std::min(first + kPixels, pixels_);
    for (int64_t c0 = 0; c0 < spec_.c; c0 += kBlock) {
      for (int64_t i0 = first; i0 < last; i0 += kBlock) {
        for (int64_t c = c0; c < std::min(c0 + kBlock, spec_.c); ++c) {
          for (int64_t i = i0; i < std::min(i0 + kBlock, last); ++i) {
            const int64_t planar = (image * spec_.c + c) * pixels_ + i;
            if (to_planar_) {
              pointers.y[planar] = pointers.x[(image * pixels_ + i) * spec_.ldx + c];
            } else {
              pointers.y[(image * pixels_ + i) * spec_.ldy + c] = pointers.x[planar];
            }
          }
        }
      }
    }
  }

  Range input_pixels(int64_t task) const override {
    const int64_t image = task / blocks_, first = task % blocks_ * kPixels;
    return {image * pixels_ + first, image * pixels_ + std::min(first + kPixels, pixels_)};
  }
  Range tasks_writing(Range pixels) const override {
    if (pixels.begin >= pixels.end) return {0, 0};
    const auto block = [&](int64_t pixel) { return pixel / pixels_ * blocks_ + pixel % pixels_ / kPixels; };
    return {block(pixels.begin), block(pixels.end - 1) + 1};
  }

 private:
  const bool to_planar_;
  const int64_t pixels_, blocks_;
};

}  // namespace

std::unique_ptr<Op> make_to_nchw(const OpSpec& spec) { return std::make_unique<Transpose>(spec, true); }
std::unique_ptr<Op> make_to_nhwc(const OpSpec& spec) { return std::make_unique<Transpose>(spec, false); }

}  // namespace fb

// Max pooling (any window of up to 64 taps, padding, ceil mode) and global average pooling. Other averages: avg_pool2d.cpp.
#include "pooling.h"

#include <algorithm>

#include "../ops.h"
#include "../row_blocks.h"

namespace fb {

namespace pooling {

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

namespace {

class MaxPool2d final : public Op {
 public:
  explicit MaxPool2d(const OpSpec& spec)
      : Op(spec), kernels_(kernels()), p_(spec.p()), q_(spec.q()),
        blocks_(spec, std::max<int64_t>(1, std::min(p_, p_ * q_ * spec.c * spec.r * spec.s / (1 << 18)))) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t image = blocks_.image(task);
    const Range rows = blocks_.rows(task);
    Windows windows;
    windows.channels = spec_.c;
    windows.step = spec_.stride_w * spec_.ldx;
    windows.ldy = spec_.ldy;
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const int64_t h0 = p * spec_.stride_h - spec_.pad_h, h_begin = std::max<int64_t>(h0, 0), h_end = std::min(h0 + spec_.r, spec_.h);
      for (int64_t q = 0; q < q_; q += windows.pixels) {
        const int64_t w0 = q * spec_.stride_w - spec_.pad_w;
        const int64_t inside = w0 < 0 ? 0 : (spec_.w - spec_.s - w0 + spec_.stride_w) / spec_.stride_w;  // windows from here on with all columns
        windows.pixels = std::clamp<int64_t>(inside, 1, q_ - q);
        windows.count = 0;
        for (int64_t h = h_begin; h < h_end; ++h)
          for (int64_t w = std::max<int64_t>(w0, 0); w < std::min(w0 + spec_.s, spec_.w); ++w)
            windows.x[windows.count++] = x.x + ((image * spec_.h + h) * spec_.w + w) * spec_.ldx;
        windows.y = x.y + ((image * p_ + p) * q_ + q) * spec_.ldy;
        kernels_.windows(windows);
      }
    }
  }

  Range input_pixels(int64_t task) const override { return blocks_.input_pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  const Kernels& kernels_;
  const int64_t p_, q_;
  const RowBlocks blocks_;
};

class GlobalAvgPool final : public Op {
 public:
  explicit GlobalAvgPool(const OpSpec& spec) : Op(spec), kernels_(kernels()), split_(std::max<int64_t>(1, spec.c / 256)) {}

  int64_t tasks() const override { return spec_.n * split_; }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t image = task / split_, part = task % split_;
    const int64_t begin = part * spec_.c / split_ / 64 * 64;
    const int64_t end = part + 1 == split_ ? spec_.c : (part + 1) * spec_.c / split_ / 64 * 64;
    const int64_t pixels = spec_.h * spec_.w;
    kernels_.mean({x.x + image * pixels * spec_.ldx + begin, spec_.ldx, pixels, x.y + image * spec_.ldy + begin, end - begin});
  }

  Range input_pixels(int64_t task) const override {
    const int64_t image = task / split_, pixels = spec_.h * spec_.w;
    return {image * pixels, (image + 1) * pixels};
  }
  Range tasks_writing(Range pixels) const override {
    return pixels.begin < pixels.end ? Range{pixels.begin * split_, pixels.end * split_} : Range{0, 0};
  }

 private:
  const Kernels& kernels_;
  const int64_t split_;
};

}  // namespace

}  // namespace pooling

std::unique_ptr<Op> make_max_pool2d(const OpSpec& spec) { return std::make_unique<pooling::MaxPool2d>(spec); }

std::string max_pool2d_refusal(const OpSpec& spec) {
  if (spec.r * spec.s > pooling::kMaxTaps)
    return "window " + std::to_string(spec.r) + "x" + std::to_string(spec.s) + ": max_pool2d handles up to 64 taps";
  return pooling_refusal(spec);
}

std::string pooling_refusal(const OpSpec& spec) {
  if (2 * std::max(spec.pad_h, spec.bottom()) > spec.r || 2 * std::max(spec.pad_w, spec.right()) > spec.s) return "padding is more than half of the window";
  if (spec.dilation_h != 1 || spec.dilation_w != 1) return "dilation " + std::to_string(spec.dilation_h) + ": " + spec.kind + " handles 1";
  if (spec.k != spec.c) return "k differs from c in a pooling op";
  if (spec.p() < 1 || spec.q() < 1)
    return "window " + std::to_string(spec.r) + "x" + std::to_string(spec.s) + " is larger than the padded input " +
           std::to_string(spec.padded_h()) + "x" + std::to_string(spec.padded_w());
  return "";
}

std::unique_ptr<Op> make_global_avg_pool(const OpSpec& spec) { return std::make_unique<pooling::GlobalAvgPool>(spec); }

}  // namespace fb

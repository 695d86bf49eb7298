// Max pooling (any window of up to 64 taps, padding, ceil mode) and global average pooling. Other averages: avg_pool2d.cpp.
#include "pooling.h"

#include <algorithm>

#include "../ops.h"
#include "../row_blocks.h"

namespace fb {

namespace pooling {

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

namespace {

// Some rows of an image of y; taps null: not wanted.
void max_rows(const OpSpec& spec, const Pointers& x, int64_t image, Range rows, uint8_t* taps) {
  const int64_t p_count = spec.p(), q_count = spec.q();
  Windows windows;
  windows.channels = spec.c;
  windows.step = spec.stride_w * spec.ldx;
  windows.ldy = spec.ldy;
  for (int64_t p = rows.begin; p < rows.end; ++p) {
    const int64_t h0 = p * spec.stride_h - spec.pad_h, h_begin = std::max<int64_t>(h0, 0), h_end = std::min(h0 + spec.r, spec.h);
    for (int64_t q = 0; q < q_count; q += windows.pixels) {
      const int64_t w0 = q * spec.stride_w - spec.pad_w;
      const int64_t inside = w0 < 0 ? 0 : (spec.w - spec.s - w0 + spec.stride_w) / spec.stride_w;  // windows from here on with all columns
      windows.pixels = std::clamp<int64_t>(inside, 1, q_count - q);
      windows.count = 0;
      for (int64_t h = h_begin; h < h_end; ++h) {
        for (int64_t w = std::max<int64_t>(w0, 0); w < std::min(w0 + spec.s, spec.w); ++w) {
          windows.tap[windows.count] = static_cast<uint8_t>((h - h0) * spec.s + w - w0);
          windows.x[windows.count++] = x.x + ((image * spec.h + h) * spec.w + w) * spec.ldx;
        }
      }
      const int64_t pixel = (image * p_count + p) * q_count + q;
      windows.y = x.y + pixel * spec.ldy;
      windows.taps = taps != nullptr ? taps + pixel * spec.c : nullptr;
      kernels().windows(windows);
    }
  }
}

class MaxPool2d final : public Op {
 public:
  explicit MaxPool2d(const OpSpec& spec)
      : Op(spec), blocks_(spec, std::max<int64_t>(1, std::min(spec.p(), spec.p() * spec.q() * spec.c * spec.r * spec.s / (1 << 18)))) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    max_rows(spec_, x, blocks_.image(task), blocks_.rows(task), nullptr);
  }

  Range input_pixels(int64_t task) const override { return blocks_.input_pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
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

void max_with_taps(const OpSpec& spec, const Pointers& x, uint8_t* taps) {
  const int64_t p = spec.p();
  parallel_for(spec.n * p, spec.n * p * spec.q() * spec.c * spec.r * spec.s, [&](int64_t row) {
    max_rows(spec, x, row / p, {row % p, row % p + 1}, taps);
  });
}

void max_gradient(const OpSpec& spec, const float* dy, int64_t ldg, const uint8_t* taps, float* dx) {
  const int64_t p = spec.p(), q = spec.q();
  parallel_for(spec.n * spec.h, 4 * spec.n * spec.h * spec.w * spec.c, [&](int64_t index) {
    const int64_t image = index / spec.h, row = index % spec.h + spec.pad_h;
    MaxGradientRow t{};
    t.ldg = ldg;
    t.columns_of_window = spec.s;
    t.stride = spec.stride_w;
    t.pad = spec.pad_w;
    t.q = q;
    t.dx = dx + index * spec.w * spec.c;
    t.width = spec.w;
    t.channels = spec.c;
    const int64_t first = std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, row - spec.r + 1), spec.stride_h));
    for (int64_t i = first; i <= std::min(row / spec.stride_h, p - 1); ++i) {
      t.dy[t.rows] = dy + (image * p + i) * q * ldg;
      t.taps[t.rows] = taps + (image * p + i) * q * spec.c;
      t.r[t.rows++] = row - i * spec.stride_h;
    }
    kernels().max_gradient(t);
  });
}

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

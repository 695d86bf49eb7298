// Depthwise convolution: y[n, p, q, c] = act( sum_rs pre(x[n, p*stride + r*dilation - pad, ..., c]) * weight[c, r, s] + bias[c] ).
//
//   task = (image, block of output rows)
//     for block of channels
//       for output row            depthwise_conv2d/generic.h
#include "depthwise_conv2d.h"

#include <algorithm>

#include "../ops.h"

namespace fb {

namespace depthwise_conv2d {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return kAvx512;
  if (isa() == Isa::avx2) return kAvx2;
#endif
  return kPortable;
}

namespace {

constexpr int64_t kTaskProducts = 1 << 19;
constexpr int64_t kChannelBlock = 128;  // the 27 KB that a tile of 9 columns reads fit L1. 1024x7x7: 12 us; 14 with all channels at once

class DepthwiseConv2d final : public Op {
 public:
  explicit DepthwiseConv2d(const OpSpec& spec) : Op(spec), kernels_(kernels()), p_(spec.p()), q_(spec.q()) {
    const int64_t row_products = q_ * spec.c * spec.r * spec.s;
    const int64_t blocks = ceil_div(p_, std::clamp<int64_t>(kTaskProducts / row_products, 1, p_));
    rows_per_task_ = ceil_div(p_, blocks);
    blocks_per_image_ = ceil_div(p_, rows_per_task_);
  }

  int64_t tasks() const override { return spec_.n * blocks_per_image_; }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t image = task / blocks_per_image_, first = task % blocks_per_image_ * rows_per_task_;
    const int64_t end = std::min(first + rows_per_task_, p_);
    Row row = shape();
    for (int64_t c = 0; c < spec_.c; c += kChannelBlock) {
      const auto at = [c](const float* pointer) { return pointer != nullptr ? pointer + c : nullptr; };
      row.channels = std::min(kChannelBlock, spec_.c - c);
      row.weight = x.weight + c;
      row.bias = at(x.bias);
      row.pre_scale = at(x.pre_scale);
      row.pre_shift = at(x.pre_shift);
      for (int64_t p = first; p < end; ++p) {
        for (int64_t r = 0; r < spec_.r; ++r) {
          const int64_t h = p * spec_.stride_h + r * spec_.dilation_h - spec_.pad_h;
          row.x[r] = h < 0 || h >= spec_.h ? nullptr : x.x + (image * spec_.h + h) * spec_.w * spec_.ldx + c;
        }
        row.y = x.y + (image * p_ + p) * q_ * spec_.ldy + c;
        kernels_.row(row);
      }
    }
  }

  Range input_pixels(int64_t task) const override {
    const int64_t image = task / blocks_per_image_, row = task % blocks_per_image_ * rows_per_task_;
    const int64_t last_row = std::min(row + rows_per_task_, p_) - 1;
    const int64_t first = std::clamp<int64_t>(row * spec_.stride_h - spec_.pad_h, 0, spec_.h);
    const int64_t end = std::clamp<int64_t>(last_row * spec_.stride_h - spec_.pad_h + (spec_.r - 1) * spec_.dilation_h + 1, first, spec_.h);
    return {(image * spec_.h + first) * spec_.w, (image * spec_.h + end) * spec_.w};
  }
  Range tasks_writing(Range pixels) const override {
    if (pixels.begin >= pixels.end) return {0, 0};
    const auto block = [&](int64_t pixel) {
      const int64_t row = pixel / q_;
      return row / p_ * blocks_per_image_ + row % p_ / rows_per_task_;
    };
    return {block(pixels.begin), block(pixels.end - 1) + 1};
  }

  std::string detail() const override {
    return std::string(isa_name(isa())) + " depthwise rows, " + std::to_string(tasks()) + " tasks";
  }

 private:
  Row shape() const {
    Row row{};
    row.ldx = spec_.ldx;
    row.width = spec_.w;
    row.ldw = spec_.c;
    row.ldy = spec_.ldy;
    row.pixels = q_;
    row.r = spec_.r;
    row.s = spec_.s;
    row.stride = spec_.stride_w;
    row.dilation = spec_.dilation_w;
    row.pad = spec_.pad_w;
    row.pre_activation = spec_.pre_activation;
    row.activation = spec_.activation;
    return row;
  }

  const Kernels& kernels_;
  const int64_t p_, q_;
  int64_t rows_per_task_ = 1, blocks_per_image_ = 1;
};

}  // namespace

}  // namespace depthwise_conv2d

std::unique_ptr<Op> make_depthwise_conv2d(const OpSpec& spec) { return std::make_unique<depthwise_conv2d::DepthwiseConv2d>(spec); }

std::string depthwise_conv2d_refusal(const OpSpec& spec) {
  if (spec.groups != spec.c || spec.k != spec.c)
    return std::to_string(spec.groups) + " groups of " + std::to_string(spec.c) + " to " + std::to_string(spec.k) + " channels: depthwise rows have one filter per channel";
  if (spec.r > depthwise_conv2d::kMaxWindow || spec.s > depthwise_conv2d::kMaxWindow)
    return "kernel " + std::to_string(spec.r) + "x" + std::to_string(spec.s) + ": depthwise rows handle up to 7x7";
  if (spec.nchw_in) return "planar input: depthwise rows read NHWC";
  if (spec.pre_activation < kNone || spec.pre_activation > kRelu6) return "its input takes no other activation than relu and relu6";
  return "";
}

int64_t depthwise_conv2d_packed_floats(const OpSpec& spec) { return spec.c * spec.r * spec.s; }

// [r][s][c]
void depthwise_conv2d_pack(const OpSpec& spec, const float* weight, float* out) {
  const int64_t taps = spec.r * spec.s;
  for (int64_t c = 0; c < spec.c; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) out[tap * spec.c + c] = weight[c * taps + tap];
}

}  // namespace fb

// Depthwise convolution: y[n, p, q, c] = act( sum_rs pre(x[n, p*stride + r*dilation - pad, ..., c]) * weight[c, r, s] + bias[c] ).
//
//   task = (image, block of output rows)
//     for block of channels
//       for output row            depthwise_conv2d/generic.h
#include "depthwise_conv2d.h"

#include <algorithm>

#include "../ops.h"
#include "../row_blocks.h"
#include "rows.h"

namespace fb {

namespace depthwise_conv2d {

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

namespace {

constexpr int64_t kTaskProducts = 1 << 19;
constexpr int64_t kChannelBlock = 128;  // the 27 KB that a tile of 9 columns reads fit L1. 1024x7x7: 12 us; 14 with all channels at once

Row shape_of(const OpSpec& spec) {
  Row row{};
  row.ldx = spec.ldx;
  row.width = spec.w;
  row.ldw = spec.c;
  row.pixels = spec.q();
  row.r = spec.r;
  row.s = spec.s;
  row.stride = spec.stride_w;
  row.dilation = spec.dilation_w;
  row.pad = spec.pad_w;
  row.pre_activation = spec.pre_activation;
  row.activation = spec.activation <= kRelu6 ? spec.activation : int64_t{kNone};
  return row;
}

}  // namespace

void compute_rows(const OpSpec& spec, const Pointers& x, Range rows, float* y, int64_t ldy) {
  const Kernels& own = kernels();
  const int64_t rows_of_image = spec.p();
  Row row = shape_of(spec);
  row.ldy = ldy;
  for (int64_t c = 0; c < spec.c; c += kChannelBlock) {
    const auto at = [c](const float* pointer) { return pointer != nullptr ? pointer + c : nullptr; };
    row.channels = std::min(kChannelBlock, spec.c - c);
    row.weight = x.weight + c;
    row.bias = at(x.bias);
    row.pre_scale = at(x.pre_scale);
    row.pre_shift = at(x.pre_shift);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t image = i / rows_of_image, first = i % rows_of_image * spec.stride_h - spec.pad_h;
      for (int64_t r = 0; r < spec.r; ++r) {
        const int64_t h = first + r * spec.dilation_h;
        row.x[r] = h < 0 || h >= spec.h ? nullptr : x.x + (image * spec.h + h) * spec.w * spec.ldx + c;
      }
      row.y = y + (i - rows.begin) * row.pixels * ldy + c;
      own.row(row);
      if (spec.activation > kRelu6) own.activate(row.y, ldy, row.pixels, row.channels, spec.activation);
    }
  }
}

namespace {

class DepthwiseConv2d final : public Op {
 public:
  explicit DepthwiseConv2d(const OpSpec& spec) : Op(spec), p_(spec.p()), q_(spec.q()) {
    const int64_t row_products = q_ * spec.c * spec.r * spec.s;
    blocks_ = RowBlocks(spec, ceil_div(p_, std::clamp<int64_t>(kTaskProducts / row_products, 1, p_)));
  }

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t above = blocks_.image(task) * p_;  // rows of the images before
    const Range rows = blocks_.rows(task);
    compute_rows(spec_, x, {above + rows.begin, above + rows.end}, x.y + (above + rows.begin) * q_ * spec_.ldy, spec_.ldy);
  }

  Range input_pixels(int64_t task) const override { return blocks_.input_pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

  std::string detail() const override {
    return std::string(isa_name(isa())) + " depthwise rows, " + std::to_string(tasks()) + " tasks";
  }

 private:
  const int64_t p_, q_;
  RowBlocks blocks_;
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

// Average pooling, with PyTorch's divisors, and adaptive average pooling to any size.
//
// Windows of a plain average are cut at the padded image for the divisor (count_include_pad), unless one is given, and at the image for
// the sum. Adaptive window i of m over n pixels is [i n / m, (i + 1) n / m), rounded down and up. task = (image, block of output rows).
#include <algorithm>
#include <vector>

#include "../ops.h"
#include "../row_blocks.h"
#include "pooling.h"

namespace fb {

namespace pooling {

namespace {

struct Axis {
  int64_t size, outputs, window, stride, pad, pad_after;
  bool adaptive, count_pad;
};

std::vector<Extent> extents(const Axis& axis) {
  std::vector<Extent> out;
  for (int64_t i = 0; i < axis.outputs; ++i) {
    if (axis.adaptive) {
      const int64_t begin = i * axis.size / axis.outputs, end = ceil_div((i + 1) * axis.size, axis.outputs);
      out.push_back({begin, end, end - begin});
      continue;
    }
    const int64_t begin = i * axis.stride - axis.pad, end = std::min(begin + axis.window, axis.size + axis.pad_after);
    const int64_t inside = std::max<int64_t>(begin, 0), inside_end = std::min(end, axis.size);
    out.push_back({inside, inside_end, axis.count_pad ? end - begin : inside_end - inside});
  }
  return out;
}

// The pixels that AverageRow calls sliding: a run of windows of 3, one column apart.
Range sliding_pixels(const std::vector<Extent>& columns) {
  const auto fits = [&](size_t i) {
    const Extent& one = columns[i];
    return one.end - one.begin == 3;
  };
  size_t begin = 0;
  while (begin < columns.size() && !fits(begin)) ++begin;
  size_t end = begin;
  while (end < columns.size() && fits(end) && columns[end].begin == columns[begin].begin + static_cast<int64_t>(end - begin)) ++end;
  return {static_cast<int64_t>(begin), static_cast<int64_t>(end)};
}

class AvgPool2d final : public Op {
 public:
  explicit AvgPool2d(const OpSpec& spec) : Op(spec), kernels_(kernels()), p_(spec.p()), q_(spec.q()) {
    const bool adaptive = spec.out_h > 0, count_pad = spec.count_include_pad != 0;
    rows_ = extents({spec.h, p_, spec.r, spec.stride_h, spec.pad_h, spec.bottom(), adaptive, count_pad});
    columns_ = extents({spec.w, q_, spec.s, spec.stride_w, spec.pad_w, spec.right(), adaptive, count_pad});
    if (spec.divisor != 0) {
      for (Extent& row : rows_) row.count = spec.divisor;
      for (Extent& column : columns_) column.count = 1;
    }
    sliding_ = sliding_pixels(columns_);
    int64_t highest = 0, reads = 0;
    for (const Extent& row : rows_) {
      highest = std::max(highest, row.end - row.begin);
      reads += (row.end - row.begin) * spec.w * spec.c;
    }
    if (highest > kChain) sliding_ = {0, 0};
    blocks_ = RowBlocks(spec, std::clamp<int64_t>(reads / kTaskReads, 1, p_));
  }

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t image = blocks_.image(task);
    const Range rows = blocks_.rows(task);
    AverageRow row{};
    row.row_step = spec_.w * spec_.ldx;
    row.ldx = spec_.ldx;
    row.columns = columns_.data();
    row.sliding_begin = sliding_.begin;
    row.sliding_end = sliding_.end;
    row.bias = x.bias;
    row.activation = spec_.activation;
    row.ldy = spec_.ldy;
    row.pixels = q_;
    row.channels = spec_.c;
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const Extent window = rows_[p];
      row.x = x.x + (image * spec_.h + window.begin) * row.row_step;
      row.rows = window.end - window.begin;
      row.row_count = window.count;
      row.y = x.y + (image * p_ + p) * q_ * spec_.ldy;
      kernels_.average_row(row);
    }
  }

  Range input_pixels(int64_t task) const override {
    const int64_t above = blocks_.image(task) * spec_.h;
    const Range rows = blocks_.rows(task);
    return {(above + rows_[rows.begin].begin) * spec_.w, (above + rows_[rows.end - 1].end) * spec_.w};
  }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  static constexpr int64_t kTaskReads = 1 << 17;

  const Kernels& kernels_;
  const int64_t p_, q_;
  std::vector<Extent> rows_, columns_;
  Range sliding_{0, 0};
  RowBlocks blocks_;
};

}  // namespace

}  // namespace pooling

std::unique_ptr<Op> make_avg_pool2d(const OpSpec& spec) { return std::make_unique<pooling::AvgPool2d>(spec); }

std::string avg_pool2d_refusal(const OpSpec& spec) {
  if (spec.out_h == 0 && spec.out_w == 0) return pooling_refusal(spec);
  if (spec.out_h < 1 || spec.out_w < 1) return "output size " + std::to_string(spec.out_h) + "x" + std::to_string(spec.out_w) + " is not positive";
  if (spec.out_h > (int64_t{1} << 31) || spec.out_w > (int64_t{1} << 31)) return "output size is too large";
  if (spec.k != spec.c) return "k differs from c in a pooling op";
  return "";
}

}  // namespace fb

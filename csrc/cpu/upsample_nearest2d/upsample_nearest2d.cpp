// A map of another size, each pixel that of the nearest input pixel below: y[n, p, q] = x[n, floor(p * h / out_h), floor(q * w / out_w)],
// the ratio and the product in float, as PyTorch computes them. task = (image, block of output rows).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../ops.h"
#include "../row_blocks.h"

namespace fb {

namespace upsample_nearest2d {

namespace {

constexpr int64_t kTaskFloats = 1 << 15;

std::vector<int64_t> nearest(int64_t in, int64_t out) {
  const float ratio = static_cast<float>(in) / static_cast<float>(out);
  std::vector<int64_t> found(static_cast<size_t>(out));
  for (int64_t i = 0; i < out; ++i)
    found[static_cast<size_t>(i)] = std::min<int64_t>(static_cast<int64_t>(std::floor(static_cast<float>(i) * ratio)), in - 1);
  return found;
}

class UpsampleNearest2d final : public Op {
 public:
  explicit UpsampleNearest2d(const OpSpec& spec)
      : Op(spec),
        p_(spec.p()),
        q_(spec.q()),
        blocks_(spec, std::clamp<int64_t>(p_ * q_ * spec.c / kTaskFloats, 1, p_)),
        row_(nearest(spec.h, p_)),
        column_(nearest(spec.w, q_)) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t image = blocks_.image(task);
    const Range rows = blocks_.rows(task);
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const float* from = x.x + (image * spec_.h + row_[static_cast<size_t>(p)]) * spec_.w * spec_.ldx;
      float* y = x.y + (image * p_ + p) * q_ * spec_.ldy;
      for (int64_t q = 0; q < q_; ++q)
        std::memcpy(y + q * spec_.ldy, from + column_[static_cast<size_t>(q)] * spec_.ldx, static_cast<size_t>(spec_.c) * 4);
    }
  }

  Range input_pixels(int64_t task) const override {
    const int64_t above = blocks_.image(task) * spec_.h;
    const Range rows = blocks_.rows(task);
    const int64_t first = row_[static_cast<size_t>(rows.begin)], last = row_[static_cast<size_t>(rows.end - 1)];
    return {(above + first) * spec_.w, (above + last + 1) * spec_.w};
  }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  const int64_t p_, q_;
  const RowBlocks blocks_;
  const std::vector<int64_t> row_, column_;  // of x, for each of y
};

}  // namespace

}  // namespace upsample_nearest2d

std::unique_ptr<Op> make_upsample_nearest2d(const OpSpec& spec) {
  return std::make_unique<upsample_nearest2d::UpsampleNearest2d>(spec);
}

std::string upsample_nearest2d_refusal(const OpSpec& spec) {
  if (spec.k != spec.c) return "k differs from c in upsample_nearest2d";
  if (spec.out_h < 1 || spec.out_w < 1) return "the output size is missing";
  return "";
}

}  // namespace fb

// A map with a border: y[n, p, q, c] = x[n, p - pad_h, q - pad_w, c] inside the image, `border` around it.
//
// For borders that no reader of y can do by itself. task = (image, block of output rows).
#include <algorithm>
#include <cstring>

#include "../ops.h"
#include "../row_blocks.h"

namespace fb {

namespace pad2d {

namespace {

constexpr int64_t kTaskFloats = 1 << 15;

class Pad2d final : public Op {
 public:
  explicit Pad2d(const OpSpec& spec)
      : Op(spec), p_(spec.p()), q_(spec.q()), border_(static_cast<float>(spec.border)),
        blocks_(spec, std::clamp<int64_t>(p_ * q_ * spec.c / kTaskFloats, 1, p_)) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t image = blocks_.image(task), inside_end = spec_.pad_w + spec_.w;
    const Range rows = blocks_.rows(task);
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      float* y = x.y + (image * p_ + p) * q_ * spec_.ldy;
      const int64_t row = p - spec_.pad_h;
      if (row < 0 || row >= spec_.h) {
        fill(y, q_);
        continue;
      }
      fill(y, spec_.pad_w);
      copy(x.x + (image * spec_.h + row) * spec_.w * spec_.ldx, y + spec_.pad_w * spec_.ldy);
      fill(y + inside_end * spec_.ldy, q_ - inside_end);
    }
  }

  // One row at least, so that a task of border alone waits for its producer, too.
  Range input_pixels(int64_t task) const override {
    const int64_t above = blocks_.image(task) * spec_.h;
    const Range rows = blocks_.rows(task);
    const int64_t first = std::clamp<int64_t>(rows.begin - spec_.pad_h, 0, spec_.h - 1);
    const int64_t end = std::clamp<int64_t>(rows.end - spec_.pad_h, first + 1, spec_.h);
    return {(above + first) * spec_.w, (above + end) * spec_.w};
  }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  void fill(float* y, int64_t pixels) const {
    for (int64_t i = 0; i < pixels; ++i) std::fill(y + i * spec_.ldy, y + i * spec_.ldy + spec_.c, border_);
  }

  void copy(const float* x, float* y) const {
    for (int64_t i = 0; i < spec_.w; ++i) std::memcpy(y + i * spec_.ldy, x + i * spec_.ldx, static_cast<size_t>(spec_.c) * 4);
  }

  const int64_t p_, q_;
  const float border_;
  const RowBlocks blocks_;
};

}  // namespace

}  // namespace pad2d

std::unique_ptr<Op> make_pad2d(const OpSpec& spec) { return std::make_unique<pad2d::Pad2d>(spec); }

}  // namespace fb

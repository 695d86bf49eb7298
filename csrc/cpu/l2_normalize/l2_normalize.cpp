// Pixels of length one: y[i, c] = x[i, c] / max(sqrt(sum_c x[i, c]^2), eps), a pixel i being a row [C] or a point of a map.
//
// The length is summed in double and rounded to float, as PyTorch returns it; the division is float. task = a run of pixels.
#include <cmath>

#include "../ops.h"
#include "../pixel_blocks.h"
#include "../sum_in_double.h"

namespace fb {

namespace l2_normalize {

namespace {

constexpr int64_t kTaskFloats = 1 << 14;

class L2Normalize final : public Op {
 public:
  explicit L2Normalize(const OpSpec& spec) : Op(spec), blocks_(spec, kTaskFloats), least_(static_cast<float>(spec.eps)) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const Range pixels = input_pixels(task);
    for (int64_t i = pixels.begin; i < pixels.end; ++i) normalize(x.x + i * spec_.ldx, x.y + i * spec_.ldy);
  }

  Range input_pixels(int64_t task) const override { return blocks_.pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  void normalize(const float* x, float* y) const {
    const double squares = sum_in_double(spec_.c, [x](int64_t c) { return static_cast<double>(x[c]) * static_cast<double>(x[c]); });
    const float length = static_cast<float>(std::sqrt(squares));
    const float divisor = length < least_ ? least_ : length;  // NaN stays
    for (int64_t c = 0; c < spec_.c; ++c) y[c] = x[c] / divisor;
  }

  const PixelBlocks blocks_;
  const float least_;
};

}  // namespace

}  // namespace l2_normalize

std::unique_ptr<Op> make_l2_normalize(const OpSpec& spec) { return std::make_unique<l2_normalize::L2Normalize>(spec); }

std::string l2_normalize_refusal(const OpSpec& spec) {
  if (spec.k != spec.c) return "k differs from c in l2_normalize";
  if (!(spec.eps >= 0)) return "eps is " + std::to_string(spec.eps) + ", expected 0 or more";
  return "";
}

}  // namespace fb

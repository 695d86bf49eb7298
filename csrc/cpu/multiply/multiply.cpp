// The product of two maps of one size, element by element; the second lies where a residual does. task = a run of pixels.
#include "../ops.h"
#include "../pixel_blocks.h"

namespace fb {

namespace multiply {

namespace {

constexpr int64_t kTaskFloats = 1 << 15;

class Multiply final : public Op {
 public:
  explicit Multiply(const OpSpec& spec) : Op(spec), blocks_(spec, kTaskFloats) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const Range pixels = input_pixels(task);
    for (int64_t i = pixels.begin; i < pixels.end; ++i) {
      const float* a = x.x + i * spec_.ldx;
      const float* b = x.residual + i * spec_.ldr;
      float* y = x.y + i * spec_.ldy;
      for (int64_t c = 0; c < spec_.c; ++c) y[c] = a[c] * b[c];
    }
  }

  Range input_pixels(int64_t task) const override { return blocks_.pixels(task); }
  Range residual_pixels(int64_t task) const override { return input_pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  const PixelBlocks blocks_;
};

}  // namespace

}  // namespace multiply

std::unique_ptr<Op> make_multiply(const OpSpec& spec) { return std::make_unique<multiply::Multiply>(spec); }

}  // namespace fb

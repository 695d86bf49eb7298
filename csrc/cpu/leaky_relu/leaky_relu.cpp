// y = x where x > 0, else alpha * x (Maas et al., 2013): a pass of its own, which may write where it reads. task = a run of pixels.
#include "../ops.h"
#include "../pixel_blocks.h"

namespace fb {

namespace leaky_relu {

namespace {

constexpr int64_t kTaskFloats = 1 << 15;

class LeakyRelu final : public Op {
 public:
  explicit LeakyRelu(const OpSpec& spec) : Op(spec), blocks_(spec, kTaskFloats), slope_(static_cast<float>(spec.alpha)) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const Range pixels = input_pixels(task);
    for (int64_t i = pixels.begin; i < pixels.end; ++i) {
      const float* from = x.x + i * spec_.ldx;
      float* y = x.y + i * spec_.ldy;
      for (int64_t c = 0; c < spec_.c; ++c) y[c] = from[c] > 0.0f ? from[c] : from[c] * slope_;
    }
  }

  Range input_pixels(int64_t task) const override { return blocks_.pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  const PixelBlocks blocks_;
  const float slope_;
};

}  // namespace

}  // namespace leaky_relu

std::unique_ptr<Op> make_leaky_relu(const OpSpec& spec) { return std::make_unique<leaky_relu::LeakyRelu>(spec); }

}  // namespace fb

// Layer normalisation (Ba et al., 2016) over the channels of each pixel of a map, or of each row [C]:
// y[i, c] = (x[i, c] - mean_i) / sqrt(variance_i + eps) * scale[c] + shift[c], with the variance of all C values.
//
// Mean and variance are summed in double and used as floats. task = a run of pixels.
#include "layer_norm.h"

#include "../ops.h"
#include "../pixel_blocks.h"

namespace fb {

namespace layer_norm {

namespace {

constexpr int64_t kTaskFloats = 1 << 14;

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

class LayerNorm final : public Op {
 public:
  explicit LayerNorm(const OpSpec& spec) : Op(spec), blocks_(spec, kTaskFloats), run_(kernels().pixels) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const Range range = input_pixels(task);
    Pixels part{};
    part.x = x.x + range.begin * spec_.ldx;
    part.ldx = spec_.ldx;
    part.scale = x.weight;
    part.shift = x.bias;
    part.y = x.y + range.begin * spec_.ldy;
    part.ldy = spec_.ldy;
    part.count = range.end - range.begin;
    part.channels = spec_.c;
    part.eps = spec_.eps;
    run_(part);
  }

  Range input_pixels(int64_t task) const override { return blocks_.pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  const PixelBlocks blocks_;
  void (*const run_)(const Pixels&);
};

}  // namespace

}  // namespace layer_norm

std::unique_ptr<Op> make_layer_norm(const OpSpec& spec) { return std::make_unique<layer_norm::LayerNorm>(spec); }

}  // namespace fb

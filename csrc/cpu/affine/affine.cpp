// Per-channel scaling of a map: y[n, h, w, c] = act( (x[n, h, w, c] * scale[c] + shift[c]) * gate[n, c] + residual[n, h, w, c] ).
//
// Scale (the op's weight), shift (its bias), gate and residual may each be absent; with none of them it copies, for instance a map into
// a slice of a wider one. y may be x. task = a run of pixels.
#include "affine.h"

#include <algorithm>

#include "../ops.h"
#include "../pixel_blocks.h"

namespace fb {

namespace affine {

namespace {

constexpr int64_t kTaskFloats = 1 << 15;

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

class Affine final : public Op {
 public:
  explicit Affine(const OpSpec& spec) : Op(spec), blocks_(spec, kTaskFloats), run_(kernels().pixels[spec.activation]) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const int64_t image = spec_.gated != 0 ? spec_.h * spec_.w : blocks_.all();  // pixels with the same gate
    const Range range = input_pixels(task);
    for (int64_t begin = range.begin; begin < range.end;) {
      const int64_t end = std::min(range.end, (begin / image + 1) * image);
      Pixels part{};
      part.x = x.x + begin * spec_.ldx;
      part.ldx = spec_.ldx;
      part.scale = x.weight;
      part.shift = x.bias;
      if (spec_.gated != 0) part.gate = x.gate + begin / image * spec_.ldg;
      if (x.residual != nullptr) part.residual = x.residual + begin * spec_.ldr;
      part.ldr = spec_.ldr;
      part.y = x.y + begin * spec_.ldy;
      part.ldy = spec_.ldy;
      part.count = end - begin;
      part.channels = spec_.c;
      run_(part);
      begin = end;
    }
  }

  Range input_pixels(int64_t task) const override { return blocks_.pixels(task); }
  Range residual_pixels(int64_t task) const override { return input_pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  const PixelBlocks blocks_;
  void (*const run_)(const Pixels&);
};

}  // namespace

}  // namespace affine

std::unique_ptr<Op> make_affine(const OpSpec& spec) { return std::make_unique<affine::Affine>(spec); }

}  // namespace fb

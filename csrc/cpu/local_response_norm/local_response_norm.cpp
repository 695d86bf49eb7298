// Local response normalisation (Krizhevsky et al., ImageNet classification with deep convolutional neural networks, 2012), with
// PyTorch's window: y[c] = x[c] / (offset + alpha / size * sum of x^2 over channels [c - size / 2, c + (size - 1) / 2])^beta.
//
// task = a run of pixels.
#include "local_response_norm.h"

#include "../ops.h"
#include "../pixel_blocks.h"

namespace fb {

namespace local_response_norm {

namespace {

constexpr int64_t kTaskFloats = 1 << 14;
constexpr int64_t kMostChannelsInWindow = 64;

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

Root root(double beta) { return beta == 0.5 ? kHalf : beta == 0.75 ? kThreeQuarters : kOne; }

class LocalResponseNorm final : public Op {
 public:
  explicit LocalResponseNorm(const OpSpec& spec)
      : Op(spec), blocks_(spec, kTaskFloats), run_(kernels().pixels[root(spec.beta)]) {
    pitch_ = round_up(spec.c, kMostLanes) + spec.size + kMostLanes;
  }

  int64_t tasks() const override { return blocks_.tasks(); }
  int64_t scratch_floats() const override { return kBlock * pitch_; }

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    const Range range = input_pixels(task);
    Pixels run{};
    run.x = x.x + range.begin * spec_.ldx;
    run.ldx = spec_.ldx;
    run.y = x.y + range.begin * spec_.ldy;
    run.ldy = spec_.ldy;
    run.squares = worker.scratch;
    run.pitch = pitch_;
    run.count = range.end - range.begin;
    run.channels = spec_.c;
    run.size = spec_.size;
    run.factor = static_cast<float>(spec_.alpha / static_cast<double>(spec_.size));
    run.offset = static_cast<float>(spec_.offset);
    run_(run);
  }

  Range input_pixels(int64_t task) const override { return blocks_.pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  const PixelBlocks blocks_;
  void (*const run_)(const Pixels&);
  int64_t pitch_ = 0;
};

}  // namespace

}  // namespace local_response_norm

std::unique_ptr<Op> make_local_response_norm(const OpSpec& spec) {
  return std::make_unique<local_response_norm::LocalResponseNorm>(spec);
}

std::string local_response_norm_refusal(const OpSpec& spec) {
  if (spec.size < 1 || spec.size > local_response_norm::kMostChannelsInWindow)
    return "size " + std::to_string(spec.size) + ": local_response_norm handles 1 to " + std::to_string(local_response_norm::kMostChannelsInWindow);
  if (spec.beta != 0.5 && spec.beta != 0.75 && spec.beta != 1.0)
    return "beta " + std::to_string(spec.beta) + ": local_response_norm handles 0.5, 0.75 and 1";
  if (spec.k != spec.c) return "k differs from c in local_response_norm";
  return "";
}

}  // namespace fb

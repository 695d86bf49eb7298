// Group normalisation (Wu and He, 2018): y = (x - mean) / sqrt(variance + eps) * scale[c] + shift[c], mean and variance over the pixels of
// an image and the C / G channels of a group.
//
// First phase: a task adds up x and x^2 of each channel in double, for a block of rows of an image. Second phase: a task adds the sums of
// all blocks of its image, in their order, and normalises a block. Blocks do not depend on the threads, so neither do the bits.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../ops.h"
#include "../row_blocks.h"

namespace fb {

namespace group_norm {

namespace {

constexpr int64_t kTaskFloats = 1 << 15;
constexpr int64_t kSumFloats = 4;  // two doubles

class GroupNorm final : public Op {
 public:
  explicit GroupNorm(const OpSpec& spec)
      : Op(spec),
        blocks_(spec, std::clamp<int64_t>(spec.h * spec.w * spec.c / kTaskFloats, 1, spec.h)),
        per_image_(blocks_.tasks() / spec.n),
        width_(spec.c / spec.groups) {}

  int64_t tasks() const override { return 2 * blocks_.tasks(); }
  int64_t first_phase_tasks() const override { return blocks_.tasks(); }
  int64_t shared_floats() const override { return blocks_.tasks() * spec_.groups * kSumFloats; }
  int64_t scratch_floats() const override { return 4 * spec_.c; }  // two doubles, or two floats, for each channel

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    if (task < blocks_.tasks()) {
      add_up(task, x, worker);
    } else {
      normalise(task - blocks_.tasks(), x, worker);
    }
  }

  Range input_pixels(int64_t task) const override { return blocks_.input_pixels(task % blocks_.tasks()); }
  Range tasks_writing(Range pixels) const override {
    const Range found = blocks_.tasks_writing(pixels);
    return found.begin < found.end ? Range{blocks_.tasks() + found.begin, blocks_.tasks() + found.end} : found;
  }

 private:
  void add_up(int64_t task, const Pointers& x, const Worker& worker) const {
    double* sums = reinterpret_cast<double*>(worker.scratch);
    double* squares = sums + spec_.c;
    std::fill(sums, sums + 2 * spec_.c, 0.0);
    const Range pixels = blocks_.input_pixels(task);
    for (int64_t i = pixels.begin; i < pixels.end; ++i) {
      const float* from = x.x + i * spec_.ldx;
      for (int64_t c = 0; c < spec_.c; ++c) {
        const double value = static_cast<double>(from[c]);
        sums[c] += value;
        squares[c] += value * value;
      }
    }
    for (int64_t g = 0; g < spec_.groups; ++g) {
      double both[2] = {};
      for (int64_t c = g * width_; c < (g + 1) * width_; ++c) {
        both[0] += sums[c];
        both[1] += squares[c];
      }
      std::memcpy(x.shared + (task * spec_.groups + g) * kSumFloats, both, sizeof(both));
    }
  }

  void normalise(int64_t task, const Pointers& x, const Worker& worker) const {
    float* scale = worker.scratch;
    float* shift = scale + spec_.c;
    const int64_t first = task / per_image_ * per_image_;
    const double count = static_cast<double>(spec_.h * spec_.w * width_);
    for (int64_t g = 0; g < spec_.groups; ++g) {
      double total[2] = {};
      for (int64_t block = first; block < first + per_image_; ++block) {
        double both[2];
        std::memcpy(both, x.shared + (block * spec_.groups + g) * kSumFloats, sizeof(both));
        total[0] += both[0];
        total[1] += both[1];
      }
      const double mean = total[0] / count, variance = total[1] / count - mean * mean;
      const double factor = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + spec_.eps);  // NaN stays
      for (int64_t c = g * width_; c < (g + 1) * width_; ++c) {
        const double own = x.weight != nullptr ? factor * static_cast<double>(x.weight[c]) : factor;
        scale[c] = static_cast<float>(own);
        shift[c] = static_cast<float>((x.bias != nullptr ? static_cast<double>(x.bias[c]) : 0.0) - mean * own);
      }
    }
    const Range pixels = blocks_.input_pixels(task);
    for (int64_t i = pixels.begin; i < pixels.end; ++i) {
      const float* from = x.x + i * spec_.ldx;
      float* y = x.y + i * spec_.ldy;
      for (int64_t c = 0; c < spec_.c; ++c) y[c] = from[c] * scale[c] + shift[c];
    }
  }

  const RowBlocks blocks_;
  const int64_t per_image_, width_;
};

}  // namespace

}  // namespace group_norm

std::unique_ptr<Op> make_group_norm(const OpSpec& spec) { return std::make_unique<group_norm::GroupNorm>(spec); }

}  // namespace fb

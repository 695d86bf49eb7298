// Channels of G groups in turn (Zhang et al., ShuffleNet, 2017): y[i, c * G + g] = x[i, g * C / G + c] for each pixel i.
//
// task = a run of pixels.
#include "../ops.h"
#include "../pixel_blocks.h"

namespace fb {

namespace channel_shuffle {

namespace {

constexpr int64_t kTaskFloats = 1 << 14;

class ChannelShuffle final : public Op {
 public:
  explicit ChannelShuffle(const OpSpec& spec) : Op(spec), blocks_(spec, kTaskFloats) {}

  int64_t tasks() const override { return blocks_.tasks(); }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const Range pixels = input_pixels(task);
    for (int64_t i = pixels.begin; i < pixels.end; ++i) shuffle(x.x + i * spec_.ldx, x.y + i * spec_.ldy);
  }

  Range input_pixels(int64_t task) const override { return blocks_.pixels(task); }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

 private:
  void shuffle(const float* __restrict x, float* __restrict y) const {
    const int64_t groups = spec_.groups, width = spec_.c / groups;
    if (groups == 2) {  // what the compiler makes shuffles of vectors of
      for (int64_t c = 0; c < width; ++c) {
        y[2 * c] = x[c];
        y[2 * c + 1] = x[width + c];
      }
      return;
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < width; ++c) y[c * groups + g] = x[g * width + c];
  }

  const PixelBlocks blocks_;
};

}  // namespace

}  // namespace channel_shuffle

std::unique_ptr<Op> make_channel_shuffle(const OpSpec& spec) { return std::make_unique<channel_shuffle::ChannelShuffle>(spec); }

}  // namespace fb

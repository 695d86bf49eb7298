// Dense convolution of an image in planes to few output channels: rows of pixels (planar.h) from a zero-padded copy of the planes.
//
//   task = (image, block of output rows)
//     copy the input rows, plane by plane
//     for output row                  planar.h
#include <algorithm>
#include <cstring>
#include <vector>

#include "../ops.h"
#include "../row_blocks.h"
#include "conv2d.h"

namespace fb::conv2d {

namespace {

constexpr int64_t kTaskProducts = 1 << 20;
constexpr int64_t kBeyond = 32;  // floats that the last vectors of a row may read behind it

class PlanarConv2d final : public Op {
 public:
  explicit PlanarConv2d(const OpSpec& spec)
      : Op(spec), kernels_(kernels(spec)), p_(spec.p()), q_(spec.q()), width_(round_up(q_, kBeyond) + spec.padded_w()),
        blocks_(spec, std::clamp<int64_t>(ceil_div(p_ * q_ * spec.k * spec.c * spec.r * spec.s, kTaskProducts), 1, p_)) {
    plane_ = blocks_.input_rows(blocks_.rows(0).end) * width_;
    for (int64_t r = 0; r < spec.r; ++r)
      for (int64_t s = 0; s < spec.s; ++s)
        for (int64_t c = 0; c < spec.c; ++c) offsets_.push_back(c * plane_ + r * spec.dilation_h * width_ + s * spec.dilation_w);
  }

  int64_t tasks() const override { return blocks_.tasks(); }
  int64_t scratch_floats() const override { return spec_.c * plane_; }

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    const int64_t image = blocks_.image(task);
    const Range rows = blocks_.rows(task);
    copy(x.x + image * spec_.c * spec_.h * spec_.w, rows, worker.scratch);
    PlanarRow row{};
    row.offsets = offsets_.data();
    row.taps = static_cast<int64_t>(offsets_.size());
    row.weight = x.weight;
    row.ldw = kernels_.panel;
    row.scale = x.scale;
    row.bias = x.bias;
    const bool later = x.residual != nullptr || spec_.activation > kRelu6;
    row.activation = later ? int64_t{kNone} : spec_.activation;
    row.pixels = q_;
    row.ldy = spec_.ldy;
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const int64_t pixel = (image * p_ + p) * q_;
      row.x = worker.scratch + (p - rows.begin) * spec_.stride_h * width_;
      row.y = x.y + pixel * spec_.ldy;
      kernels_.planar[spec_.k](row);
      if (!later) continue;
      if (x.residual != nullptr) add(x.residual + pixel * spec_.ldr, row.y);
      kernels_.activate(row.y, spec_.ldy, q_, spec_.k, spec_.activation);
    }
  }

  Range input_pixels(int64_t task) const override { return blocks_.input_pixels(task); }
  Range residual_pixels(int64_t task) const override {
    const int64_t above = blocks_.image(task) * p_;
    const Range rows = blocks_.rows(task);
    return {(above + rows.begin) * q_, (above + rows.end) * q_};
  }
  Range tasks_writing(Range pixels) const override { return blocks_.tasks_writing(pixels); }

  std::string detail() const override { return std::string(isa_name(isa())) + " planar " + std::to_string(tasks()) + "x1 tasks"; }

 private:
  // The input rows of these output rows, [c][row][width_].
  void copy(const float* image, Range rows, float* out) const {
    const int64_t first = rows.begin * spec_.stride_h - spec_.pad_h, count = blocks_.input_rows(rows.end - rows.begin);
    for (int64_t c = 0; c < spec_.c; ++c)
      for (int64_t i = 0; i < count; ++i) {
        float* row = out + c * plane_ + i * width_;
        const int64_t h = first + i;
        if (h < 0 || h >= spec_.h) {
          std::fill(row, row + width_, 0.0f);
          continue;
        }
        std::fill(row, row + spec_.pad_w, 0.0f);
        std::memcpy(row + spec_.pad_w, image + (c * spec_.h + h) * spec_.w, static_cast<size_t>(spec_.w) * sizeof(float));
        std::fill(row + spec_.pad_w + spec_.w, row + width_, 0.0f);
      }
  }

  void add(const float* residual, float* y) const {
    for (int64_t q = 0; q < q_; ++q)
      for (int64_t k = 0; k < spec_.k; ++k) y[q * spec_.ldy + k] += residual[q * spec_.ldr + k];
  }

  const Kernels& kernels_;
  const int64_t p_, q_, width_ /* of a row of the copy */;
  int64_t plane_ = 0;
  const RowBlocks blocks_;
  std::vector<int64_t> offsets_;
};

}  // namespace

bool is_planar(const OpSpec& spec) {
  const bool plain = spec.groups == 1 && !spec.gated && spec.pre == 0 && spec.pre_activation == kNone && spec.act_from == 0 && spec.bf16 == 0;
  return spec.nchw_in && plain && spec.stride_w == 1 && spec.k <= kPlanarFilters && spec.c * spec.r * spec.s <= kMaxBlock;
}

std::unique_ptr<Op> make_planar(const OpSpec& spec) { return std::make_unique<PlanarConv2d>(spec); }

}  // namespace fb::conv2d

// Depthwise convolution and the 1x1 convolution behind it in one pass: the map between them is never written to memory.
//
//   y = act( conv1x1( depth_act( depthwise(pre_activation(x)) + depth_bias ) ) + bias + residual )
//
// One phase, wherever that gives enough tasks:
//   task = rows of output
//     for as many of the rows as make a few tiles       depthwise rows into scratch (depthwise_conv2d/rows.h)
//       for panels whose weights fit L2                 tiles of conv2d; weights of the next panels are fetched meanwhile
//
// Weights too large for L2 are read once per task, so such a task takes all its rows at once. Two phases, for such weights on few
// pixels: all depthwise rows into memory that the tasks share, then tasks of (pixels, panels) as in conv2d.
// The bits are those of depthwise_conv2d followed by conv2d, however the work is cut.
#include <algorithm>
#include <vector>

#include "../conv2d/conv2d.h"
#include "../conv2d/cut.h"
#include "../depthwise_conv2d/rows.h"
#include "../ops.h"

namespace fb {

namespace separable_conv2d {

namespace {

constexpr int64_t kFewestTasks = 4;
// Of all images: then every thread reads only its share of weights larger than L2. mobilenetv1, one image (14x14 and 7x7 pixels): 1.08 times
// as fast; legacy_xception (19x19): 0.98.
constexpr int64_t kFewPixels = 256;

OpSpec depth_part(OpSpec spec) {
  spec.kind = "depthwise_conv2d";
  spec.groups = spec.k = spec.c;
  spec.activation = spec.depth_activation;
  spec.bf16 = 0;
  spec.depth_activation = kNone;
  return spec;
}

OpSpec pointwise_part(OpSpec spec) {
  spec.kind = "conv2d";
  spec.h = spec.p();
  spec.w = spec.q();
  spec.r = spec.s = spec.stride_h = spec.stride_w = spec.dilation_h = spec.dilation_w = 1;
  spec.pad_h = spec.pad_w = spec.pad_bottom = spec.pad_right = 0;
  spec.pre_activation = spec.depth_activation = kNone;
  return spec;
}

conv2d::Cut cut_of(const OpSpec& spec, const conv2d::Kernels& kernels) {
  conv2d::Cut::Product product{};
  product.images = spec.n;
  product.rows = spec.p();
  product.columns = spec.q();
  product.groups = 1;
  product.depth = product.unit_floats = conv2d::words(kernels, spec.c);
  product.channels = spec.k;
  product.made_rows = spec.n * product.rows;
  product.made_floats = product.columns * product.depth;
  product.whole_panels = true;
  const conv2d::Cut fused(kernels, conv2d::Form::gathered, product);
  const int64_t panels = ceil_div(spec.k, kernels.panel);
  const bool fits = conv2d::panels_in_l2(product.depth * kernels.panel, panels) == panels;
  if (fused.tasks() >= kFewestTasks && (fits || product.images * product.rows * product.columns > kFewPixels)) return fused;
  product.whole_panels = false;
  return conv2d::Cut(kernels, conv2d::Form::gathered, product);
}

class SeparableConv2d final : public Op {
 public:
  explicit SeparableConv2d(const OpSpec& spec)
      : Op(spec), kernels_(conv2d::kernels(spec)), depth_(depth_part(spec)), cut_(cut_of(spec, kernels_)), p_(spec.p()), q_(spec.q()), words_(conv2d::words(kernels_, spec.c)), step_(conv2d::spaced(words_)) {
    segments_ = conv2d::blocked_segments({{0, static_cast<int32_t>(words_), 0}}, spec.bf16 ? conv2d::kMaxPairsBlock : conv2d::kMaxBlock);
    panels_at_once_ = conv2d::panels_in_l2(words_ * kernels_.panel, ceil_div(spec.k, kernels_.panel));
    const int64_t rows = cut_.largest_block() / q_;
    const bool all = panels_at_once_ < ceil_div(spec.k, kernels_.panel);  // then weights are read once per task
    rows_at_once_ = all ? rows : std::min(rows, ceil_div(4 * kernels_.max_rows, q_));
  }

  int64_t tasks() const override { return cut_.tasks(); }
  int64_t first_phase_tasks() const override { return cut_.first_phase(); }
  bool weights_in_parts() const override { return cut_.weights_in_parts(); }
  int64_t scratch_floats() const override { return (spec_.bf16 ? q_ * spec_.c : 0) + (cut_.first_phase() > 0 ? 0 : rows_at_once_ * q_ * step_); }
  int64_t shared_floats() const override { return cut_.first_phase() > 0 ? spec_.n * p_ * q_ * step_ : 0; }

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    if (task < cut_.first_phase()) {
      const Range rows = cut_.made_rows(task);
      return depth_rows(x, rows, worker.scratch, x.shared + rows.begin * q_ * step_);
    }
    const conv2d::Cut::Part part = cut_.part(task);
    conv2d::Ahead ahead = cut_.next_weights(x, part, worker);
    if (cut_.first_phase() > 0) {
      multiply(x, part.pixels, part.panels, x.shared + part.pixels.begin * step_, ahead);
      return;
    }
    if (ahead.weights == nullptr && panels_at_once_ < part.panels.end) ahead = weights_of(x, {0, panels_at_once_});  // the next task begins there
    const Range rows{part.pixels.begin / q_, part.pixels.end / q_};
    float* input = worker.scratch + (spec_.bf16 ? q_ * spec_.c : 0);
    for (int64_t row = rows.begin; row < rows.end; row += rows_at_once_) {
      const Range now{row, std::min(row + rows_at_once_, rows.end)};
      depth_rows(x, now, worker.scratch, input);
      for (int64_t panel = 0; panel < part.panels.end; panel += panels_at_once_) {
        const Range panels{panel, std::min(panel + panels_at_once_, part.panels.end)};
        const Range later{panels.end, std::min(panels.end + panels_at_once_, part.panels.end)};
        conv2d::Ahead fetched = later.begin < later.end ? weights_of(x, later) : ahead;
        // Meanwhile the rows that the next depthwise part reads: of this task or, probably, of the next.
        if (panel == 0 && (now.end < rows.end || worker.left > 0)) {
          fetched.input = x.x + input_end(now.end - 1) * spec_.ldx;
          fetched.input_end = x.x + input_end(std::min(now.end + rows_at_once_, now.end < rows.end ? rows.end : spec_.n * p_) - 1) * spec_.ldx;
        }
        multiply(x, {now.begin * q_, now.end * q_}, panels, input, fetched);
        if (later.begin == later.end) ahead = {fetched.weights, fetched.weights_end, nullptr, nullptr};
      }
    }
  }

  Range input_pixels(int64_t task) const override {
    const int64_t first_phase = cut_.first_phase();
    if (task >= first_phase && first_phase > 0) return {0, 0};  // these wait for the first phase
    Range rows;
    if (first_phase > 0) {
      rows = cut_.made_rows(task);
    } else {
      const Range pixels = cut_.pixels(task);
      rows = {pixels.begin / q_, pixels.end / q_};
    }
    const int64_t first = input_row(rows.begin, 0) * spec_.w;
    return {first, std::max(first, input_end(rows.end - 1))};
  }
  Range residual_pixels(int64_t task) const override { return task < cut_.first_phase() ? Range{0, 0} : cut_.pixels(task); }
  Range tasks_writing(Range pixels) const override { return cut_.tasks_writing(pixels); }

  std::string detail() const override {
    return isa_name(isa()) + std::string(spec_.bf16 ? " bf16" : "") + std::string(cut_.first_phase() > 0 ? " two-phase " : " fused ") + cut_.tasks_text();
  }

 private:
  // The first input row that an output row reads, of all images, or one further below; within its image.
  int64_t input_row(int64_t row, int64_t below) const {
    return row / p_ * spec_.h + std::clamp<int64_t>(row % p_ * spec_.stride_h - spec_.pad_h + below, 0, spec_.h);
  }
  int64_t input_end(int64_t row) const { return input_row(row, (spec_.r - 1) * spec_.dilation_h + 1) * spec_.w; }  // a pixel

  const float* panel_weights(const Pointers& x, int64_t panel) const { return x.weight + panel * kernels_.panel * words_; }

  conv2d::Ahead weights_of(const Pointers& x, Range panels) const {
    return {panel_weights(x, panels.begin), panel_weights(x, panels.end), nullptr, nullptr};
  }

  // `row`: room for one row of floats, where these are not what the products read.
  void depth_rows(const Pointers& x, Range rows, float* row, float* out) const {
    Pointers depth;
    depth.x = x.x;
    depth.weight = x.depth_weight;
    depth.bias = x.depth_bias;
    if (kernels_.channels_per_word == 1) return depthwise_conv2d::compute_rows(depth_, depth, rows, out, step_);
    for (int64_t i = rows.begin; i < rows.end; ++i, out += q_ * step_) {
      depthwise_conv2d::compute_rows(depth_, depth, {i, i + 1}, row, spec_.c);
      kernels_.change(row, spec_.c, q_, spec_.c, nullptr, nullptr, kNone, out, step_);
    }
  }

  // `ahead` moves on by what was fetched.
  void multiply(const Pointers& x, Range pixels, Range panels, const float* input, conv2d::Ahead& ahead) const {
    const int64_t channel = panels.begin * kernels_.panel;
    conv2d::Block block{};
    block.tile.segments = segments_.data();
    block.tile.segment_count = static_cast<int64_t>(segments_.size());
    block.tile.a = input;
    block.tile.a_stride = step_;
    block.tile.b = panel_weights(x, panels.begin);
    block.tile.scale = x.scale != nullptr ? x.scale + channel : nullptr;
    block.tile.bias = x.bias != nullptr ? x.bias + channel : nullptr;
    block.tile.residual = x.residual != nullptr ? x.residual + pixels.begin * spec_.ldr + channel : nullptr;
    block.tile.residual_stride = spec_.ldr;
    block.tile.y = x.y + pixels.begin * spec_.ldy + channel;
    block.tile.y_stride = spec_.ldy;
    block.pixels = pixels.end - pixels.begin;
    block.panels = panels.end - panels.begin;
    block.channels = spec_.k - channel;
    block.depth = words_;
    block.activation = spec_.activation;
    block.into_map = true;
    block.ahead = ahead;
    conv2d::multiply(kernels_, block);
    ahead = block.ahead;
  }

  const conv2d::Kernels& kernels_;
  const OpSpec depth_;
  const conv2d::Cut cut_;
  const int64_t p_, q_, words_ /* of a pixel between the parts */, step_ /* from pixel to pixel there */;
  std::vector<conv2d::Segment> segments_;
  int64_t panels_at_once_ = 1, rows_at_once_ = 1;
};

}  // namespace

}  // namespace separable_conv2d

std::unique_ptr<Op> make_separable_conv2d(const OpSpec& spec) { return std::make_unique<separable_conv2d::SeparableConv2d>(spec); }

std::string separable_conv2d_refusal(const OpSpec& spec) {
  if (spec.groups != 1) return std::to_string(spec.groups) + " groups: the 1x1 convolution behind the depthwise one has 1";
  if (spec.depth_activation < kNone || spec.depth_activation > kLastActivation) return "depth_activation " + std::to_string(spec.depth_activation) + " is not known";
  return depthwise_conv2d_refusal(separable_conv2d::depth_part(spec));
}

int64_t separable_conv2d_packed_floats(const OpSpec& spec) { return conv2d_packed_floats(separable_conv2d::pointwise_part(spec)); }

void separable_conv2d_pack(const OpSpec& spec, const float* weight, float* out) {
  conv2d_pack(separable_conv2d::pointwise_part(spec), weight, out);
}

}  // namespace fb

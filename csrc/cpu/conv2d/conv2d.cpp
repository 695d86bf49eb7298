// Dense convolution of any kernel, stride, padding, dilation and number of groups, by register tiles straight from the image.
//
//   task = (block of output pixels, block of output channel panels), for one group                                     cut.h
//     copy the input rows the block needs into scratch, with their zero padding      (k x k, or a planar or strided input)   input.h
//     for panel                          packed weights [K][panel], K = (r, s, c) flattened: stays in L1/L2 over the pixels
//       for tile of <= 14 pixels         conv2d/generic.h
//
// One filter row of one pixel is a single run of S*C consecutive floats in the copied rows (NHWC), so there is no im2col: the
// copy is 1/K of the arithmetic. A 1x1 convolution of stride 1 has no copy at all and sees all images as one row of pixels, unless
// its input is scaled or activated first: then the copy is where that happens, once for all panels.
// (Reading strided 1x1 in place, where rows fill a tile, was no faster than the copy.)
#include "conv2d.h"

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "cut.h"
#include "input.h"

namespace fb {

namespace conv2d {

namespace {

bool is_pointwise(const OpSpec& spec) { return spec.r == 1 && spec.s == 1 && spec.padded_h() == spec.h && spec.padded_w() == spec.w; }

constexpr int64_t kLeastReuse = 64;  // output channels that pay for a copy of the input

Form form_of(const OpSpec& spec) {
  if (!is_pointwise(spec)) return Form::rows;
  // Pixels of 1024 channels, dense, as PyTorch has them: copied apart they take 15.7 ms instead of 20.8 (to 512 channels, 16 images of 14x14).
  const bool crowded = spaced(spec.ldx) != spec.ldx && spec.k > kLeastReuse;
  const bool as_is = !crowded && spec.stride_h == 1 && spec.stride_w == 1 && !spec.nchw_in && spec.pre == 0 && spec.pre_activation == kNone && spec.bf16 == 0;
  return as_is ? Form::flat : Form::gathered;
}

// The runs of consecutive words that an output pixel reads.
std::vector<Segment> runs_of(const OpSpec& spec, const Input& input) {
  const int64_t pixel_words = input.pixel_words(), step = input.pixel_step(), width = spec.padded_w();
  if (is_pointwise(spec)) return {{0, static_cast<int32_t>(pixel_words), 0}};
  std::vector<Segment> runs;
  for (int64_t r = 0; r < spec.r; ++r) {
    const int64_t row = r * spec.dilation_h * width * step;
    if (spec.dilation_w == 1 && step == pixel_words) {
      runs.push_back({row, static_cast<int32_t>(spec.s * pixel_words), 0});
    } else {
      for (int64_t s = 0; s < spec.s; ++s) runs.push_back({row + s * spec.dilation_w * step, static_cast<int32_t>(pixel_words), 0});
    }
  }
  return runs;
}

Cut cut_of(const OpSpec& spec, const Kernels& kernels) {
  const Form form = form_of(spec);
  const int64_t p = spec.p(), q = spec.q(), hp = spec.padded_h(), wp = spec.padded_w(), pixel_words = words(kernels, spec.c / spec.groups);
  Cut::Product product{};
  product.images = spec.n;
  product.rows = p;
  product.columns = q;
  product.groups = spec.groups;
  product.depth = spec.r * spec.s * pixel_words;
  product.channels = spec.k / spec.groups;
  product.unit_floats = form == Form::rows ? spec.stride_h * wp * pixel_words : product.depth;
  product.made_rows = spec.n * (form == Form::rows ? hp : p);
  product.made_floats = (form == Form::rows ? wp : q) * spec.groups * pixel_words;
  return Cut(kernels, form, product);
}

class Conv2d final : public Op {
 public:
  explicit Conv2d(const OpSpec& spec)
      : Op(spec), kernels_(kernels(spec)), form_(form_of(spec)), cut_(cut_of(spec, kernels_)), input_(spec_, kernels_) {
    p_ = spec.p();
    q_ = spec.q();
    group_c_ = spec.c / spec.groups;
    group_k_ = spec.k / spec.groups;
    step_ = input_.pixel_step();
    depth_ = spec.r * spec.s * input_.pixel_words();
    segments_ = blocked_segments(runs_of(spec, input_), spec.bf16 ? kMaxPairsBlock : kMaxBlock);
  }

  int64_t tasks() const override { return cut_.tasks(); }
  int64_t first_phase_tasks() const override { return cut_.first_phase(); }
  bool weights_in_parts() const override { return cut_.weights_in_parts(); }
  int64_t scratch_floats() const override {
    if (form_ == Form::flat || cut_.first_phase() > 0) return 0;
    return form_ == Form::gathered ? cut_.largest_block() * step_ : input_rows(cut_.largest_block() / q_) * row_floats();
  }
  int64_t shared_floats() const override { return cut_.first_phase() > 0 ? spec_.groups * group_shared_floats() : 0; }

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    if (task < cut_.first_phase()) return prepare(task, x);
    const Cut::Part part = cut_.part(task);
    const Source source = input_of(part, x, worker.scratch);
    const int64_t channel = part.group * group_k_ + part.panels.begin * kernels_.panel;
    Block block{};
    block.tile.segments = segments_.data();
    block.tile.segment_count = static_cast<int64_t>(segments_.size());
    block.tile.a_stride = source.step;
    block.tile.y_stride = spec_.ldy;
    block.tile.residual_stride = spec_.ldr;
    block.tile.b = x.weight + (part.group * ceil_div(group_k_, kernels_.panel) + part.panels.begin) * kernels_.panel * depth_;
    block.tile.scale = x.scale != nullptr ? x.scale + channel : nullptr;
    block.tile.bias = x.bias != nullptr ? x.bias + channel : nullptr;
    block.panels = part.panels.end - part.panels.begin;
    block.channels = group_k_ - part.panels.begin * kernels_.panel;
    block.depth = depth_;
    block.activation = spec_.activation;
    block.plain_channels = spec_.act_from - channel;
    block.into_map = true;
    block.ahead = cut_.next_weights(x, part, worker);
    if (form_ != Form::rows && (part.panel_block == 0 || worker.first)) {  // the first time that this thread sees these pixels
      block.ahead.input = source.data + kernels_.max_rows * source.step;
      block.ahead.input_end = source.data + (part.pixels.end - part.pixels.begin) * source.step;
    }
    for (int64_t pixel = part.pixels.begin; pixel < part.pixels.end; pixel += block.pixels) {
      const int64_t done = pixel - part.pixels.begin;
      block.pixels = std::min(run_length(pixel), part.pixels.end - pixel);
      block.tile.a = source.data + (form_ == Form::rows ? done / q_ * spec_.stride_h * row_floats() : done * source.step);
      block.tile.y = x.y + pixel * spec_.ldy + channel;
      block.tile.residual = x.residual != nullptr ? x.residual + pixel * spec_.ldr + channel : nullptr;
      block.tile.gate = spec_.gated ? x.gate + pixel / (p_ * q_) * spec_.ldg + channel : nullptr;
      multiply(kernels_, block);
    }
  }

  Range input_pixels(int64_t task) const override {
    if (form_ == Form::flat) return cut_.pixels(task);
    const int64_t first_phase = cut_.first_phase();
    if (task >= first_phase && first_phase > 0) return {0, 0};  // these wait for the first phase
    Range rows;  // of output, over all images
    if (first_phase > 0) {
      rows = cut_.made_rows(task);
      if (form_ == Form::rows) return {input_.unpadded_row(rows.begin) * spec_.w, input_.unpadded_row(rows.end) * spec_.w};
    } else {
      const Range pixels = cut_.pixels(task);
      rows = {pixels.begin / q_, pixels.end / q_};
    }
    const int64_t hp = input_.padded_rows(), last = rows.end - 1;
    return {input_.unpadded_row(rows.begin / p_ * hp + rows.begin % p_ * spec_.stride_h) * spec_.w,
            input_.unpadded_row(last / p_ * hp + last % p_ * spec_.stride_h + input_rows(1)) * spec_.w};
  }
  Range residual_pixels(int64_t task) const override { return task < cut_.first_phase() ? Range{0, 0} : cut_.pixels(task); }
  Range tasks_writing(Range pixels) const override { return cut_.tasks_writing(pixels); }

  std::string detail() const override {
    const char* form = is_pointwise(spec_) ? form_ == Form::flat                                ? " pointwise "
                                             : spec_.stride_h == 1 && spec_.stride_w == 1 ? " copied pointwise "
                                                                                          : " strided pointwise "
                                           : " direct ";
    return isa_name(isa()) + std::string(spec_.bf16 ? " bf16" : "") + form + cut_.tasks_text();
  }

 private:
  struct Source {
    const float* data;  // of the block's first pixel
    int64_t step;       // between output pixels
  };

  int64_t input_rows(int64_t rows) const { return (rows - 1) * spec_.stride_h + (spec_.r - 1) * spec_.dilation_h + 1; }
  int64_t row_floats() const { return input_.padded_columns() * step_; }
  int64_t group_shared_floats() const {
    return spec_.n * (form_ == Form::gathered ? p_ * q_ * step_ : input_.padded_rows() * row_floats());
  }

  // Pixels from this one on whose inputs lie evenly and that share a gate.
  int64_t run_length(int64_t pixel) const {
    if (form_ == Form::rows) return q_;
    return spec_.gated ? p_ * q_ - pixel % (p_ * q_) : spec_.n * p_ * q_;
  }

  // Where the products find the input of a block: in x, in what the first phase made, or in scratch, where it is made now.
  Source input_of(const Cut::Part& part, const Pointers& x, float* scratch) const {
    if (form_ == Form::flat) return {x.x + part.pixels.begin * spec_.ldx + part.group * group_c_, spec_.ldx};
    const bool made = cut_.first_phase() > 0;
    const int64_t row = part.pixels.begin / q_, rows = (part.pixels.end - part.pixels.begin) / q_;  // of output, over all images
    if (form_ == Form::gathered) {
      if (made) return {x.shared + part.group * group_shared_floats() + part.pixels.begin * step_, step_};
      input_.gather(x, row, rows, part.group, scratch);
      return {scratch, step_};
    }
    const int64_t image = row / p_, first = row % p_ * spec_.stride_h;  // padded input rows
    const int64_t step = spec_.stride_w * step_;
    if (made) return {x.shared + part.group * group_shared_floats() + (image * input_.padded_rows() + first) * row_floats(), step};
    input_.copy_rows(x, image, first, input_rows(rows), part.group, scratch);
    return {scratch, step};
  }

  // First phase: a few rows of the copy, all groups.
  void prepare(int64_t task, const Pointers& x) const {
    const Range rows = cut_.made_rows(task);
    for (int64_t group = 0; group < spec_.groups; ++group) {
      float* out = x.shared + group * group_shared_floats();
      if (form_ == Form::gathered) {
        input_.gather(x, rows.begin, rows.end - rows.begin, group, out + rows.begin * q_ * step_);
        continue;
      }
      const int64_t hp = input_.padded_rows();
      for (int64_t row = rows.begin; row < rows.end; ++row) input_.copy_rows(x, row / hp, row % hp, 1, group, out + row * row_floats());
    }
  }

  const Kernels& kernels_;
  const Form form_;
  const Cut cut_;
  const Input input_;
  std::vector<Segment> segments_;
  int64_t p_ = 0, q_ = 0, group_c_ = 0, step_ = 0 /* from pixel to pixel of a copy */, group_k_ = 0, depth_ = 0;
};

}  // namespace

}  // namespace conv2d

std::unique_ptr<Op> make_conv2d(const OpSpec& spec) {
  if (conv2d::is_planar(spec)) return conv2d::make_planar(spec);
  return std::make_unique<conv2d::Conv2d>(spec);
}

std::string conv2d_refusal(const OpSpec& spec) {
  if (spec.act_from < 0 || spec.act_from % 32 != 0) return "act_from is " + std::to_string(spec.act_from) + ", expected a multiple of 32";
  if (spec.act_from != 0 && spec.groups != 1) return "act_from with " + std::to_string(spec.groups) + " groups";
  return "";
}

}  // namespace fb

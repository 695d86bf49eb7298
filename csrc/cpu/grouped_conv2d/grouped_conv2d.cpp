// Grouped 3x3 convolution with 4, 8, 16 or 32 output channels per group, from as many (ResNeXt) or half as many (SENet), stride 1 or 2,
// padding 0 or 1 on each side.
//
//   task = (image, block of output rows, range of channel blocks); a channel block is one vector of input channels or one group, the wider
//     for channel block
//       copy the input rows it reads, with padding, next to each other        [rows][padded w][block]: stays in L1
//       for output row                                                        grouped_conv2d/generic.h
#include "grouped_conv2d.h"

#include <algorithm>

#include "../conv2d/conv2d.h"
#include "../ops.h"

namespace fb {

namespace grouped_conv2d {

namespace {

constexpr int64_t kCopyBytes = 28 * 1024;  // copied rows of a channel block: they share L1 with weights and output
constexpr int64_t kTaskProducts = 3 << 19;

const Kernels& kernels(const OpSpec& spec) {
#if defined(__x86_64__)
  if (spec.bf16 != 0) return kAvx512Bf16;
#endif
  return FB_TABLE_OF(isa());
}

int64_t words_of_group(const OpSpec& spec) { return spec.c / spec.groups / kernels(spec).channels_per_word; }

int log2_of(int64_t value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

class GroupedConv2d final : public Op {
 public:
  explicit GroupedConv2d(const OpSpec& spec) : Op(spec), kernels_(kernels(spec)), p_(spec.p()), q_(spec.q()) {
    group_ = words_of_group(spec);
    filters_ = spec.k / spec.groups;
    block_ = std::max<int64_t>(group_, kernels_.lanes);
    channel_blocks_ = spec.groups * group_ / block_;
    widening_ = filters_ / group_;
    copy_ = kernels_.copy[log2_of(group_)];
    row_ = kernels_.row[log2_of(widening_)][log2_of(filters_) - 2][spec.stride_h - 1];
    const int64_t row_bytes = spec.padded_w() * block_ * 4;
    const int64_t fitting = std::max<int64_t>(1, (kCopyBytes / row_bytes - 3) / spec.stride_h + 1);
    const int64_t blocks = ceil_div(p_, std::min(p_, std::max<int64_t>(fitting, 4)));
    rows_per_task_ = ceil_div(p_, blocks);
    blocks_per_image_ = ceil_div(p_, rows_per_task_);
    const int64_t products = rows_per_task_ * q_ * block_ * widening_ * group_ * 9;
    const int64_t per_task = std::clamp<int64_t>(ceil_div(kTaskProducts, products), 1, channel_blocks_);
    channel_split_ = ceil_div(channel_blocks_, per_task);
  }

  int64_t tasks() const override { return spec_.n * blocks_per_image_ * channel_split_; }
  int64_t scratch_floats() const override { return input_rows(rows_per_task_) * spec_.padded_w() * block_; }

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    float* scratch = worker.scratch;
    const int64_t block = task / channel_split_, part = task % channel_split_;
    const int64_t image = block / blocks_per_image_, first_row = block % blocks_per_image_ * rows_per_task_;
    const int64_t rows = std::min(rows_per_task_, p_ - first_row);
    const int64_t row_step = spec_.padded_w() * block_;
    Row row{};
    row.row_step = row_step;
    row.residual_stride = spec_.ldr;
    row.y_stride = spec_.ldy;
    row.pixels = q_;
    row.activation = spec_.activation;
    const int64_t end = (part + 1) * channel_blocks_ / channel_split_, block_channels = block_ * kernels_.channels_per_word;
    for (int64_t b = part * channel_blocks_ / channel_split_; b < end; ++b) {
      Copy copied{};
      copied.x = x.x + b * block_channels;
      copied.step = spec_.ldx;
      copied.count = spec_.w;
      copied.ahead = b + 1 < end ? block_channels : 0;
      if (spec_.pre != 0) {
        copied.scale = x.pre_scale + b * block_channels;
        copied.shift = x.pre_shift + b * block_channels;
        copied.activation = spec_.pre_activation;
      }
      copy_rows(copied, image, first_row * spec_.stride_h - spec_.pad_h, input_rows(rows), scratch);
      const int64_t channel = b * block_ * widening_;
      row.weight = x.weight + channel * group_ * 9;
      row.scale = x.scale != nullptr ? x.scale + channel : nullptr;
      row.bias = x.bias != nullptr ? x.bias + channel : nullptr;
      for (int64_t p = 0; p < rows; ++p) {
        const int64_t pixel = (image * p_ + first_row + p) * q_;
        row.x = scratch + p * spec_.stride_h * row_step;
        row.y = x.y + pixel * spec_.ldy + channel;
        row.residual = x.residual != nullptr ? x.residual + pixel * spec_.ldr + channel : nullptr;
        row_(row);
      }
    }
  }

  Range input_pixels(int64_t task) const override {
    const int64_t block = task / channel_split_, image = block / blocks_per_image_;
    const int64_t row = block % blocks_per_image_ * rows_per_task_, rows = std::min(rows_per_task_, p_ - row);
    const int64_t first = std::max<int64_t>(0, row * spec_.stride_h - spec_.pad_h);
    const int64_t last = std::min(spec_.h, row * spec_.stride_h - spec_.pad_h + input_rows(rows));
    return {(image * spec_.h + first) * spec_.w, (image * spec_.h + last) * spec_.w};
  }
  Range residual_pixels(int64_t task) const override {
    const int64_t block = task / channel_split_, image = block / blocks_per_image_;
    const int64_t row = block % blocks_per_image_ * rows_per_task_;
    return {(image * p_ + row) * q_, (image * p_ + std::min(row + rows_per_task_, p_)) * q_};
  }
  Range tasks_writing(Range pixels) const override {
    if (pixels.begin >= pixels.end) return {0, 0};
    const auto block = [&](int64_t pixel) {
      const int64_t row = pixel / q_;
      return row / p_ * blocks_per_image_ + row % p_ / rows_per_task_;
    };
    return {block(pixels.begin) * channel_split_, (block(pixels.end - 1) + 1) * channel_split_};
  }

  std::string detail() const override {
    const int64_t channels = spec_.c / spec_.groups;
    return std::string(isa_name(isa())) + (spec_.bf16 ? " bf16" : "") + " grouped rows, " + std::to_string(channels) +
           (filters_ == channels ? "" : " to " + std::to_string(filters_)) + " channels a group, " + std::to_string(tasks()) + " tasks";
  }

 private:
  int64_t input_rows(int64_t rows) const { return (rows - 1) * spec_.stride_h + 3; }

  // `t` says how to copy, and where in x the block begins.
  void copy_rows(const Copy& t, int64_t image, int64_t first, int64_t rows, float* out) const {
    const int64_t width = spec_.padded_w() * block_, before = spec_.pad_w * block_, image_end = before + spec_.w * block_;
    for (int64_t row = first; row < first + rows; ++row, out += width) {
      if (row < 0 || row >= spec_.h) {
        std::fill(out, out + width, 0.0f);
        continue;
      }
      std::fill(out, out + before, 0.0f);
      std::fill(out + image_end, out + width, 0.0f);
      Copy of_row = t;
      of_row.x += (image * spec_.h + row) * spec_.w * spec_.ldx;
      of_row.out = out + before;
      copy_(of_row);
    }
  }

  const Kernels& kernels_;
  const int64_t p_, q_;
  void (*row_)(const Row&) = nullptr;
  void (*copy_)(const Copy&) = nullptr;
  int64_t group_ = 0, block_ = 0, channel_blocks_ = 0;  // words of input
  int64_t filters_ = 0, widening_ = 0;                  // output channels of a group, of a word
  int64_t rows_per_task_ = 1, blocks_per_image_ = 1, channel_split_ = 1;
};

}  // namespace

}  // namespace grouped_conv2d

std::unique_ptr<Op> make_grouped_conv2d(const OpSpec& spec) { return std::make_unique<grouped_conv2d::GroupedConv2d>(spec); }

// The same on every instruction set, so that all of them add up in the same order.
std::string grouped_conv2d_refusal(const OpSpec& spec) {
  const int64_t filters = spec.k / spec.groups;
  if (spec.k != spec.c && spec.k != 2 * spec.c)
    return std::to_string(spec.c) + " to " + std::to_string(spec.k) + " channels: grouped rows keep their number or double it";
  if (filters != 4 && filters != 8 && filters != 16 && filters != 32)
    return std::to_string(filters) + " output channels per group: grouped rows handle 4, 8, 16 and 32";
  if (const int64_t multiple = spec.bf16 ? 32 : 16; spec.c % multiple != 0)
    return std::to_string(spec.c) + " channels: grouped rows" + (spec.bf16 ? " of bfloat16" : "") + " handle multiples of " + std::to_string(multiple);
  if (spec.r != 3 || spec.s != 3) return "kernel " + std::to_string(spec.r) + "x" + std::to_string(spec.s) + ": grouped rows handle 3x3";
  if (spec.stride_h != spec.stride_w || spec.stride_h > 2)
    return "stride " + std::to_string(spec.stride_h) + "x" + std::to_string(spec.stride_w) + ": grouped rows handle 1 and 2";
  if (std::max({spec.pad_h, spec.pad_w, spec.bottom(), spec.right()}) > 1)
    return "padding " + std::to_string(spec.pad_h) + "x" + std::to_string(spec.pad_w) + ": grouped rows handle 0 and 1";
  if (spec.dilation_h != 1 || spec.dilation_w != 1) return "dilation " + std::to_string(spec.dilation_h) + ": grouped rows handle 1";
  if (spec.nchw_in) return "planar input: grouped rows read NHWC";
  if (spec.pre_activation != kNone && spec.pre == 0) return "an activation of the input without a scale";
  if (spec.bf16 != 0 && spec.pre != 0) return "scales and shifts its input in float32 only";
  return "";
}

int64_t grouped_conv2d_packed_floats(const OpSpec& spec) { return spec.k * grouped_conv2d::words_of_group(spec) * 9; }

// [vector of output channels][r][word of the group][s][lane], lanes transposed as grouped_conv2d/generic.h says. Training packs on every
// call: on all threads, and without divisions for every lane.
void grouped_conv2d_pack(const OpSpec& spec, const float* weight, float* out) {
  const int64_t lanes = grouped_conv2d::kernels(spec).lanes, group = spec.c / spec.groups;
  const int64_t step = grouped_conv2d::kernels(spec).channels_per_word;
  const int64_t vector_floats = grouped_conv2d::words_of_group(spec) * 9 * lanes;
  const int64_t unit = std::max<int64_t>(1, lanes / (spec.k / spec.groups));
  parallel_for(spec.k / lanes, spec.k * group * 9, [&](int64_t vector) {
    const float* filters[16];
    for (int64_t lane = 0; lane < lanes; ++lane)
      filters[lane] = weight + (vector * lanes + lane % unit * (lanes / unit) + lane / unit) * group * 9;
    float* to = out + vector * vector_floats;
    for (int64_t r = 0; r < 3; ++r)
      for (int64_t c = 0; c < group; c += step)
        for (int64_t s = 0; s < 3; ++s)
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const float* filter = filters[lane] + c * 9 + r * 3 + s;
            *to++ = step == 1 ? filter[0] : conv2d::pair_word(filter[0], filter[9]);
          }
  });
}

}  // namespace fb

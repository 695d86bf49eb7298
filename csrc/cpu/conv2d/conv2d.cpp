// Dense convolution of any kernel, stride, padding, dilation and number of groups, by register tiles straight from the image.
//
//   task = (block of output pixels, block of output channel panels), for one group
//     copy the input rows the block needs into scratch, with their zero padding      (k x k, or a planar or strided input)
//     for panel                          packed weights [K][panel], K = (r, s, c) flattened: stays in L1/L2 over the pixels
//       for tile of <= 14 pixels         conv2d/generic.h
//
// One filter row of one pixel is a single run of S*C consecutive floats in the copied rows (NHWC), so there is no im2col: the
// copy is 1/K of the arithmetic. A 1x1 convolution of stride 1 has no copy at all and sees all images as one row of pixels.
#include "conv2d.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../ops.h"

namespace fb {

namespace conv2d {

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return kAvx512;
  if (isa == Isa::avx2) return kAvx2;
#endif
  (void)isa;
  return kPortable;
}

std::vector<Segment> blocked_segments(const std::vector<Segment>& runs) {
  int64_t total = 0;
  for (const Segment& run : runs) total += run.length;
  const int64_t blocks = ceil_div(total, kMaxBlock);
  const int64_t block = ceil_div(total, blocks);
  std::vector<Segment> out;
  int64_t left = block;
  for (const Segment& run : runs) {
    int64_t done = 0;
    while (done < run.length) {
      const int64_t length = std::min(left, run.length - done);
      left -= length;
      out.push_back({run.offset + done, static_cast<int32_t>(length), left == 0 ? 1 : 0});
      if (left == 0) left = block;
      done += length;
    }
  }
  out.back().block_end = 1;
  return out;
}

void multiply_pixels(const Kernels& kernels, Tile tile, int64_t pixels) {
  const int64_t tiles = ceil_div(pixels, kernels.max_rows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = (pixels + tiles - 1 - i) / tiles;  // balanced: 49 = 13 + 12 + 12 + 12
    kernels.tile[rows](tile);
    tile.a += rows * tile.a_stride;
    tile.y += rows * tile.y_stride;
    if (tile.residual != nullptr) tile.residual += rows * tile.residual_stride;
  }
}

int64_t packed_floats(int panel, int64_t depth, int64_t channels, int64_t groups) {
  return groups * round_up(channels / groups, panel) * depth;
}

void pack(int panel, const OpSpec& spec, const float* weight, float* out) {
  const int64_t channels = spec.k / spec.groups, depth_c = spec.c / spec.groups, taps = spec.r * spec.s;
  for (int64_t g = 0; g < spec.groups; ++g) {
    for (int64_t k0 = 0; k0 < channels; k0 += panel) {
      const int64_t width = std::min<int64_t>(panel, channels - k0);
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < depth_c; ++c) {
          const float* source = weight + ((g * channels + k0) * depth_c + c) * taps + tap;
          for (int64_t j = 0; j < width; ++j) out[j] = source[j * depth_c * taps];
          for (int64_t j = width; j < panel; ++j) out[j] = 0.0f;
          out += panel;
        }
      }
    }
  }
}

namespace {

constexpr int64_t kWeightBytesInL2 = 384 * 1024;  // weights up to this are walked whole by every task
constexpr int64_t kInputBytesInL2 = 400 * 1024;
constexpr int64_t kTaskProducts = 3 << 20;  // multiply-adds of a task: about 20 us

class Conv2d final : public Op {
 public:
  explicit Conv2d(const OpSpec& spec) : Op(spec), kernels_(kernels(isa())) {
    p_ = spec.p();
    q_ = spec.q();
    group_c_ = spec.c / spec.groups;
    group_k_ = spec.k / spec.groups;
    panels_ = ceil_div(group_k_, kernels_.panel);
    const bool pointwise = spec.r == 1 && spec.s == 1 && spec.pad_h == 0 && spec.pad_w == 0;
    flat_ = pointwise && spec.stride_h == 1 && spec.stride_w == 1 && !spec.nchw_in;
    gathered_ = pointwise && !flat_;
    copied_ = !flat_;
    wp_ = spec.w + 2 * spec.pad_w;
    depth_ = spec.r * spec.s * group_c_;
    std::vector<Segment> runs;
    if (pointwise) {
      runs.push_back({0, static_cast<int32_t>(group_c_), 0});
    } else if (spec.dilation_w == 1) {
      for (int64_t r = 0; r < spec.r; ++r)
        runs.push_back({r * spec.dilation_h * wp_ * group_c_, static_cast<int32_t>(spec.s * group_c_), 0});
    } else {
      for (int64_t r = 0; r < spec.r; ++r)
        for (int64_t s = 0; s < spec.s; ++s)
          runs.push_back({(r * spec.dilation_h * wp_ + s * spec.dilation_w) * group_c_, static_cast<int32_t>(group_c_), 0});
    }
    segments_ = blocked_segments(runs);
    choose_blocks();
  }

  int64_t tasks() const override { return pixel_blocks_ * spec_.groups * panel_blocks_; }
  int64_t scratch_floats() const override {
    if (!copied_) return 0;
    if (gathered_) return rows_per_block_ * q_ * group_c_;
    return input_rows(rows_per_block_) * wp_ * group_c_;
  }

  void run(int64_t task, const Pointers& x, float* scratch) const override {
    const int64_t split = spec_.groups * panel_blocks_;
    const int64_t pixel_block = task / split;
    const int64_t group = task % split / panel_blocks_;
    const int64_t panel_block = task % split % panel_blocks_;
    const int64_t panel_begin = panel_block * panels_ / panel_blocks_, panel_end = (panel_block + 1) * panels_ / panel_blocks_;
    Tile tile{};
    tile.segments = segments_.data();
    tile.segment_count = static_cast<int64_t>(segments_.size());
    tile.relu = spec_.activation == 1;
    tile.y_stride = spec_.ldy;
    tile.residual_stride = spec_.ldr;
    int64_t first_pixel, run_length, runs, run_step;
    const float* a;
    if (flat_) {
      first_pixel = pixel_block * pixels_per_block_;
      run_length = std::min(pixels_per_block_, spec_.n * p_ * q_ - first_pixel);
      runs = 1;
      run_step = 0;
      a = x.x + first_pixel * spec_.ldx + group * group_c_;
      tile.a_stride = spec_.ldx;
    } else {
      const int64_t image = pixel_block / blocks_per_image_;
      const int64_t row = pixel_block % blocks_per_image_ * rows_per_block_;
      const int64_t rows = std::min(rows_per_block_, p_ - row);
      first_pixel = (image * p_ + row) * q_;
      a = scratch;
      if (gathered_) {
        gather(x.x, image, row, rows, group, scratch);
        run_length = rows * q_;
        runs = 1;
        run_step = 0;
        tile.a_stride = group_c_;
      } else {
        copy_rows(x.x, image, row * spec_.stride_h - spec_.pad_h, input_rows(rows), group, scratch);
        run_length = q_;
        runs = rows;
        run_step = spec_.stride_h * wp_ * group_c_;
        tile.a_stride = spec_.stride_w * group_c_;
      }
    }
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t channel = group * group_k_ + panel * kernels_.panel;
      tile.columns = std::min<int64_t>(kernels_.panel, group_k_ - panel * kernels_.panel);
      tile.b = x.weight + (group * panels_ + panel) * kernels_.panel * depth_;
      tile.bias = x.bias != nullptr ? x.bias + channel : nullptr;
      for (int64_t i = 0; i < runs; ++i) {
        const int64_t pixel = first_pixel + i * run_length;
        tile.a = a + i * run_step;
        tile.y = x.y + pixel * spec_.ldy + channel;
        tile.residual = x.residual != nullptr ? x.residual + pixel * spec_.ldr + channel : nullptr;
        multiply_pixels(kernels_, tile, run_length);
      }
    }
  }

  Range input_pixels(int64_t task) const override {
    const int64_t block = task / (spec_.groups * panel_blocks_);
    if (flat_) return block_pixels(block);
    const int64_t image = block / blocks_per_image_;
    const int64_t row = block % blocks_per_image_ * rows_per_block_;
    const int64_t first = std::max<int64_t>(0, row * spec_.stride_h - spec_.pad_h);
    const int64_t last = std::min(spec_.h, row * spec_.stride_h - spec_.pad_h + input_rows(std::min(rows_per_block_, p_ - row)));
    return {(image * spec_.h + std::min(first, spec_.h)) * spec_.w, (image * spec_.h + std::max(first, last)) * spec_.w};
  }
  Range residual_pixels(int64_t task) const override { return block_pixels(task / (spec_.groups * panel_blocks_)); }
  Range tasks_writing(Range pixels) const override {
    if (pixels.begin >= pixels.end) return {0, 0};
    const int64_t split = spec_.groups * panel_blocks_;
    return {block_of(pixels.begin) * split, (block_of(pixels.end - 1) + 1) * split};
  }

  std::string detail() const override {
    return std::string(isa_name(isa())) + (flat_ ? " pointwise" : gathered_ ? " strided pointwise" : " direct") + " " +
           std::to_string(pixel_blocks_) + "x" + std::to_string(spec_.groups * panel_blocks_) + " tasks";
  }

 private:
  int64_t input_rows(int64_t rows) const { return (rows - 1) * spec_.stride_h + (spec_.r - 1) * spec_.dilation_h + 1; }

  Range block_pixels(int64_t block) const {
    if (flat_) return {block * pixels_per_block_, std::min((block + 1) * pixels_per_block_, spec_.n * p_ * q_)};
    const int64_t image = block / blocks_per_image_, row = block % blocks_per_image_ * rows_per_block_;
    return {(image * p_ + row) * q_, (image * p_ + std::min(row + rows_per_block_, p_)) * q_};
  }
  int64_t block_of(int64_t pixel) const {
    if (flat_) return pixel / pixels_per_block_;
    const int64_t image = pixel / (p_ * q_);
    return image * blocks_per_image_ + (pixel - image * p_ * q_) / q_ / rows_per_block_;
  }

  // Cuts the work so that a task takes about 20 us, keeps its input block in L2, and does not re-read large weights often.
  void choose_blocks() {
    const int64_t weight_bytes = depth_ * group_k_ * 4;
    const int64_t unit = flat_ ? 1 : q_;                            // pixels come in these steps
    const int64_t units = flat_ ? spec_.n * p_ * q_ : p_;           // per image, or of all images when flat
    const int64_t unit_products = unit * depth_ * group_k_;
    const int64_t unit_bytes = (flat_ || gathered_ ? unit * depth_ : spec_.stride_h * wp_ * group_c_) * 4;
    const int64_t in_cache = std::max<int64_t>(1, kInputBytesInL2 / std::max<int64_t>(1, unit_bytes));
    int64_t per_block;
    if (weight_bytes <= kWeightBytesInL2) {
      per_block = std::max<int64_t>(ceil_div(kTaskProducts, unit_products), ceil_div(4 * kernels_.max_rows, unit));
      panel_blocks_ = 1;
    } else {
      per_block = std::max<int64_t>(ceil_div(8 * kernels_.max_rows, unit), in_cache);
    }
    per_block = std::min(per_block, std::max<int64_t>(in_cache, 1));
    per_block = std::clamp<int64_t>(per_block, 1, units);
    const int64_t blocks = ceil_div(units, per_block);
    per_block = ceil_div(units, blocks);
    if (weight_bytes > kWeightBytesInL2) {
      const int64_t panels_per_task = std::clamp<int64_t>(ceil_div(kTaskProducts, per_block * unit * depth_ * kernels_.panel), 1, panels_);
      panel_blocks_ = ceil_div(panels_, panels_per_task);
    }
    if (flat_) {
      pixels_per_block_ = per_block;
      pixel_blocks_ = ceil_div(units, per_block);
    } else {
      rows_per_block_ = per_block;
      blocks_per_image_ = ceil_div(units, per_block);
      pixel_blocks_ = spec_.n * blocks_per_image_;
    }
  }

  // The pixels a strided 1x1 convolution reads, next to each other.
  void gather(const float* x, int64_t image, int64_t row, int64_t rows, int64_t group, float* out) const {
    const int64_t plane = spec_.h * spec_.w;
    for (int64_t p = row; p < row + rows; ++p) {
      for (int64_t q = 0; q < q_; ++q, out += group_c_) {
        const int64_t pixel = p * spec_.stride_h * spec_.w + q * spec_.stride_w;
        if (spec_.nchw_in) {
          const float* source = x + (image * spec_.c + group * group_c_) * plane + pixel;
          for (int64_t c = 0; c < group_c_; ++c) out[c] = source[c * plane];
        } else {
          std::memcpy(out, x + (image * plane + pixel) * spec_.ldx + group * group_c_, static_cast<size_t>(group_c_) * 4);
        }
      }
    }
  }

  // Input rows [first, first + rows) with their zero padding: [rows][w + 2 pad_w][group_c].
  void copy_rows(const float* x, int64_t image, int64_t first, int64_t rows, int64_t group, float* out) const {
    const int64_t pad = spec_.pad_w * group_c_;
    for (int64_t row = first; row < first + rows; ++row, out += wp_ * group_c_) {
      if (row < 0 || row >= spec_.h) {
        std::fill(out, out + wp_ * group_c_, 0.0f);
        continue;
      }
      std::fill(out, out + pad, 0.0f);
      std::fill(out + pad + spec_.w * group_c_, out + wp_ * group_c_, 0.0f);
      float* inside = out + pad;
      if (spec_.nchw_in) {
        for (int64_t c = 0; c < group_c_; ++c) {
          const float* source = x + ((image * spec_.c + group * group_c_ + c) * spec_.h + row) * spec_.w;
          for (int64_t w = 0; w < spec_.w; ++w) inside[w * group_c_ + c] = source[w];
        }
      } else if (spec_.ldx == group_c_) {
        std::memcpy(inside, x + (image * spec_.h + row) * spec_.w * spec_.ldx, static_cast<size_t>(spec_.w * group_c_) * 4);
      } else {
        const float* source = x + (image * spec_.h + row) * spec_.w * spec_.ldx + group * group_c_;
        for (int64_t w = 0; w < spec_.w; ++w) std::memcpy(inside + w * group_c_, source + w * spec_.ldx, static_cast<size_t>(group_c_) * 4);
      }
    }
  }

  const Kernels& kernels_;
  std::vector<Segment> segments_;
  int64_t p_ = 0, q_ = 0, group_c_ = 0, group_k_ = 0, panels_ = 0, wp_ = 0, depth_ = 0;
  bool flat_ = false, gathered_ = false, copied_ = false;
  int64_t pixels_per_block_ = 1, rows_per_block_ = 1, blocks_per_image_ = 1, pixel_blocks_ = 1, panel_blocks_ = 1;
};

}  // namespace

}  // namespace conv2d

std::unique_ptr<Op> make_conv2d(const OpSpec& spec) { return std::make_unique<conv2d::Conv2d>(spec); }

int64_t conv2d_packed_floats(const OpSpec& spec) {
  return conv2d::packed_floats(conv2d::kernels(isa()).panel, spec.r * spec.s * (spec.c / spec.groups), spec.k, spec.groups);
}

void conv2d_pack(const OpSpec& spec, const float* weight, float* out) { conv2d::pack(conv2d::kernels(isa()).panel, spec, weight, out); }

}  // namespace fb

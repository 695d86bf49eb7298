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

std::vector<Segment> blocked_segments(const std::vector<Segment>& runs, int64_t max_block) {
  int64_t total = 0;
  for (const Segment& run : runs) total += run.length;
  const int64_t blocks = ceil_div(total, max_block);
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

void multiply(const Kernels& kernels, Block& block) {
  Tile tile = block.tile;
  Ahead& ahead = block.ahead;
  const int64_t tiles = ceil_div(block.pixels, kernels.max_rows), lines = block.depth * 16;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = (block.pixels + tiles - 1 - i) / tiles;  // balanced: 49 = 13 + 12 + 12 + 12
    for (int64_t panel = 0; panel < block.panels; ++panel) {
      Tile t = tile;
      const int64_t channel = panel * kernels.panel;
      t.b += channel * block.depth;
      t.y += channel;
      t.columns = std::min<int64_t>(kernels.panel, block.channels - channel);
      if (t.bias != nullptr) t.bias += channel;
      if (t.residual != nullptr) t.residual += channel;
      t.next_b = ahead.weights < ahead.weights_end ? ahead.weights : t.b;
      t.next_a = panel == 0 && ahead.input < ahead.input_end ? ahead.input : t.b;
      if (t.next_b == ahead.weights) ahead.weights += lines;
      if (t.next_a == ahead.input) ahead.input += lines;
      kernels.tile[rows](t);
    }
    tile.a += rows * tile.a_stride;
    tile.y += rows * tile.y_stride;
    if (tile.residual != nullptr) tile.residual += rows * tile.residual_stride;
  }
}

int64_t packed_floats(int panel, int64_t depth, int64_t channels, int64_t groups) {
  return groups * round_up(channels / groups, panel) * depth;
}

// Filters are read as they lie, a few input channels of one panel at a time, so that what is written stays in L1.
void pack(int panel, const OpSpec& spec, const float* weight, float* out) {
  constexpr int64_t kChannels = 16;
  const int64_t channels = spec.k / spec.groups, depth_c = spec.c / spec.groups, taps = spec.r * spec.s;
  const int64_t panels = ceil_div(channels, panel), depth = depth_c * taps;
  parallel_for(spec.groups * panels, spec.k * depth, [&](int64_t index) {
    const int64_t group = index / panels, k0 = index % panels * panel;
    const int64_t width = std::min<int64_t>(panel, channels - k0);
    const float* filters = weight + (group * channels + k0) * depth;
    float* target = out + index * depth * panel;
    if (width < panel) std::fill(target, target + depth * panel, 0.0f);
    for (int64_t c0 = 0; c0 < depth_c; c0 += kChannels) {
      const int64_t c1 = std::min(c0 + kChannels, depth_c);
      for (int64_t j = 0; j < width; ++j) {
        const float* filter = filters + j * depth;
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t tap = 0; tap < taps; ++tap) target[(tap * depth_c + c) * panel + j] = filter[c * taps + tap];
      }
    }
  });
}

namespace {

constexpr int64_t kAllWeightBytesInL2 = 384 * 1024;  // weights up to this are walked whole by every task
constexpr int64_t kWeightBytesInL2 = 256 * 1024;     // larger ones in parts of about this
constexpr int64_t kInputBytesInL2 = 400 * 1024;
constexpr int64_t kTaskProducts = 3 << 20;   // multiply-adds of a task: about 10 us
constexpr int64_t kCopyFloats = 64 * 1024;   // of a first-phase task
constexpr int64_t kFetchingTasks = 4;        // of the next step's weights: the last tasks of a step fetch this much
constexpr int64_t kFetchedFloats = 64 * 1024;

class Conv2d final : public Op {
 public:
  explicit Conv2d(const OpSpec& spec) : Op(spec), kernels_(kernels(isa())) {
    p_ = spec.p();
    q_ = spec.q();
    group_c_ = spec.c / spec.groups;
    group_k_ = spec.k / spec.groups;
    panels_ = ceil_div(group_k_, kernels_.panel);
    const bool pointwise = spec.r == 1 && spec.s == 1 && spec.pad_h == 0 && spec.pad_w == 0;
    const bool as_is = pointwise && spec.stride_h == 1 && spec.stride_w == 1 && !spec.nchw_in;
    form_ = as_is ? Form::flat : pointwise ? Form::gathered : Form::rows;
    hp_ = spec.h + 2 * spec.pad_h;
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
    segments_ = blocked_segments(runs, kMaxBlock);
    choose_blocks();
  }

  int64_t tasks() const override { return first_phase_ + pixel_blocks_ * split(); }
  int64_t first_phase_tasks() const override { return first_phase_; }
  int64_t scratch_floats() const override {
    if (form_ == Form::flat || first_phase_ > 0) return 0;
    return form_ == Form::gathered ? units_per_block_ * q_ * group_c_ : input_rows(units_per_block_) * wp_ * group_c_;
  }
  int64_t shared_floats() const override {
    if (first_phase_ == 0) return 0;
    return spec_.groups * group_shared_floats();
  }

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    if (task < first_phase_) return prepare(task, x);
    float* scratch = worker.scratch;
    task -= first_phase_;
    const int64_t pixel_block = task / split(), group = task % split() / panel_blocks_, panel_block = task % panel_blocks_;
    const Range pixels = block_pixels(pixel_block);
    Tile tile{};
    tile.segments = segments_.data();
    tile.segment_count = static_cast<int64_t>(segments_.size());
    tile.relu = spec_.activation == 1;
    tile.y_stride = spec_.ldy;
    tile.residual_stride = spec_.ldr;
    // The block is `runs` rows of `length` output pixels whose inputs start run_step floats apart.
    int64_t runs = 1, length = pixels.end - pixels.begin, run_step = 0;
    const float* a;
    if (form_ == Form::flat) {
      tile.a_stride = spec_.ldx;
      a = x.x + pixels.begin * spec_.ldx + group * group_c_;
    } else {
      const int64_t row = pixels.begin / q_, rows = length / q_;  // output rows, counted over all images
      const float* shared = x.shared + group * (first_phase_ > 0 ? group_shared_floats() : 0);
      if (form_ == Form::gathered) {
        tile.a_stride = group_c_;
        a = shared + pixels.begin * group_c_;
        if (first_phase_ == 0) {
          gather(x.x, row, rows, group, scratch);
          a = scratch;
        }
      } else {
        runs = rows;
        length = q_;
        run_step = spec_.stride_h * wp_ * group_c_;
        tile.a_stride = spec_.stride_w * group_c_;
        const int64_t image = row / p_, first = row % p_ * spec_.stride_h;  // padded input rows
        a = shared + (image * hp_ + first) * wp_ * group_c_;
        if (first_phase_ == 0) {
          copy_rows(x.x, image, first, input_rows(rows), group, scratch);
          a = scratch;
        }
      }
    }
    const int64_t panel_begin = panel_block * panels_ / panel_blocks_, panel_end = (panel_block + 1) * panels_ / panel_blocks_;
    const int64_t channel = group * group_k_ + panel_begin * kernels_.panel;
    tile.b = x.weight + (group * panels_ + panel_begin) * kernels_.panel * depth_;
    tile.bias = x.bias != nullptr ? x.bias + channel : nullptr;
    Block block{tile, length, panel_end - panel_begin, group_k_ - panel_begin * kernels_.panel, depth_,
                next_task(x, pixel_block, panel_block, group, panel_end - panel_begin, worker.team)};
    if (form_ != Form::rows && panel_block < worker.team) {  // the first time that this thread sees these pixels
      block.ahead.input = a + kernels_.max_rows * tile.a_stride;
      block.ahead.input_end = a + length * tile.a_stride;
    }
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t pixel = pixels.begin + i * length;
      block.tile.a = a + i * run_step;
      block.tile.y = x.y + pixel * spec_.ldy + channel;
      block.tile.residual = x.residual != nullptr ? x.residual + pixel * spec_.ldr + channel : nullptr;
      multiply(kernels_, block);
    }
  }

  Range input_pixels(int64_t task) const override {
    if (form_ == Form::flat) return block_pixels(task / split());
    if (task >= first_phase_ && first_phase_ > 0) return {0, 0};  // these wait for the first phase
    if (first_phase_ > 0 && form_ == Form::rows) {
      const int64_t row = task * rows_per_first_task_, last = std::min(row + rows_per_first_task_, spec_.n * hp_);
      return {unpadded_row(row) * spec_.w, unpadded_row(last) * spec_.w};
    }
    const Range out = first_phase_ > 0 ? first_task_pixels(task) : block_pixels(task / split());
    const int64_t first = out.begin / q_, last = (out.end - 1) / q_;  // output rows over all images
    return {unpadded_row(first / p_ * hp_ + first % p_ * spec_.stride_h) * spec_.w,
            unpadded_row(last / p_ * hp_ + last % p_ * spec_.stride_h + input_rows(1)) * spec_.w};
  }
  Range residual_pixels(int64_t task) const override {
    return task < first_phase_ ? Range{0, 0} : block_pixels((task - first_phase_) / split());
  }
  Range tasks_writing(Range pixels) const override {
    if (pixels.begin >= pixels.end) return {0, 0};
    return {first_phase_ + block_of(pixels.begin) * split(), first_phase_ + (block_of(pixels.end - 1) + 1) * split()};
  }

  std::string detail() const override {
    const char* form = form_ == Form::flat ? " pointwise " : form_ == Form::gathered ? " strided pointwise " : " direct ";
    return isa_name(isa()) + std::string(form) + (first_phase_ > 0 ? std::to_string(first_phase_) + "+" : "") + std::to_string(pixel_blocks_) +
           "x" + std::to_string(split()) + " tasks";
  }

 private:
  // flat: 1x1, stride 1, read in place, all images one row of pixels. gathered: strided 1x1, the pixels it reads are copied next to
  // each other and are one row, too. rows: anything else, row by row from a zero-padded copy.
  // (Reading strided 1x1 in place, where rows fill a tile, was no faster than the copy.)
  enum class Form { flat, gathered, rows };

  int64_t split() const { return spec_.groups * panel_blocks_; }
  int64_t input_rows(int64_t rows) const { return (rows - 1) * spec_.stride_h + (spec_.r - 1) * spec_.dilation_h + 1; }
  int64_t group_shared_floats() const {
    return (form_ == Form::gathered ? spec_.n * p_ * q_ : spec_.n * hp_ * wp_) * group_c_;
  }
  // A row of the padded images, all images stacked, as a row of the unpadded ones; rows in the padding move inwards.
  int64_t unpadded_row(int64_t row) const {
    const int64_t image = std::min(row / hp_, spec_.n - 1);
    return image * spec_.h + std::clamp<int64_t>(row - image * hp_ - spec_.pad_h, 0, spec_.h);
  }

  Range block_pixels(int64_t block) const {
    if (form_ != Form::rows && (form_ == Form::flat || first_phase_ > 0)) {
      return {block * units_per_block_, std::min((block + 1) * units_per_block_, spec_.n * p_ * q_)};
    }
    const int64_t image = block / blocks_per_image_, row = block % blocks_per_image_ * units_per_block_;
    return {(image * p_ + row) * q_, (image * p_ + std::min(row + units_per_block_, p_)) * q_};
  }
  int64_t block_of(int64_t pixel) const {
    if (form_ != Form::rows && (form_ == Form::flat || first_phase_ > 0)) return pixel / units_per_block_;
    const int64_t row = pixel / q_;
    return row / p_ * blocks_per_image_ + row % p_ / units_per_block_;
  }
  Range first_task_pixels(int64_t task) const {
    return {task * rows_per_first_task_ * q_, std::min((task + 1) * rows_per_first_task_, spec_.n * p_) * q_};
  }

  // Cuts the work so that a task takes about 10 us and its weights stay in L2 while its pixels pass. Weights that do not fit are cut
  // into panels across tasks; a copy of the input is then made once, in a first phase, for all of them.
  void choose_blocks() {
    const int64_t panel_bytes = depth_ * kernels_.panel * 4;
    const int64_t fitting = std::clamp<int64_t>(kWeightBytesInL2 / panel_bytes, 1, panels_);
    panel_blocks_ = panels_ * panel_bytes <= kAllWeightBytesInL2 ? 1 : ceil_div(panels_, fitting);
    const bool by_pixel = form_ == Form::flat || (form_ == Form::gathered && (panel_blocks_ > 1 || spec_.groups > 1));
    const int64_t unit = by_pixel ? 1 : q_;                        // a block is a number of units: pixels, or rows of one image
    const int64_t units = by_pixel ? spec_.n * p_ * q_ : p_;
    const int64_t unit_bytes = (form_ == Form::rows ? spec_.stride_h * wp_ * group_c_ : unit * depth_) * 4;
    const int64_t in_cache = std::max<int64_t>(1, kInputBytesInL2 / std::max<int64_t>(1, unit_bytes));
    const int64_t products = unit * depth_ * ceil_div(group_k_, panel_blocks_);  // of a unit in one task
    const int64_t wanted = std::max(ceil_div(kTaskProducts, products), ceil_div(4 * kernels_.max_rows, unit));
    const int64_t blocks = ceil_div(units, std::clamp<int64_t>(std::min(wanted, in_cache), 1, units));
    units_per_block_ = ceil_div(units, blocks);
    blocks_per_image_ = ceil_div(units, units_per_block_);
    pixel_blocks_ = by_pixel ? blocks_per_image_ : spec_.n * blocks_per_image_;
    if (form_ != Form::flat && (split() > 1 || by_pixel)) {  // pixels of all images need them all in one place
      const int64_t rows = form_ == Form::gathered ? spec_.n * p_ : spec_.n * hp_;
      const int64_t row_floats = (form_ == Form::gathered ? q_ : wp_) * spec_.c;
      rows_per_first_task_ = std::clamp<int64_t>(kCopyFloats / row_floats, 1, ceil_div(rows, 4));
      first_phase_ = ceil_div(rows, rows_per_first_task_);
    }
  }

  // Weights of the task that this thread probably takes next: later panels of this step, at its end the beginning of the next step's.
  // (Every task fetching a share of up to 8 MB of the next step's weights gained nothing: 14.2 against 14.2 ms.)
  Ahead next_task(const Pointers& x, int64_t pixel_block, int64_t panel_block, int64_t group, int64_t panels, int64_t team) const {
    const int64_t panel_floats = kernels_.panel * depth_;
    if (split() > 1) {
      const int64_t next = group * panel_blocks_ + panel_block + team;
      if (next < split() || pixel_block + 1 < pixel_blocks_) {
        const int64_t at = next % split();
        const float* weights = x.weight + (at / panel_blocks_ * panels_ + at % panel_blocks_ * panels_ / panel_blocks_) * panel_floats;
        return {weights, weights + panels * panel_floats, nullptr, nullptr};
      }
      const int64_t begin = std::min((next - split()) * panels * panel_floats, x.next_weight_floats);
      return {x.next_weight + begin, x.next_weight + std::min(begin + panels * panel_floats, x.next_weight_floats), nullptr, nullptr};
    }
    const int64_t last = pixel_blocks_ - 1 - pixel_block;  // the last tasks share the next step's first weights
    if (last >= kFetchingTasks) return {};
    const int64_t share = std::min(x.next_weight_floats, kFetchedFloats) / kFetchingTasks;
    const float* weights = x.next_weight + (kFetchingTasks - 1 - last) * share;
    return {weights, weights + share, nullptr, nullptr};
  }

  // First phase: a few rows of the copy, all groups.
  void prepare(int64_t task, const Pointers& x) const {
    for (int64_t group = 0; group < spec_.groups; ++group) {
      float* out = x.shared + group * group_shared_floats();
      if (form_ == Form::gathered) {
        const Range pixels = first_task_pixels(task);
        gather(x.x, pixels.begin / q_, (pixels.end - pixels.begin) / q_, group, out + pixels.begin * group_c_);
        continue;
      }
      const int64_t last = std::min((task + 1) * rows_per_first_task_, spec_.n * hp_);
      for (int64_t row = task * rows_per_first_task_; row < last; ++row)
        copy_rows(x.x, row / hp_, row % hp_, 1, group, out + row * wp_ * group_c_);
    }
  }

  // The pixels that `rows` output rows of a strided 1x1 convolution read, next to each other. Rows are counted over all images.
  void gather(const float* x, int64_t first, int64_t rows, int64_t group, float* out) const {
    const int64_t plane = spec_.h * spec_.w;
    for (int64_t row = first; row < first + rows; ++row) {
      const int64_t image = row / p_;
      for (int64_t q = 0; q < q_; ++q, out += group_c_) {
        const int64_t pixel = row % p_ * spec_.stride_h * spec_.w + q * spec_.stride_w;
        if (spec_.nchw_in) {
          const float* source = x + (image * spec_.c + group * group_c_) * plane + pixel;
          for (int64_t c = 0; c < group_c_; ++c) out[c] = source[c * plane];
        } else {
          std::memcpy(out, x + (image * plane + pixel) * spec_.ldx + group * group_c_, static_cast<size_t>(group_c_) * 4);
        }
      }
    }
  }

  // Rows [first, first + rows) of the zero-padded image: [rows][w + 2 pad_w][group_c].
  void copy_rows(const float* x, int64_t image, int64_t first, int64_t rows, int64_t group, float* out) const {
    const int64_t pad = spec_.pad_w * group_c_;
    for (int64_t row = first - spec_.pad_h; row < first - spec_.pad_h + rows; ++row, out += wp_ * group_c_) {
      if (row < 0 || row >= spec_.h) {
        std::fill(out, out + wp_ * group_c_, 0.0f);
        continue;
      }
      std::fill(out, out + pad, 0.0f);
      std::fill(out + pad + spec_.w * group_c_, out + wp_ * group_c_, 0.0f);
      float* inside = out + pad;
      if (spec_.nchw_in) {
        const float* source = x + ((image * spec_.c + group * group_c_) * spec_.h + row) * spec_.w;
        const int64_t plane = spec_.h * spec_.w;
        if (group_c_ == 3) {  // an image: written front to back
          const float *red = source, *green = source + plane, *blue = source + 2 * plane;
          for (int64_t w = 0; w < spec_.w; ++w) {
            inside[3 * w] = red[w];
            inside[3 * w + 1] = green[w];
            inside[3 * w + 2] = blue[w];
          }
        } else {
          for (int64_t c = 0; c < group_c_; ++c)
            for (int64_t w = 0; w < spec_.w; ++w) inside[w * group_c_ + c] = source[c * plane + w];
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
  int64_t p_ = 0, q_ = 0, group_c_ = 0, group_k_ = 0, panels_ = 0, hp_ = 0, wp_ = 0, depth_ = 0;
  Form form_ = Form::flat;
  int64_t units_per_block_ = 1, blocks_per_image_ = 1, pixel_blocks_ = 1, panel_blocks_ = 1, rows_per_first_task_ = 1, first_phase_ = 0;
};

}  // namespace

}  // namespace conv2d

std::unique_ptr<Op> make_conv2d(const OpSpec& spec) { return std::make_unique<conv2d::Conv2d>(spec); }

int64_t conv2d_packed_floats(const OpSpec& spec) {
  return conv2d::packed_floats(conv2d::kernels(isa()).panel, spec.r * spec.s * (spec.c / spec.groups), spec.k, spec.groups);
}

void conv2d_pack(const OpSpec& spec, const float* weight, float* out) { conv2d::pack(conv2d::kernels(isa()).panel, spec, weight, out); }

}  // namespace fb

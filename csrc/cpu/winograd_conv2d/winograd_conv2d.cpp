// 3x3, 5x5, 1x7 and 7x1 convolution of stride 1 by Winograd's algorithm (Lavin and Gray, arXiv 1509.09308): F(2x2, 3x3) takes 16 products instead of 36
// for 2 x 2 outputs, F(4x4, 3x3) 46 instead of 144 for 4 x 4 (at a complex point: Meng and Brothers, arXiv 1901.01965), or 36 at real
// points where more error is allowed. F(2x2, 5x5) takes 46 instead of 100 for 2 x 2; 1x7 and 7x1 take 13 instead of 28 for 4 outputs in a row.
//
//   y = A^T [ sum_c (G w_c G^T) * (B^T d_c B) ] A
//
//   V[points][tiles][C]      = input transform
//   for panel of output channels
//     M[points][tiles][panel] = V[i] * U[panel][i]      as many small matrix products, with the register tiles of conv2d
//     y                   = output transform of M, bias, residual, activation
//
// Fused: a task does all of this for some tiles, V and M stay in its cache. Two-phase, for many channels on few pixels: first all
// of V into memory shared by the tasks, then tasks of (tiles, panels), so that V is made once and the large U is read once. Both add up in
// the same order. The filters are transformed in double precision.
//
// Larger tiles save products (46 for 16 outputs instead of 64) but waste more of them beyond the border and have 2.9 times as many
// transformed weights: F(4x4, 3x3) is for layers with enough pixels.
#include "winograd_conv2d.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../conv2d/conv2d.h"
#include "../ops.h"

namespace fb {

namespace winograd_conv2d {

namespace {

constexpr int64_t kTiles = 52;        // of a task: four register tiles of 13, so that the filters are read seldom
constexpr int64_t kFewestTiles = 12;  // one register tile
constexpr int64_t kFewestTasks = 4;   // fewer leave threads idle
constexpr int64_t kUnevenTasks = 16;  // below this an odd number leaves one of two threads idle at the end
constexpr int64_t kFilterBytesInCache = 3500 << 10;
constexpr int64_t kTaskProducts = 3 << 20;  // of a two-phase task
constexpr int64_t kFetchedFloats = 128 << 10;  // of a map ahead of their use: more would displace what is in use

constexpr int64_t kFewestLargeTiles = 40;  // of an image: with fewer, reading 46 weights for 9 costs more than the products saved

const Kernels& kernels(const OpSpec& spec) {
#if defined(__x86_64__)
  if (spec.bf16 != 0) return kAvx512Bf16;
#endif
  return FB_TABLE_OF(isa());
}

const Transforms& transforms_of(const OpSpec& spec, const Form& form) {
  const Kernels& all = kernels(spec);
  return &form == &kForm2x2 ? all.by2x2 : &form == &kForm4x4 ? all.by4x4 : &form == &kForm4x4Real ? all.by4x4_real : &form == &kForm2x2Five ? all.by2x2_five : all.line;
}

// The layer decides, never the batch: an image has the same bits in company.
const Form& form_of(const OpSpec& spec) {
  if (spec.r == 1) return kForm1x4;
  if (spec.s == 1) return kForm4x1;
  if (spec.r == 5) return kForm2x2Five;
  const Form& form4x4 = spec.real_points ? kForm4x4Real : kForm4x4;
  if (spec.tile != 0) return spec.tile == 2 ? kForm2x2 : form4x4;
  const int64_t small = ceil_div(spec.p(), 2) * ceil_div(spec.q(), 2), large = ceil_div(spec.p(), 4) * ceil_div(spec.q(), 4);
  const bool fewer_products = 10 * large * form4x4.points <= 9 * small * kForm2x2.points;
  return large >= kFewestLargeTiles && fewer_products ? form4x4 : kForm2x2;
}

class WinogradConv2d final : public Op {
 public:
  explicit WinogradConv2d(const OpSpec& spec)
      : Op(spec), form_(form_of(spec)), kernels_(conv2d::kernels(spec)), transforms_(transforms_of(spec, form_)), words_(conv2d::words(kernels_, spec.c)) {
    p_ = spec.p();
    q_ = spec.q();
    tile_rows_ = ceil_div(p_, form_.out_h);
    tile_columns_ = ceil_div(q_, form_.out_w);
    tiles_ = spec.n * tile_rows_ * tile_columns_;
    panels_ = ceil_div(spec.k, kernels_.panel);
    segments_ = conv2d::blocked_segments({{0, static_cast<int32_t>(words_), 0}}, spec.bf16 ? conv2d::kMaxPairsBlock : conv2d::kMaxWinogradBlock);
    choose_blocks();
  }

  int64_t tasks() const override { return first_phase_ + second_phase_; }
  int64_t first_phase_tasks() const override { return first_phase_; }
  bool weights_in_parts() const override { return tile_blocks_ == 1 && panel_blocks_ > 1; }
  int64_t scratch_floats() const override {
    const int64_t zeros = round_up(spec_.c, 16);
    const int64_t m = form_.points * (tiles_per_task_ * kernels_.panel + kSkew);
    return zeros + m + (fused_ ? form_.points * (tiles_per_task_ * words_ + kSkew) : 0) + changed_floats();
  }
  int64_t shared_floats() const override { return fused_ ? 0 : form_.points * (tiles_ * words_ + kSkew); }

  void run(int64_t task, const Pointers& x, const Worker& worker) const override {
    float* scratch = worker.scratch;
    float* zeros = scratch;
    float* m = zeros + round_up(spec_.c, 16);
    if (task < first_phase_) {
      std::fill(zeros, zeros + spec_.c, 0.0f);
      const int64_t begin = task * rows_per_first_task_ * tile_columns_;
      const int64_t end = std::min(begin + rows_per_first_task_ * tile_columns_, tiles_);
      transform_input(x, begin, end, zeros, x.shared + begin * words_, tiles_ * words_ + kSkew, scratch_end(scratch));
      return;
    }
    task -= first_phase_;
    const int64_t tile_begin = first_tile(task / panel_blocks_), panel_block = task % panel_blocks_;
    const int64_t tile_end = first_tile(task / panel_blocks_ + 1);
    const int64_t count = tile_end - tile_begin;
    const float* v;
    int64_t v_stride;
    if (fused_) {
      float* own = m + form_.points * (tiles_per_task_ * kernels_.panel + kSkew);
      v_stride = count * words_ + kSkew;
      std::fill(zeros, zeros + spec_.c, 0.0f);
      transform_input(x, tile_begin, tile_end, zeros, own, v_stride, scratch_end(scratch));
      v = own;
    } else {
      v_stride = tiles_ * words_ + kSkew;
      v = x.shared + tile_begin * words_;
    }
    const int64_t m_stride = count * kernels_.panel + kSkew;
    const int64_t point_floats = words_ * kernels_.panel;
    const int64_t panel_begin = panel_block * panels_ / panel_blocks_, panel_end = (panel_block + 1) * panels_ / panel_blocks_;
    const Maps maps = fused_ ? maps_around(x, tile_begin, tile_end, worker.left > 0) : Maps();
    const int64_t products = (panel_end - panel_begin) * form_.points;
    Span fetching;
    size_t fetched = 0;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int i = 0; i < form_.points; ++i) {
        conv2d::Block block{};
        block.tile.a = v + i * v_stride;
        block.tile.a_stride = words_;
        block.tile.segments = segments_.data();
        block.tile.segment_count = static_cast<int64_t>(segments_.size());
        block.tile.b = x.weight + (panel * form_.points + i) * point_floats;
        block.tile.y = m + i * m_stride;
        block.tile.y_stride = kernels_.panel;
        block.pixels = count;
        block.panels = 1;
        block.channels = kernels_.panel;
        block.depth = words_;
        block.ahead = {block.tile.b + point_floats, block.tile.b + 2 * point_floats, nullptr, nullptr};
        if (panel + 1 == panel_end && i == form_.points - 1) block.ahead = next_task(x, panel_block, worker);
        if (!fused_ && panel == panel_begin && (panel_block == 0 || worker.first) && i < form_.points - 1) {
          block.ahead.input = block.tile.a + v_stride;
          block.ahead.input_end = block.ahead.input + count * words_;
        }
        if (fused_) {
          const bool late = 2 * ((panel - panel_begin) * form_.points + i) >= products;  // earlier, inputs would be displaced again
          if (fetching.begin >= fetching.end && fetched < (late ? maps.spans.size() : maps.inputs)) fetching = maps.spans[fetched++];
          block.ahead.input = fetching.begin;
          block.ahead.input_end = fetching.end;
        }
        conv2d::multiply(kernels_, block);
        if (fused_) fetching.begin = block.ahead.input;
      }
      transform_output(x, tile_begin, tile_end, panel, m, m_stride);
    }
  }

  Range input_pixels(int64_t task) const override {
    if (!fused_ && task >= first_phase_) return {0, 0};  // these wait for the first phase
    const int64_t rows = tiles_ / tile_columns_;
    const int64_t first_row = fused_ ? first_tile(task) / tile_columns_ : task * rows_per_first_task_;
    const int64_t last_row = fused_ ? (first_tile(task + 1) - 1) / tile_columns_ : std::min((task + 1) * rows_per_first_task_, rows) - 1;
    const int64_t first = first_row / tile_rows_ * spec_.h + std::max<int64_t>(0, first_row % tile_rows_ * form_.out_h - spec_.pad_h);
    const int64_t last = last_row / tile_rows_ * spec_.h + std::min(spec_.h, last_row % tile_rows_ * form_.out_h - spec_.pad_h + form_.in_h());
    return {first * spec_.w, last * spec_.w};
  }
  Range residual_pixels(int64_t task) const override {
    if (task < first_phase_) return {0, 0};
    const int64_t block = (task - first_phase_) / panel_blocks_;
    const int64_t first_row = first_tile(block) / tile_columns_, last_row = (first_tile(block + 1) - 1) / tile_columns_;
    return {output_row(first_row) * q_, std::min(output_row(last_row) + form_.out_h, (last_row / tile_rows_ + 1) * p_) * q_};
  }
  Range tasks_writing(Range pixels) const override {
    if (pixels.begin >= pixels.end) return {0, 0};
    const auto block = [&](int64_t pixel) {
      const int64_t row = pixel / q_;
      return (row / p_ * tile_rows_ + row % p_ / form_.out_h) * tile_columns_;
    };
    const int64_t first = block_of(block(pixels.begin)), last = block_of(block(pixels.end - 1) + tile_columns_ - 1);
    return {first_phase_ + first * panel_blocks_, std::min(first_phase_ + (last + 1) * panel_blocks_, tasks())};
  }

  std::string detail() const override {
    const std::string phases = fused_ ? " fused " : " two-phase " + std::to_string(first_phase_) + "+";
    return isa_name(isa()) + std::string(spec_.bf16 ? " bf16 " : " ") + form_.name + phases + std::to_string(second_phase_) + " tasks";
  }

 private:
  struct Span {
    const float *begin = nullptr, *end = nullptr;
  };

  static constexpr int64_t kSkew = 16;  // keeps the points of a channel out of one cache set

  int64_t output_row(int64_t tile_row) const { return tile_row / tile_rows_ * p_ + tile_row % tile_rows_ * form_.out_h; }

  // Blocks of the second phase differ by one tile at most.
  int64_t first_tile(int64_t block) const { return block * tiles_ / tile_blocks_; }
  int64_t block_of(int64_t tile) const { return ((tile + 1) * tile_blocks_ - 1) / tiles_; }

  void choose_blocks() {
    const int64_t filter_bytes = 4 * form_.points * words_ * spec_.k;
    int64_t blocks = std::max(ceil_div(tiles_, kTiles), std::min(kFewestTasks, tiles_ / kFewestTiles));
    if (blocks < kUnevenTasks) blocks = round_up(blocks, 2);
    // Each fused task reads all filters: large ones need more pixels to pay for that.
    fused_ = blocks >= kFewestTasks && (filter_bytes <= kFilterBytesInCache || tiles_ / blocks >= 2 * kFewestTiles);
    if (fused_) {
      tile_blocks_ = blocks;
      panel_blocks_ = 1;
    } else {
      tile_blocks_ = ceil_div(tiles_, 64);
      const int64_t panel_products = ceil_div(tiles_, tile_blocks_) * form_.points * words_ * kernels_.panel;
      panel_blocks_ = ceil_div(panels_, std::clamp<int64_t>(ceil_div(kTaskProducts, panel_products), 1, panels_));
      const int64_t rows = tiles_ / tile_columns_;  // of tiles, all images
      rows_per_first_task_ = std::max<int64_t>(1, std::min(ceil_div(rows, 4), ceil_div(16384, tile_columns_ * spec_.c)));
      first_phase_ = ceil_div(rows, rows_per_first_task_);
    }
    tiles_per_task_ = ceil_div(tiles_, tile_blocks_);
    second_phase_ = tile_blocks_ * panel_blocks_;
  }

  // The rows of the maps that the transforms around these tiles' products touch, output and residual, then from `inputs` on the next task's
  // input. They are fetched during the products, which need no memory; else the transforms would wait for each line of them.
  struct Maps {
    std::vector<Span> spans;
    size_t inputs = 0;
  };
  Maps maps_around(const Pointers& x, int64_t begin, int64_t end, bool go_on) const {
    Maps maps;
    const auto add = [&](const float* map, int64_t row, int64_t column, int64_t column_end, int64_t width, int64_t ld) {
      const float *from = map + (row * width + column) * ld, *to = map + (row * width + column_end) * ld;
      if (!maps.spans.empty() && maps.spans.back().end == from) {
        maps.spans.back().end = to;
      } else if (from < to) {
        maps.spans.push_back({from, to});
      }
    };
    for (const auto& [map, ld] : {std::pair(static_cast<const float*>(x.y), spec_.ldy), std::pair(x.residual, spec_.ldr)}) {
      if (map == nullptr || (end - begin) * form_.out_h * form_.out_w * ld > kFetchedFloats) continue;
      each_tile_row(begin, end, [&, map = map, ld = ld](int64_t tile_row, int64_t first, int64_t last) {
        const int64_t rows_end = std::min(output_row(tile_row) + form_.out_h, (tile_row / tile_rows_ + 1) * p_);
        for (int64_t row = output_row(tile_row); row < rows_end; ++row) add(map, row, first * form_.out_w, std::min(q_, last * form_.out_w), q_, ld);
      });
    }
    maps.inputs = maps.spans.size();
    if (!go_on) return maps;
    const int64_t next_end = first_tile(block_of(end - 1) + 2);
    if ((next_end - end) * form_.out_h * form_.out_w * spec_.ldx > kFetchedFloats) return maps;
    each_tile_row(end, next_end, [&](int64_t tile_row, int64_t first, int64_t last) {
      const int64_t image = tile_row / tile_rows_, top = tile_row % tile_rows_ * form_.out_h - spec_.pad_h;
      const int64_t seen = tile_row % tile_rows_ == 0 ? 0 : form_.in_h() - form_.out_h;  // by the tiles above
      const int64_t left = std::clamp<int64_t>(first * form_.out_w - spec_.pad_w, 0, spec_.w);
      const int64_t right = std::clamp<int64_t>((last - 1) * form_.out_w - spec_.pad_w + form_.in_w(), left, spec_.w);
      for (int64_t row = std::max<int64_t>(0, top + seen); row < std::min(spec_.h, top + form_.in_h()); ++row) add(x.x, image * spec_.h + row, left, right, spec_.w, spec_.ldx);
    });
    return maps;
  }
  // body(tile row, first, last): the columns of tiles from `begin` to `end`, row by row.
  template <typename Body>
  void each_tile_row(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t tile = begin; tile < end;) {
      const int64_t row = tile / tile_columns_, row_end = std::min(end, (row + 1) * tile_columns_);
      body(row, tile - row * tile_columns_, row_end - row * tile_columns_);
      tile = row_end;
    }
  }

  conv2d::Ahead next_task(const Pointers& x, int64_t panel_block, const Worker& worker) const {
    const int64_t floats = words_ * kernels_.panel;
    if (panel_blocks_ == 1 || worker.left == 0) return conv2d::first_of_next_step(x, worker, 0, floats);
    const float* weights = x.weight + (panel_block + 1) % panel_blocks_ * panels_ / panel_blocks_ * form_.points * floats;
    return {weights, weights + floats, nullptr, nullptr};
  }

  // The part of the scratch memory, at its end, for the input of a row of tiles, changed.
  int64_t changed_floats() const { return spec_.pre != 0 ? form_.in_h() * spec_.w * spec_.c : 0; }
  float* scratch_end(float* scratch) const { return scratch + scratch_floats() - changed_floats(); }

  // Tiles [begin, end) of one row of tiles: x from column 0 of their first row on (which may lie above the image), as the transforms read
  // it, and the floats from pixel to pixel. Where x is scaled and shifted first, so much of it as they see is, into `changed`.
  std::pair<const float*, int64_t> row_of_input(const Pointers& x, int64_t begin, int64_t end, float* changed) const {
    const int64_t tile_row = begin / tile_columns_, image = tile_row / tile_rows_, row = tile_row % tile_rows_ * form_.out_h - spec_.pad_h;
    const float* const from = x.x + (image * spec_.h + row) * spec_.w * spec_.ldx;
    if (spec_.pre == 0) return {from, spec_.ldx};
    const int64_t first = begin % tile_columns_ * form_.out_w - spec_.pad_w;
    const int64_t left = std::clamp<int64_t>(first, 0, spec_.w), right = std::clamp<int64_t>(first + (end - begin - 1) * form_.out_w + form_.in_w(), left, spec_.w);
    for (int64_t i = std::max<int64_t>(0, -row); i < std::min<int64_t>(form_.in_h(), spec_.h - row); ++i) {
      const int64_t pixel = i * spec_.w + left;
      kernels_.change(from + pixel * spec_.ldx, spec_.ldx, right - left, spec_.c, x.pre_scale, x.pre_shift, spec_.pre_activation, changed + pixel * spec_.c, spec_.c);
    }
    return {changed, spec_.c};
  }

  void transform_input(const Pointers& x, int64_t begin, int64_t end, const float* zeros, float* v, int64_t v_stride, float* changed) const {
    const int64_t in_h = form_.in_h(), in_w = form_.in_w();
    InputTile tile;
    tile.v_stride = v_stride;
    tile.channels = spec_.c;
    for (int64_t first = begin; first < end;) {
      const int64_t tile_row = first / tile_columns_, last = std::min(end, (tile_row + 1) * tile_columns_);
      const int64_t row = tile_row % tile_rows_ * form_.out_h - spec_.pad_h;
      const auto [input, ld] = row_of_input(x, first, last, changed);
      for (int64_t t = first; t < last; ++t) {
        const int64_t column = t % tile_columns_ * form_.out_w - spec_.pad_w;
        const bool interior = row >= 0 && row + in_h <= spec_.h && column >= 0 && column + in_w <= spec_.w;
        for (int64_t i = 0; i < in_h; ++i) {
          for (int64_t j = 0; j < in_w; ++j) {
            const bool inside = interior || (row + i >= 0 && row + i < spec_.h && column + j >= 0 && column + j < spec_.w);
            tile.source[i * in_w + j] = inside ? input + (i * spec_.w + column + j) * ld : zeros;
          }
        }
        tile.v = v + (t - begin) * words_;
        transforms_.input(tile);
      }
      first = last;
    }
  }

  void transform_output(const Pointers& x, int64_t begin, int64_t end, int64_t panel, const float* m, int64_t m_stride) const {
    const int64_t channel = panel * kernels_.panel;
    OutputTile tile;
    tile.m_stride = m_stride;
    tile.scale = x.scale != nullptr ? x.scale + channel : nullptr;
    tile.bias = x.bias != nullptr ? x.bias + channel : nullptr;
    tile.columns = std::min<int64_t>(kernels_.panel, spec_.k - channel);
    tile.activation = spec_.activation;
    int64_t tile_row = begin / tile_columns_, tile_column = begin % tile_columns_;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t p0 = tile_row % tile_rows_ * form_.out_h, q0 = tile_column * form_.out_w;
      const int64_t pixel = (tile_row / tile_rows_ * p_ + p0) * q_ + q0;
      for (int64_t i = 0; i < form_.out_h * form_.out_w; ++i) {
        const int64_t row = i / form_.out_w, column = i % form_.out_w;
        const bool inside = p0 + row < p_ && q0 + column < q_;
        const int64_t at = pixel + row * q_ + column;
        tile.y[i] = inside ? x.y + at * spec_.ldy + channel : nullptr;
        tile.residual[i] = inside && x.residual != nullptr ? x.residual + at * spec_.ldr + channel : nullptr;
      }
      tile.m = m + (t - begin) * kernels_.panel;
      transforms_.output(tile);
      if (++tile_column == tile_columns_) {
        tile_column = 0;
        ++tile_row;
      }
    }
  }

  const Form& form_;
  const conv2d::Kernels& kernels_;
  const Transforms& transforms_;
  const int64_t words_;  // of a point of all channels
  std::vector<conv2d::Segment> segments_;
  int64_t p_ = 0, q_ = 0, tile_rows_ = 0, tile_columns_ = 0, tiles_ = 0, panels_ = 0;
  bool fused_ = false;
  int64_t tile_blocks_ = 1, tiles_per_task_ = 1 /* at most */, panel_blocks_ = 1, rows_per_first_task_ = 1, first_phase_ = 0, second_phase_ = 0;
};

}  // namespace

}  // namespace winograd_conv2d

std::unique_ptr<Op> make_winograd_conv2d(const OpSpec& spec) { return std::make_unique<winograd_conv2d::WinogradConv2d>(spec); }

std::string winograd_conv2d_refusal(const OpSpec& spec) {
  const bool line = std::min(spec.r, spec.s) == 1 && std::max(spec.r, spec.s) == 7;
  const bool square = spec.r == spec.s && (spec.r == 3 || spec.r == 5);
  if (!line && !square) return "kernel " + std::to_string(spec.r) + "x" + std::to_string(spec.s) + ": winograd handles 3x3, 5x5, 1x7 and 7x1";
  if ((line || spec.r == 5) && spec.tile != 0) return "tile is " + std::to_string(spec.tile) + ": 5x5, 1x7 and 7x1 have one size of tiles, 0";
  if (spec.stride_h != 1 || spec.stride_w != 1) return "stride " + std::to_string(spec.stride_h) + ": winograd handles stride 1";
  if (spec.dilation_h != 1 || spec.dilation_w != 1) return "dilation " + std::to_string(spec.dilation_h) + ": winograd handles dilation 1";
  if (spec.groups != 1) return std::to_string(spec.groups) + " groups: winograd handles 1";
  if (spec.nchw_in) return "planar input: winograd reads NHWC";
  if (spec.pre_activation != kNone && spec.pre == 0) return "an activation of the input without a scale";
  if (spec.bf16 != 0 && spec.pre != 0) return "scales and shifts its input in float32 only";
  if (spec.tile != 0 && spec.tile != 2 && spec.tile != 4) return "tile is " + std::to_string(spec.tile) + ", expected 2, 4 or 0 (what suits the layer)";
  return "";
}

int64_t winograd_conv2d_packed_floats(const OpSpec& spec) {
  const conv2d::Kernels& kernels = conv2d::kernels(spec);
  return winograd_conv2d::form_of(spec).points * conv2d::words(kernels, spec.c) * round_up(spec.k, kernels.panel);
}

// U = G w G^T, packed [panel][point][C][panel width]; for bfloat16 [panel][point][pair of C][panel width], each a word of two.
void winograd_conv2d_pack(const OpSpec& spec, const float* weight, float* out) {
  using winograd_conv2d::kFilters;
  const winograd_conv2d::Form& form = winograd_conv2d::form_of(spec);
  const conv2d::Kernels& kernels = conv2d::kernels(spec);
  const int64_t panel = kernels.panel, words = conv2d::words(kernels, spec.c), per_word = kernels.channels_per_word, taps = spec.r * spec.s;
  parallel_for(ceil_div(spec.k, panel), 4 * spec.k * spec.c * taps, [&](int64_t index) {
    constexpr int64_t kPoints = winograd_conv2d::kMaxPoints * kFilters;
    float w[winograd_conv2d::kMaxTaps * kFilters], u[2][kPoints];
    for (int64_t k0 = 0; k0 < panel; k0 += kFilters) {
      const int64_t columns = std::min(kFilters, panel - k0);
      const int64_t first = index * panel + k0, width = std::clamp<int64_t>(spec.k - first, 0, columns);
      std::fill(w, w + taps * kFilters, 0.0f);
      for (int64_t word = 0; word < words; ++word) {
        for (int64_t half = 0; half < per_word; ++half) {
          const int64_t c = word * per_word + half;
          if (c == spec.c) {
            std::fill(u[half], u[half] + kPoints, 0.0f);
            continue;
          }
          for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < taps; ++i) w[i * kFilters + j] = weight[((first + j) * spec.c + c) * taps + i];
          winograd_conv2d::transform_filters(form, w, u[half]);
        }
        for (int i = 0; i < form.points; ++i) {
          float* target = out + ((index * form.points + i) * words + word) * panel + k0;
          const float *low = u[0] + i * kFilters, *high = u[1] + i * kFilters;
          if (per_word == 1) {
            std::copy(low, low + columns, target);
          } else {
            for (int64_t j = 0; j < columns; ++j) target[j] = conv2d::pair_word(low[j], high[j]);
          }
        }
      }
    }
  });
}

}  // namespace fb

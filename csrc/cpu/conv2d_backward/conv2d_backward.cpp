#include "conv2d_backward.h"

#include <algorithm>

#include "../map_memory/map_memory.h"
#include "../ops.h"

namespace fb::conv2d_backward {

namespace {

constexpr int64_t kPixels = 128;        // products of a sum in registers: the error stays that of a short sum
constexpr int64_t kFilters = 256;       // of a task, at most
constexpr int64_t kFewestFilters = 64;  // to copy the input again for fewer does not pay
constexpr int64_t kTasks = 16;          // wanted; by pixels while a task has kLeastPixels
constexpr int64_t kLeastPixels = 1024;
constexpr int64_t kSumFloats = 128 << 10;  // half of L2
constexpr int64_t kMostChannels = 32;      // of a panel
constexpr int64_t kSummed = 64;            // filters of a task that adds up parts

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

// `count` things in `parts` parts that differ by 1 at most.
int64_t part_begin(int64_t count, int64_t parts, int64_t index) { return count / parts * index + std::min(index, count % parts); }

class Gradient {
 public:
  Gradient(const OpSpec& spec, RowMap dy, RowMap x, const Norm& norm)
      : spec_(spec), dy_(dy), x_(x), norm_(norm), kernels_(kernels()) {
    p_ = spec.p();
    q_ = spec.q();
    taps_ = spec.r * spec.s;
    pixels_ = spec.n * p_ * q_;
    filter_parts_ = ceil_div(spec.k, kFilters);
    pixel_parts_ = std::clamp<int64_t>(ceil_div(kTasks, filter_parts_), 1, ceil_div(pixels_, kLeastPixels));
    while (filter_parts_ * pixel_parts_ < kTasks / 2 && spec.k / (2 * filter_parts_) >= kFewestFilters) filter_parts_ *= 2;
    plain_ = taps_ == 1 && spec.stride_h == 1 && spec.stride_w == 1 && spec.pad_h == 0 && spec.pad_w == 0;
  }

  // dw of each part of the pixels, one after the other: [r][s][panel of c][k][c of the panel]. (In rows of all channels the lines of a tile
  // would lie in a few sets of the L1 cache.)
  int64_t parts() const { return pixel_parts_; }
  int64_t part_floats() const { return taps_ * panels() * spec_.k * kernels_.panel; }
  int64_t panels() const { return ceil_div(spec_.c, kernels_.panel); }

  // The sums of filter k, of the panel of channels that begins with c.
  float* sums_of(float* out, int64_t tap, int64_t c, int64_t k) const {
    return out + ((tap * panels() + c / kernels_.panel) * spec_.k + k) * kernels_.panel;
  }

  void run(float* out) const {
    const int64_t tasks = filter_parts_ * pixel_parts_;
    parallel_for(tasks, 2 * pixels_ * part_floats() / 64, [&](int64_t task) {
      const int64_t part = task / filter_parts_, index = task % filter_parts_;
      const int64_t k0 = part_begin(spec_.k, filter_parts_, index), k1 = part_begin(spec_.k, filter_parts_, index + 1);
      filters(k0, k1, part_begin(pixels_, pixel_parts_, part), part_begin(pixels_, pixel_parts_, part + 1),
              out + part * part_floats());
    });
  }

 private:
  void filters(int64_t k0, int64_t k1, int64_t first, int64_t end, float* out) const {
    const int64_t count = k1 - k0, tiles = ceil_div(count, kernels_.max_rows), panel = kernels_.panel;
    const map_memory::Floats rows(count * kPixels + 64), columns(kPixels * panel);
    // So many taps that their sums stay in L2 while the pixels go by.
    const int64_t taps = std::clamp<int64_t>(kSumFloats / (count * spec_.c), 1, taps_);
    for (int64_t first_tap = 0; first_tap < taps_; first_tap += taps) {
      const int64_t end_tap = std::min(taps_, first_tap + taps);
      for (int64_t pixel = first; pixel < end; pixel += kPixels) {
        const int64_t pixels = std::min(kPixels, end - pixel);
        const float* next_dy = dy_.data + (pixel + pixels) * dy_.ld;
        const float* const end_dy = dy_.data + std::min(pixel + pixels + kPixels, end) * dy_.ld;
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t k = part_begin(count, tiles, i), height = part_begin(count, tiles, i + 1) - k;
          kernels_.rows_of({dy_.data + pixel * dy_.ld + k0 + k, dy_.ld, pixels, height, rows.get() + k * pixels});
        }
        for (int64_t tap = first_tap; tap < end_tap; ++tap) {
          for (int64_t c = 0; c < spec_.c; c += panel) {
            copy(tap, c, pixel, pixels, columns.get());
            // The panel that is copied after this one.
            const bool next_tap = c + panel >= spec_.c, next_block = next_tap && tap + 1 == end_tap;
            const float* const next_x = seen(next_block ? first_tap
                                             : next_tap ? tap + 1
                                                        : tap,
                                             next_tap ? 0 : c + panel, next_block ? std::min(pixel + pixels, end - 1) : pixel);
            for (int64_t i = 0; i < tiles; ++i) {
              const int64_t k = part_begin(count, tiles, i), height = part_begin(count, tiles, i + 1) - k;
              const bool fetches = 16 * i < panel;  // one line of each pixel of the panel
              kernels_.tile[height]({rows.get() + k * pixels, columns.get(), pixels, sums_of(out, tap, c, k0 + k), pixel > first,
                                     next_dy, fetches ? next_x + 16 * i : next_x, fetches ? spec_.stride_w * x_.ld : 0});
              if (end_dy - next_dy > 16 * pixels) next_dy += 16 * pixels;
            }
          }
        }
      }
    }
  }

  // Where channel c lies that a tap sees at an output pixel, or next to there where the tap sees the padding.
  const float* seen(int64_t tap, int64_t c, int64_t pixel) const {
    const int64_t row = pixel / q_, h = row % p_ * spec_.stride_h + down(tap), w = pixel % q_ * spec_.stride_w + right(tap);
    const int64_t at =
        (row / p_ * spec_.h + std::clamp<int64_t>(h, 0, spec_.h - 1)) * spec_.w + std::clamp<int64_t>(w, 0, spec_.w - 1);
    return x_.data + at * x_.ld + c;
  }

  // From an output pixel's place to what a tap sees.
  int64_t down(int64_t tap) const { return tap / spec_.s * spec_.dilation_h - spec_.pad_h; }
  int64_t right(int64_t tap) const { return tap % spec_.s * spec_.dilation_w - spec_.pad_w; }

  // What a tap sees at so many output pixels, a panel of channels.
  void copy(int64_t tap, int64_t c, int64_t pixel, int64_t pixels, float* out) const {
    const int64_t panel = kernels_.panel, channels = std::min(panel, spec_.c - c);
    Norm norm = norm_;
    if (norm.scale != nullptr)
      norm = {norm.mean != nullptr ? norm.mean + c : nullptr, norm.scale + c, norm.bias + c, norm.activation};
    if (plain_) return kernels_.panel_of({x_.data + pixel * x_.ld + c, x_.ld, pixels, channels, norm, out});
    const int64_t down = this->down(tap), right = this->right(tap);
    for (const int64_t end = pixel + pixels; pixel < end;) {  // a row of the output, or what of it there is
      const int64_t row = pixel / q_, from = pixel % q_, to = std::min(q_, from + end - pixel);
      const int64_t h = row % p_ * spec_.stride_h + down;
      const bool inside = h >= 0 && h < spec_.h;
      // Columns q with 0 <= q * stride + right < w.
      const int64_t q0 = inside ? std::clamp(ceil_div(std::max<int64_t>(0, -right), spec_.stride_w), from, to) : to;
      const int64_t q1 = inside ? std::clamp(right < spec_.w ? (spec_.w - 1 - right) / spec_.stride_w + 1 : 0, q0, to) : to;
      std::fill_n(out, (q0 - from) * panel, 0.0f);
      if (q1 > q0) {
        const float* const x = x_.data + ((row / p_ * spec_.h + h) * spec_.w + q0 * spec_.stride_w + right) * x_.ld + c;
        kernels_.panel_of({x, spec_.stride_w * x_.ld, q1 - q0, channels, norm, out + (q0 - from) * panel});
      }
      std::fill_n(out + (q1 - from) * panel, (to - q1) * panel, 0.0f);
      out += (to - from) * panel;
      pixel += to - from;
    }
  }

  const OpSpec& spec_;
  const RowMap dy_, x_;
  const Norm norm_;
  const Kernels& kernels_;
  int64_t p_, q_, taps_, pixels_, filter_parts_, pixel_parts_;
  bool plain_;
};

}  // namespace

void weight_gradient(const OpSpec& spec, RowMap dy, RowMap x, const Norm& norm, float* dw, const int64_t steps[4]) {
  const Gradient gradient(spec, dy, x, norm);
  const int64_t size = gradient.part_floats(), taps = spec.r * spec.s, panel = kernels().panel;
  const map_memory::Floats parts(gradient.parts() * size);
  gradient.run(parts.get());
  const int64_t blocks = ceil_div(spec.k, kSummed);
  parallel_for(gradient.panels() * blocks, gradient.parts() * size, [&](int64_t task) {
    const int64_t c0 = task / blocks * panel, width = std::min(panel, spec.c - c0);
    const int64_t k0 = task % blocks * kSummed, count = std::min(kSummed, spec.k - k0);
    double sums[kSummed * kMostChannels];
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* const from = gradient.sums_of(parts.get(), tap, c0, k0);
      std::copy_n(from, count * panel, sums);
      for (int64_t part = 1; part < gradient.parts(); ++part) {
        const float* const more = from + part * size;
        for (int64_t i = 0; i < count * panel; ++i) sums[i] += more[i];
      }
      float* const to = dw + k0 * steps[0] + c0 * steps[1] + tap / spec.s * steps[2] + tap % spec.s * steps[3];
      for (int64_t k = 0; k < count; ++k)
        for (int64_t c = 0; c < width; ++c) to[k * steps[0] + c * steps[1]] = static_cast<float>(sums[k * panel + c]);
    }
  });
}

}  // namespace fb::conv2d_backward

#include "conv2d_backward.h"

#include <algorithm>
#include <memory>
#include <new>

#include "../map_memory/map_memory.h"
#include "../ops.h"

namespace fb::conv2d_backward {

namespace {

constexpr int64_t kPixels = 128;        // products of a sum in registers: the error stays that of a short sum
constexpr int64_t kFilters = 256;       // of a task, at most
constexpr int64_t kFewestFilters = 64;  // to copy the input again for fewer does not pay
constexpr int64_t kTasks = 16;          // wanted; by pixels while a task has kLeastPixels
constexpr int64_t kLeastPixels = 1024;

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

std::unique_ptr<float, void (*)(void*)> floats(int64_t count) {
  void* const data = map_memory::take(static_cast<size_t>(count) * sizeof(float));
  if (data == nullptr) throw std::bad_alloc();
  return {static_cast<float*>(data), map_memory::give};
}

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

  // dw of each part of the pixels, one after the other: [k][r][s][c].
  int64_t parts() const { return pixel_parts_; }
  int64_t part_floats() const { return spec_.k * taps_ * spec_.c; }

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
    const auto rows = floats(count * kPixels + 64), columns = floats(kPixels * panel);
    for (int64_t pixel = first; pixel < end; pixel += kPixels) {
      const int64_t pixels = std::min(kPixels, end - pixel);
      Fetched next_dy = next_rows(dy_, pixel + pixels, std::min(pixel + pixels + kPixels, end), 1.0),
              next_x = next_rows(x_, pixel + pixels, std::min(pixel + pixels + kPixels, end),
                                 static_cast<double>(spec_.h * spec_.w) / (p_ * q_));
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t k = part_begin(count, tiles, i), height = part_begin(count, tiles, i + 1) - k;
        kernels_.rows_of({dy_.data + pixel * dy_.ld + k0 + k, dy_.ld, pixels, height, rows.get() + k * pixels});
      }
      for (int64_t tap = 0; tap < taps_; ++tap) {
        for (int64_t c = 0; c < spec_.c; c += panel) {
          copy(tap, c, pixel, pixels, columns.get());
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t k = part_begin(count, tiles, i), height = part_begin(count, tiles, i + 1) - k;
            float* const y = out + ((k0 + k) * taps_ + tap) * spec_.c + c;
            kernels_.tile[height]({rows.get() + k * pixels, columns.get(), pixels, y, taps_ * spec_.c,
                                   std::min(panel, spec_.c - c), pixel > first, next_dy.lines(pixels), next_x.lines(pixels)});
          }
        }
      }
    }
  }

  // Lines of memory that are wanted soon, from first to last.
  struct Fetched {
    const float *begin, *end;

    const float* lines(int64_t count) {
      const float* const found = begin;
      if (end - begin > 16 * count) begin += 16 * count;
      return found;
    }
  };

  // The rows of output pixels [first, end) in a map that has `scale` pixels for each of them.
  static Fetched next_rows(RowMap map, int64_t first, int64_t end, double scale) {
    const auto row = [&](int64_t pixel) { return map.data + static_cast<int64_t>(static_cast<double>(pixel) * scale) * map.ld; };
    return {row(first), row(std::max(first, end))};
  }

  // What a tap sees at so many output pixels, a panel of channels.
  void copy(int64_t tap, int64_t c, int64_t pixel, int64_t pixels, float* out) const {
    const int64_t panel = kernels_.panel, channels = std::min(panel, spec_.c - c);
    Norm norm = norm_;
    if (norm.mean != nullptr) norm = {norm.mean + c, norm.scale + c, norm.bias + c, norm.activation};
    if (plain_) return kernels_.panel_of({x_.data + pixel * x_.ld + c, x_.ld, pixels, channels, norm, out});
    const int64_t down = tap / spec_.s * spec_.dilation_h - spec_.pad_h, right = tap % spec_.s * spec_.dilation_w - spec_.pad_w;
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
  const int64_t size = gradient.part_floats(), taps = spec.r * spec.s;
  const bool in_place =
      gradient.parts() == 1 && steps[1] == 1 && steps[3] == spec.c && steps[2] == spec.s * spec.c && steps[0] == taps * spec.c;
  if (in_place) return gradient.run(dw);
  const auto parts = floats(gradient.parts() * size);
  gradient.run(parts.get());
  parallel_for(spec.k, gradient.parts() * size, [&](int64_t k) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* const from = parts.get() + (k * taps + tap) * spec.c;
      float* const to = dw + k * steps[0] + tap / spec.s * steps[2] + tap % spec.s * steps[3];
      for (int64_t c = 0; c < spec.c; ++c) {
        double sum = from[c];
        for (int64_t part = 1; part < gradient.parts(); ++part) sum += from[part * size + c];
        to[c * steps[1]] = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace fb::conv2d_backward

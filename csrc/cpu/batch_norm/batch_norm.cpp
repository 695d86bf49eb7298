// Rows are cut into pieces of a fixed size, whoever computes them; sums of pieces are added in double, in their order.
#include "batch_norm.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>

#include "../ops.h"

namespace fb::batch_norm {

namespace {

constexpr int64_t kPieceRows = 128;
constexpr int64_t kPieceFloats = 1 << 15;  // 128 KiB, read twice
constexpr int64_t kWidth = 512;            // channels that are summed up together: their sums fit in L1
constexpr int64_t kBlock = 64;             // channels of a task that adds up pieces

template <typename T>
const Kernels<T>& kernels() {
  return FB_TABLE_OF(isa()).template of<T>();
}

// Not cleared.
template <typename T>
std::unique_ptr<T[]> array_of(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

struct Pieces {
  int64_t rows, channels, each, count;

  Pieces(int64_t rows, int64_t channels)
      : rows(rows),
        channels(channels),
        each(std::clamp<int64_t>(kPieceFloats / std::min(channels, kWidth), 1, kPieceRows)),
        count(ceil_div(rows, each)) {}

  int64_t begin(int64_t piece) const { return piece * each; }
  int64_t size(int64_t piece) const { return std::min(each, rows - begin(piece)); }

  // body(piece), whole rows, on all threads.
  void run(const std::function<void(int64_t)>& body) const { parallel_for(count, rows * channels, body); }

  // body(piece, first channel, how many of them).
  void run_columns(const std::function<void(int64_t, int64_t, int64_t)>& body) const {
    const int64_t columns = ceil_div(channels, kWidth);
    parallel_for(count * columns, rows * channels, [&](int64_t task) {
      const int64_t c = task % columns * kWidth;
      body(task / columns, c, std::min(kWidth, channels - c));
    });
  }

  // body(c) for every channel.
  void add_up(const std::function<void(int64_t)>& body) const {
    parallel_for(ceil_div(channels, kBlock), count * channels, [&](int64_t task) {
      for (int64_t c = task * kBlock; c < std::min(channels, (task + 1) * kBlock); ++c) body(c);
    });
  }
};

}  // namespace

template <typename T>
void moments(Map<T> x, int64_t rows, int64_t channels, double* mean, double* variance) {
  const Pieces pieces(rows, channels);
  const int64_t size = pieces.count * channels;
  const auto all = array_of<double>(2 * size);
  const auto centres = array_of<float>(2 * size);
  pieces.run_columns([&](int64_t piece, int64_t c, int64_t width) {
    const int64_t at = piece * channels + c;
    const Map<T> columns{x.from(pieces.begin(piece)).data + c, x.ld};
    kernels<T>().moments({columns, pieces.size(piece), width, &all[at], &all[size + at], &centres[at], &centres[size + at]});
  });
  pieces.add_up([&](int64_t c) {
    double sum = 0.0, square = 0.0;
    for (int64_t piece = 0; piece < pieces.count; ++piece) sum += all[piece * channels + c];
    const double centre = sum / static_cast<double>(rows);
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const int64_t at = piece * channels + c;
      const auto count = static_cast<double>(pieces.size(piece));
      // About another centre: sum (x - b)^2 = sum (x - a)^2 + 2 (a - b) sum (x - a) + n (a - b)^2
      const double d = centres[at] - centre;
      square += all[size + at] + d * (2.0 * (all[at] - count * centres[at]) + count * d);
    }
    mean[c] = centre;
    variance[c] = square / static_cast<double>(rows);
  });
}

template <typename T>
void apply(const Apply<T>& t) {
  const Pieces pieces(t.rows, t.channels);
  pieces.run([&](int64_t piece) {
    const int64_t row = pieces.begin(piece);
    Apply<T> part = t;
    part.x = t.x.from(row);
    part.residual = t.residual.from(row);
    part.rows = pieces.size(piece);
    part.y = t.y + row * t.channels;
    if (t.mask != nullptr) part.mask = t.mask + row * mask_stride(t.channels);
    kernels<T>().apply(part);
  });
}

template <typename T>
void sums(const Sums<T>& t, double* dz, double* dz_x) {
  const Pieces pieces(t.rows, t.channels);
  const int64_t size = pieces.count * t.channels;
  const auto all = array_of<double>(2 * size);
  const auto scratch = array_of<float>(2 * size);
  pieces.run_columns([&](int64_t piece, int64_t c, int64_t width) {
    const int64_t row = pieces.begin(piece), at = piece * t.channels + c;
    Sums<T> part = t;
    part.dy.data = t.dy.from(row).data + c;
    part.x.data = t.x.from(row).data + c;
    part.passed = t.passed.from(row, t.channels, c);
    part.mask_ld = mask_stride(t.channels);
    part.mean = t.mean + c;
    part.rows = pieces.size(piece);
    part.channels = width;
    part.dz = &all[at];
    part.dz_x = &all[size + at];
    part.scratch = &scratch[2 * at];
    kernels<T>().sums(part);
  });
  pieces.add_up([&](int64_t c) {
    dz[c] = dz_x[c] = 0.0;
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      dz[c] += all[piece * t.channels + c];
      dz_x[c] += all[size + piece * t.channels + c];
    }
  });
}

template <typename T>
void gradient(const Gradient<T>& t) {
  const Pieces pieces(t.rows, t.channels);
  pieces.run([&](int64_t piece) {
    const int64_t row = pieces.begin(piece);
    Gradient<T> part = t;
    part.dy = t.dy.from(row);
    part.passed = t.passed.from(row, t.channels, 0);
    part.x = t.x.from(row);
    part.added = t.added.from(row);
    part.rows = pieces.size(piece);
    if (t.dx != nullptr) part.dx = t.dx + row * t.channels;
    if (t.dresidual != nullptr) part.dresidual = t.dresidual + row * t.channels;
    kernels<T>().gradient(part);
  });
}

#define FB_FOR_ELEMENT(T)                                            \
  template void moments(Map<T>, int64_t, int64_t, double*, double*); \
  template void apply(const Apply<T>&);                              \
  template void sums(const Sums<T>&, double*, double*);              \
  template void gradient(const Gradient<T>&);
FB_FOR_ELEMENT(float)
FB_FOR_ELEMENT(Bfloat16)
FB_FOR_ELEMENT(Float16)
#undef FB_FOR_ELEMENT

}  // namespace fb::batch_norm

// Average pooling of a row of output pixels; after generic.h, whose cascade it uses.
//
//   for tile of 4 pixels whose windows are 3 wide and one column apart
//     for vector of channels       6 column sums, each shared by the up to 3 windows that hold the column: 6 r + 8 additions, not 4 * 3 r
//   other pixels one by one        every column of the window summed again, in the same order
#pragma once

#include "pooling.h"

namespace {

using fb::pooling::AverageRow;
using fb::pooling::Extent;

constexpr int kSlidingPixels = 4;

// The sum of `count` values that fill(i, values) loads; more than kChain of them in a cascade.
template <int kVectors, typename Fill>
FB_INLINE void sum_of(int64_t count, const Fill& fill, V (&sum)[kVectors]) {
  if (count > fb::pooling::kChain) return cascade<kMeanLevels, kVectors>(fill, 0, count, sum);
  fill(0, sum);
  for (int64_t i = 1; i < count; ++i) {
    V value[kVectors];
    clear(value);
    fill(i, value);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[j] = vadd(sum[j], value[j]);
  }
}

// kVectors vectors of channels from c on.
template <int kVectors, typename AnyPart>
struct Channels {
  const AverageRow& row;
  int64_t c;
  AnyPart part;

  FB_INLINE void column(int64_t i, V (&sum)[kVectors]) const {
    const float* x = row.x + i * row.ldx + c;
    const auto fill = [&](int64_t r, V(&values)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) values[j] = part.load(x + r * row.row_step + j * kLanes);
    };
    sum_of<kVectors>(row.rows, fill, sum);
  }

  FB_INLINE void finish(V sum, int64_t q, int64_t channel) const {
    V v = vdiv(sum, vbroadcast(static_cast<float>(row.row_count * row.columns[q].count)));
    if (row.bias != nullptr) v = vadd(v, part.load(row.bias + channel));
    part.store(row.y + q * row.ldy + channel, vclip(v, row.activation));
  }

  FB_INLINE void pixel(int64_t q) const {
    const Extent window = row.columns[q];
    V sum[kVectors];
    clear(sum);
    sum_of<kVectors>(window.end - window.begin, [&](int64_t i, V(&values)[kVectors]) __attribute__((always_inline)) { column(window.begin + i, values); }, sum);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) finish(sum[j], q, c + j * kLanes);
  }

  FB_INLINE void sliding(int64_t q) const {
    const float* x = row.x + row.columns[q].begin * row.ldx + c;
    V sum[kSlidingPixels + 2];
#pragma GCC unroll 8
    for (int i = 0; i < kSlidingPixels + 2; ++i) sum[i] = part.load(x + i * row.ldx);
    for (int64_t r = 1; r < row.rows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kSlidingPixels + 2; ++i) sum[i] = vadd(sum[i], part.load(x + r * row.row_step + i * row.ldx));
#pragma GCC unroll 8
    for (int i = 0; i < kSlidingPixels; ++i) finish(vadd(vadd(sum[i], sum[i + 1]), sum[i + 2]), q + i, c);
  }
};

template <int kVectors, typename AnyPart>
FB_INLINE Channels<kVectors, AnyPart> channels(const AverageRow& row, int64_t c, Vectors<kVectors>, const AnyPart& part) {
  return {row, c, part};
}

void average_row(const AverageRow& row) {
  for (int64_t q = 0; q < row.pixels;) {
    if (q >= row.sliding_begin && q + kSlidingPixels <= row.sliding_end) {
      for_vectors(row.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
        channels(row, c, Vectors<1>{}, part).sliding(q);
      });
      q += kSlidingPixels;
    } else {
      for_runs(row.channels, [&](int64_t c, auto vectors, const auto& part) __attribute__((always_inline)) {
        channels(row, c, vectors, part).pixel(q);
      });
      ++q;
    }
  }
}

}  // namespace

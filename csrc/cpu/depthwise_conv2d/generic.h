// Depthwise convolution of one row. Vectors run over channels; each channel has its own filter, so nothing is summed across part.
//
//   for tile of 7 output pixels
//     for vector of channels       a tile's channels first: memory is walked in its order (128x147x147: 0.44 ms, the other way 0.65)
//       for r of the rows that exist
//         for input column         loaded (and scaled) once, used by every output pixel that sees it: 3 (7 + 2) loads for 7 * 9 fma
//
// Registers: 7 accumulators + 3 weights + 1 input = 11 of 16 (AVX2). A tile is 7 wide because most networks' maps are multiples of 7;
// rows end with a tile that overlaps the one before. At the image's border one column of a tile is missing: a branch, not a mask.
// Other windows than 3x3 with stride 1 or 2: 7 pixels share the loads of weights only, and pixels whose window leaves the image go one
// by one.
#pragma once

#include "depthwise_conv2d.h"

namespace {

using fb::depthwise_conv2d::Row;

constexpr int kTile = 7;

enum Pre { kPlain, kRectified, kGeneral };

// One vector of channels of a row.
template <Pre kPre, typename AnyPart>
struct Strip {
  const Row& row;
  int64_t c;
  AnyPart part;
  V scale, shift;

  FB_INLINE Strip(const Row& row_, int64_t c_, const AnyPart& part_) : row(row_), c(c_), part(part_), scale(vbroadcast(1.0f)), shift(vzero()) {
    if (kPre == kGeneral && row.pre_scale != nullptr) {
      scale = part.load(row.pre_scale + c);
      shift = part.load(row.pre_shift + c);
    }
  }

  FB_INLINE V input(const float* p) const {
    V v = part.load(p);
    if constexpr (kPre == kRectified) return vrelu(v);
    if constexpr (kPre == kGeneral) {
      if (row.pre_scale != nullptr) {
        V scaled = shift;
        vfma_into(scaled, v, scale);
        v = scaled;
      }
      v = vclip(v, row.pre_activation);
    }
    return v;
  }

  // Bias, activation and store of kPixels sums.
  template <int kPixels>
  FB_INLINE void finish(V (&acc)[kPixels], int64_t q) const {
    const V bias = row.bias != nullptr ? part.load(row.bias + c) : vzero();
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) acc[i] = vadd(acc[i], bias);
    if (row.activation != fb::kNone) {
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) acc[i] = vclip(acc[i], row.activation);
    }
    float* y = row.y + (q - row.first) * row.ldy + c;
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) part.store(y + i * row.ldy, acc[i]);
  }
};

template <Pre kPre, typename AnyPart>
FB_INLINE Strip<kPre, AnyPart> strip(const Row& row, int64_t c, const AnyPart& part) {
  return Strip<kPre, AnyPart>(row, c, part);
}

// kPixels outputs of any window from column `q` on; of the s taps in a row, those of [begin, end) are inside the image.
template <int kPixels, typename AnyStrip>
FB_INLINE void window(const AnyStrip& strip, int64_t q, int64_t begin, int64_t end) {
  const Row& row = strip.row;
  V acc[kPixels];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) acc[i] = vzero();
  for (int64_t r = 0; r < row.r; ++r) {
    if (row.x[r] == nullptr) continue;
    for (int64_t s = begin; s < end; ++s) {
      const V weight = strip.part.load(row.weight + (r * row.s + s) * row.ldw + strip.c);
      const float* x = row.x[r] + (q * row.stride + s * row.dilation - row.pad) * row.ldx + strip.c;
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) vfma_into(acc[i], strip.input(x + i * row.stride * row.ldx), weight);
    }
  }
  strip.finish(acc, q);
}

template <typename AnyStrip>
FB_INLINE void any_window(const AnyStrip& strip) {
  const Row& row = strip.row;
  const int64_t last = row.first + row.pixels, reach = (row.s - 1) * row.dilation;
  for (int64_t q = row.first; q < last;) {
    const int64_t column = q * row.stride - row.pad;
    const bool inside = column >= 0 && column + reach < row.width;
    if (inside && q + kTile <= last && column + (kTile - 1) * row.stride + reach < row.width) {
      window<kTile>(strip, q, 0, row.s);
      q += kTile;
      continue;
    }
    int64_t begin = 0, end = row.s;
    while (begin < end && column + begin * row.dilation < 0) ++begin;
    while (begin < end && column + (end - 1) * row.dilation >= row.width) --end;
    window<1>(strip, q, begin, end);
    ++q;
  }
}

// kPixels outputs of a 3x3 window; at most one column to each side of the image is touched.
template <int kStride, int kPixels, typename AnyStrip>
FB_INLINE void tile3x3(const AnyStrip& strip, int64_t q) {
  constexpr int kColumns = (kPixels - 1) * kStride + 3;
  const Row& row = strip.row;
  const int64_t column = q * kStride - row.pad;
  const bool no_first = column < 0, no_last = column + kColumns > row.width;
  V acc[kPixels];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) acc[i] = vzero();
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
    if (row.x[r] == nullptr) continue;
    V weight[3];
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) weight[s] = strip.part.load(row.weight + (3 * r + s) * row.ldw + strip.c);
    const float* x = row.x[r] + column * row.ldx + strip.c;
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      if ((j == 0 && no_first) || (j == kColumns - 1 && no_last)) continue;
      const V v = strip.input(x + j * row.ldx);
      // Column j is tap s of pixel (j - s) / stride. Ascending j keeps the order s = 0, 1, 2 for every pixel.
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s)
        if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kPixels) vfma_into(acc[(j - s) / kStride], v, weight[s]);
    }
  }
  strip.finish(acc, q);
}

// All channels of a tile, then the next tile: input and output are walked in the order of memory.
template <int kStride, int kPixels, Pre kPre>
FB_INLINE void channels3x3(const Row& row, int64_t q) {
  for_vectors(row.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    tile3x3<kStride, kPixels>(strip<kPre>(row, c, part), q);
  });
}

template <int kStride, int kPixels, Pre kPre>
FB_INLINE void tiles3x3(const Row& row) {
  const int64_t last = row.first + row.pixels;
  int64_t q = row.first;
  for (; q + kPixels <= last; q += kPixels) channels3x3<kStride, kPixels, kPre>(row, q);
  if (q < last) channels3x3<kStride, kPixels, kPre>(row, last - kPixels);
}

template <int kStride, Pre kPre>
FB_INLINE void row3x3(const Row& row) {
  if (row.pixels >= kTile) {
    tiles3x3<kStride, kTile, kPre>(row);
  } else if (row.pixels >= 3) {
    tiles3x3<kStride, 3, kPre>(row);
  } else {
    tiles3x3<kStride, 1, kPre>(row);
  }
}

// Whether tile3x3 can do the row: its pixels stay within one column of the image.
FB_INLINE bool is_narrow3x3(const Row& row) {
  const int64_t last = (row.first + row.pixels - 1) * row.stride - row.pad + 2;
  return row.r == 3 && row.s == 3 && row.dilation == 1 && row.stride <= 2 && row.pad <= 1 && last <= row.width;
}

template <Pre kPre>
void any_channels(const Row& row) {
  if (is_narrow3x3(row)) return row.stride == 1 ? row3x3<1, kPre>(row) : row3x3<2, kPre>(row);
  for_vectors(row.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) { any_window(strip<kPre>(row, c, part)); });
}

void row(const Row& row) {
  if (row.pre_scale != nullptr || row.pre_activation > fb::kRelu) {
    any_channels<kGeneral>(row);
  } else if (row.pre_activation == fb::kRelu) {
    any_channels<kRectified>(row);
  } else {
    any_channels<kPlain>(row);
  }
}

}  // namespace

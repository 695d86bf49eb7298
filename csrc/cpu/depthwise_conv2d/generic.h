// Depthwise convolution of one row. Vectors run over channels; each channel has its own filter, so nothing is summed across part.
//
//   for tile of 7 output pixels
//     for vector of channels       a tile's channels first: memory is walked in its order (128x147x147: 0.44 ms, the other way 0.65)
//       for r of the rows that exist
//         for input column         loaded (and scaled) once, used by every output pixel that sees it: 3 (7 + 2) loads for 7 * 9 fma
//
// Registers: 7 accumulators, 3, 5 or 7 weights, 1 input: at most 15 of 16 (AVX2). A tile is 7 wide because most networks' maps are
// multiples of 7; rows end with a tile that overlaps the one before. At the image's border up to half a window of a tile's columns is
// missing: a branch each, not a mask.
// Windows that are not 3x3 or 5 or 7 columns wide, strides above 2 and dilated ones: 7 pixels share the loads of weights only, and pixels
// whose window leaves the image go one by one.
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

  FB_INLINE Strip(const Row& row_, int64_t c_, const AnyPart& part_)
      : row(row_), c(c_), part(part_), scale(vbroadcast(1.0f)), shift(vzero()) {
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

// kPixels outputs of a window of kWindow columns; at most half a window to each side of the image is touched.
template <int kWindow, int kStride, int kPixels, typename AnyStrip>
FB_INLINE void tile(const AnyStrip& strip, int64_t q) {
  constexpr int kColumns = (kPixels - 1) * kStride + kWindow, kReach = kWindow / 2;
  const Row& row = strip.row;
  const int64_t column = q * kStride - row.pad, begin = -column, end = row.width - column;  // of the columns that exist
  V acc[kPixels];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) acc[i] = vzero();
  const auto add_row = [&](int64_t r) __attribute__((always_inline)) {
    if (row.x[r] == nullptr) return;
    V weight[kWindow];
#pragma GCC unroll 8
    for (int s = 0; s < kWindow; ++s) weight[s] = strip.part.load(row.weight + (kWindow * r + s) * row.ldw + strip.c);
    const float* x = row.x[r] + column * row.ldx + strip.c;
#pragma GCC unroll 32
    for (int j = 0; j < kColumns; ++j) {
      if ((j < kReach && j < begin) || (j >= kColumns - kReach && j >= end)) continue;
      const V v = strip.input(x + j * row.ldx);
      // Column j is tap s of pixel (j - s) / stride. Ascending j keeps the order s = 0, 1, 2 ... for every pixel.
#pragma GCC unroll 8
      for (int s = 0; s < kWindow; ++s)
        if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kPixels) vfma_into(acc[(j - s) / kStride], v, weight[s]);
    }
  };
  if constexpr (kWindow == 3) {
#pragma GCC unroll 3
    for (int64_t r = 0; r < 3; ++r) add_row(r);
  } else {
    for (int64_t r = 0; r < row.r; ++r) add_row(r);
  }
  strip.finish(acc, q);
}

// All channels of a tile, then the next tile: input and output are walked in the order of memory.
template <int kWindow, int kStride, int kPixels, Pre kPre>
FB_INLINE void tile_of_channels(const Row& row, int64_t q) {
  for_vectors(row.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
    tile<kWindow, kStride, kPixels>(strip<kPre>(row, c, part), q);
  });
}

template <int kWindow, int kStride, int kPixels, Pre kPre>
void tiles(const Row& row) {
  const int64_t last = row.first + row.pixels;
  int64_t q = row.first;
  for (; q + kPixels <= last; q += kPixels) tile_of_channels<kWindow, kStride, kPixels, kPre>(row, q);
  if (q < last) tile_of_channels<kWindow, kStride, kPixels, kPre>(row, last - kPixels);
}

template <int kWindow, int kStride, Pre kPre>
FB_INLINE void row_of_tiles(const Row& row) {
  if (row.pixels >= kTile) {
    tiles<kWindow, kStride, kTile, kPre>(row);
  } else if (row.pixels >= 3) {
    tiles<kWindow, kStride, 3, kPre>(row);
  } else {
    tiles<kWindow, kStride, 1, kPre>(row);
  }
}

// Does the row by tiles, where they can: its pixels stay within half a window of the image. Whether they did.
template <int kWindow, Pre kPre>
FB_INLINE bool by_tiles(const Row& row) {
  constexpr int64_t kReach = kWindow / 2;
  const int64_t last = (row.first + row.pixels - 1) * row.stride - row.pad + kWindow - 1;  // column
  if (row.s != kWindow || (kWindow == 3 && row.r != 3) || row.dilation != 1 || row.stride > 2) return false;
  if (row.pad > kReach || last >= row.width + kReach) return false;
  row.stride == 1 ? row_of_tiles<kWindow, 1, kPre>(row) : row_of_tiles<kWindow, 2, kPre>(row);
  return true;
}

template <Pre kPre>
void any_channels(const Row& row) {
  if (by_tiles<3, kPre>(row) || by_tiles<5, kPre>(row) || by_tiles<7, kPre>(row)) return;
  for_vectors(row.channels,
              [&](int64_t c, const auto& part) __attribute__((always_inline)) { any_window(strip<kPre>(row, c, part)); });
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

// Grouped 3x3, one row of output pixels, one channel block:
//
//   y[q, k] = act( scale[k] * sum_r sum_c sum_s x[r][q*stride + s][group(k), c] * w[r, c, s, k] + bias[k] + residual[q, k] )
//
//   for r, word c of the group     3 weight vectors, one for each s
//     for input column             repeat: every lane gets word c of its own group
//       3 products                 into the output pixels that see this column; a column is loaded once, not once per tap
//
// A group has kGroup words of input and kFilters output channels. A vector of output holds kUnit groups of 4 or 8 channels, or a part of
// one group (kUnit = 1). Its channels are kept transposed, channel-major: lane c * kUnit + g is channel c of group g, in the weights and
// the accumulators, and likewise in the words of the copied input, whose vectors hold as many groups as fit. Then word c of all groups of
// an output vector is kUnit consecutive words, and repeating them over the lanes is a load that costs no shuffle (shuffles run at half the
// rate of fma). Input is transposed when it is copied, output before it is stored. The including file names what a word is:
// kChannelsPerWord, vproduct_into, and load_words, which makes a vector of them.
//
// Registers, AVX-512: 14 accumulators + 3 weights + 1 spread = 18 of 32. A pixel's three fma depend on each other, so fewer than 8
// accumulators wait for them: rows of 7 do two vectors of a group at once (14 + 6 + 1).
// Rows end with a full tile that overlaps the one before: the same values are computed twice, nothing is masked.
#pragma once

#include "../simd/activation.h"
#include "grouped_conv2d.h"

namespace {

using fb::grouped_conv2d::Copy;
using fb::grouped_conv2d::Row;

template <int kGroup>
constexpr int kBlock = kGroup > kLanes ? kGroup : kLanes;  // words of a copied input pixel: a vector or a group, the wider

template <int kChannels>
constexpr int kGroupsInVector = kChannels < kLanes ? kLanes / kChannels : 1;

// kVectors vectors of output from this one on, of the same group.
template <int kGroup, int kFilters, int kStride, int kPixels, int kVectors>
FB_INLINE void pixels(const Row& row, int64_t q0, int vector) {
  constexpr int kUnit = kGroupsInVector<kFilters>, kInUnit = kGroupsInVector<kGroup>;
  constexpr int kColumns = (kPixels - 1) * kStride + 3;
  constexpr int kVectorWeights = 9 * kGroup * kLanes;
  V acc[kVectors][kPixels];
#pragma GCC unroll 2
  for (int i = 0; i < kVectors; ++i)
#pragma GCC unroll 16
    for (int q = 0; q < kPixels; ++q) acc[i][q] = vzero();
#pragma GCC unroll 16
  for (int q = 0; q < kPixels; ++q) vprefetch_write(row.y + (q0 + q) * row.y_stride + vector * kLanes);  // one line in each pixel
  const float* w = row.weight + vector * kVectorWeights;
  for (int r = 0; r < 3; ++r) {
    const float* x = row.x + r * row.row_step + q0 * kStride * kBlock<kGroup> + vector * kLanes / kFilters;
    const auto channel = [&](int c) __attribute__((always_inline)) {
      V taps[kVectors][3];
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i)
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) taps[i][s] = vload(w + i * kVectorWeights + s * kLanes);
      w += 3 * kLanes;
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j) {
        const V v = vrepeat<kUnit>(x + j * kBlock<kGroup> + c * kInUnit);
        // Column j is tap s of pixel (j - s) / stride. Ascending j keeps the order s = 0, 1, 2 for every pixel.
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          if (j < s || (j - s) % kStride != 0 || (j - s) / kStride >= kPixels) continue;
#pragma GCC unroll 2
          for (int i = 0; i < kVectors; ++i) vproduct_into(acc[i][(j - s) / kStride], v, taps[i][s]);
        }
      }
    };
#pragma GCC unroll 1
    for (int c = 0; c < kGroup; ++c) channel(c);
  }
  // One pass for each part of the epilogue, so that a tile decides once and not for every pixel.
#pragma GCC unroll 2
  for (int i = 0; i < kVectors; ++i) {
    const int64_t offset = (vector + i) * kLanes;
    const V bias = row.bias != nullptr ? vload(row.bias + offset) : vzero();
#pragma GCC unroll 16
    for (int q = 0; q < kPixels; ++q) acc[i][q] = vtranspose<kLanes / kUnit>(acc[i][q]);
    if (row.scale != nullptr) {
      const V scale = vload(row.scale + offset);
#pragma GCC unroll 16
      for (int q = 0; q < kPixels; ++q) acc[i][q] = vmul(acc[i][q], scale);
    }
#pragma GCC unroll 16
    for (int q = 0; q < kPixels; ++q) acc[i][q] = vadd(acc[i][q], bias);
    if (row.residual != nullptr) {
#pragma GCC unroll 16
      for (int q = 0; q < kPixels; ++q)
        acc[i][q] = vadd(acc[i][q], vload(row.residual + (q0 + q) * row.residual_stride + offset));
    }
    if (row.activation > fb::kRelu6) {
      V apart[kPixels];  // a copy: what is handed to a call lies in memory all its life
#pragma GCC unroll 16
      for (int q = 0; q < kPixels; ++q) apart[q] = acc[i][q];
      activate_vectors(apart, kPixels, row.activation);
#pragma GCC unroll 16
      for (int q = 0; q < kPixels; ++q) acc[i][q] = apart[q];
    } else if (row.activation != fb::kNone) {
#pragma GCC unroll 16
      for (int q = 0; q < kPixels; ++q) acc[i][q] = vrelu(acc[i][q]);
      if (row.activation == fb::kRelu6) {
#pragma GCC unroll 16
        for (int q = 0; q < kPixels; ++q) acc[i][q] = vcap6(acc[i][q]);
      }
    }
#pragma GCC unroll 16
    for (int q = 0; q < kPixels; ++q) vstore(row.y + (q0 + q) * row.y_stride + offset, acc[i][q]);
  }
}

// Transposed on the way. The block is one or two cache lines of a pixel, too far apart for the hardware to guess; those of the next block
// are asked for here.
template <int kGroup, bool kChanged, int64_t kActivation>
FB_INLINE void copy_words(const Copy& t) {
  const float* x = t.x;
  float* out = t.out;
  for (int64_t i = 0; i < t.count; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kBlock<kGroup> * kChannelsPerWord; j += 16) vprefetch_l2(x + t.ahead + j);
#pragma GCC unroll 8
    for (int j = 0; j < kBlock<kGroup>; j += kLanes) {
      V v = load_words(x + j * kChannelsPerWord);
      if constexpr (kChanged) {
        V sum = vload(t.shift + j);
        vfma_into(sum, v, vload(t.scale + j));
        v = vclip(sum, kActivation);
      }
      vstore(out + j, vtranspose<kGroupsInVector<kGroup>>(v));
    }
    x += t.step;
    out += kBlock<kGroup>;
  }
}

template <int kGroup>
void copy(const Copy& t) {
  if (t.scale == nullptr || kChannelsPerWord > 1) return copy_words<kGroup, false, fb::kNone>(t);
  if (t.activation == fb::kRelu) return copy_words<kGroup, true, fb::kRelu>(t);
  if (t.activation == fb::kRelu6) return copy_words<kGroup, true, fb::kRelu6>(t);
  copy_words<kGroup, true, fb::kNone>(t);
}

template <int kGroup, int kFilters, int kStride, int kPixels>
FB_INLINE void tiles(const Row& row) {
  constexpr int kInBlock = kBlock<kGroup> / kGroup * kFilters / kLanes;
  constexpr int kVectors = kFilters >= 2 * kLanes && 2 * kPixels <= kWidestTile ? 2 : 1;
  for (int vector = 0; vector < kInBlock; vector += kVectors) {
    int64_t q = 0;
    for (; q + kPixels <= row.pixels; q += kPixels) pixels<kGroup, kFilters, kStride, kPixels, kVectors>(row, q, vector);
    if (q < row.pixels) pixels<kGroup, kFilters, kStride, kPixels, kVectors>(row, row.pixels - kPixels, vector);
  }
}

template <int kGroup, int kFilters, int kStride>
void row(const Row& row) {
  if (row.pixels >= kWidestTile) {
    tiles<kGroup, kFilters, kStride, kWidestTile>(row);
  } else if (row.pixels >= 7) {
    tiles<kGroup, kFilters, kStride, 7>(row);
  } else if (row.pixels >= 3) {
    tiles<kGroup, kFilters, kStride, 3>(row);
  } else {
    tiles<kGroup, kFilters, kStride, 1>(row);
  }
}

}  // namespace

#define FB_GROUPED_ROWS(group, filters) {row<group, filters, 1>, row<group, filters, 2>}
#define FB_GROUPED_NO_ROWS \
  {                        \
    {                      \
      nullptr, nullptr     \
    }                      \
  }

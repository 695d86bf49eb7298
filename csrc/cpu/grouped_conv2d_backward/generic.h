// Lanes are transposed as in grouped_conv2d/generic.h: channel-major in copied pixels, weights and sums, so that a channel of all groups
// of a vector is consecutive floats, which a load repeats over the lanes.
//
// dx, stride 2: u = w + pad; pixels u = 2j and 2j + 1 see columns j and j - 1 of dy by taps 0 and 2, and column j by tap 1. A tile is
// kPairs of such pairs: one load for 3 fma, nothing is multiplied by zeros between pixels of dy.
//
// dw, for r, for a few channels of x: kChannels x 3 taps of sums stay in registers over all pixels of the rows
//   for pixel of dy               1 vector of dy
//     3 * kChannels products      with a repeated channel of x each; taps that leave the image are left out
// A load that repeats for each fma is 3/4 of the peak (Zen 4, both sets), unless the fma itself does it: AVX-512 can where a group is a
// vector or more. Elsewhere kPixels pixels go together, column by column of x, and a load serves up to 3 fma.
// Registers, AVX-512: 24 sums + 4 + 1 of 32; AVX2: 12 + 2 + 1 of 16.
#pragma once

#include "grouped_conv2d_backward.h"

namespace {

using fb::grouped_conv2d_backward::InputRow;
using fb::grouped_conv2d_backward::WeightRows;

template <int kGroup>
constexpr int kBlock = kGroup > kLanes ? kGroup : kLanes;

template <int kChannels>
constexpr int kGroupsInVector = kChannels < kLanes ? kLanes / kChannels : 1;

template <int kGroup, int kPairs>
FB_INLINE void input_pairs(const InputRow& row, int64_t j0, int vector) {
  constexpr int kUnit = kGroupsInVector<kGroup>;
  V even[kPairs], odd[kPairs];
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) even[i] = odd[i] = vzero();
  const int64_t w0 = 2 * j0 - row.pad;
  float* const y = row.y + w0 * row.y_stride + vector * kLanes;
  if (!row.stream) {
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kPairs; ++i) vprefetch_write(y + i * row.y_stride);  // one line in each pixel
  }
  for (int64_t r = 0; r < row.rows; ++r) {
    const float* w = row.weight[r] + vector * (9 * kGroup * kLanes);
    const float* grad = row.grad[r] + j0 * kBlock<kGroup>;
#pragma GCC unroll 1
    for (int k = 0; k < kGroup; ++k) {
      const V first = vload(w), middle = vload(w + kLanes), last = vload(w + 2 * kLanes);
      w += 3 * kLanes;
#pragma GCC unroll 9
      for (int j = 0; j <= kPairs; ++j) {  // column j - 1 of dy
        const V v = vrepeat<kUnit>(grad + j * kBlock<kGroup> + k * kUnit);
        if (j > 0) {
          vfma_into(even[j - 1], v, first);
          vfma_into(odd[j - 1], v, middle);
        }
        if (j < kPairs) vfma_into(even[j], v, last);
      }
    }
  }
  const auto store = [&](int i, V v) __attribute__((always_inline)) {
    if (w0 + i < 0 || w0 + i >= row.width) return;
    v = vtranspose<kLanes / kUnit>(v);
    if (row.stream) {
      vstream(y + i * row.y_stride, v);
    } else {
      vstore(y + i * row.y_stride, v);
    }
  };
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
    store(2 * i, even[i]);
    store(2 * i + 1, odd[i]);
  }
}

template <int kGroup>
void input_row(const InputRow& row) {
  const int64_t pairs = (row.width + row.pad + 1) / 2;
  for (int vector = 0; vector < kBlock<kGroup> / kLanes; ++vector) {
    if (row.rows == 0) {
      for (int64_t w = 0; w < row.width; ++w) vstore(row.y + w * row.y_stride + vector * kLanes, vzero());
      continue;
    }
    int64_t j = 0;
    for (; kMostPairs > 4 && pairs - j > 4; j += kMostPairs) input_pairs<kGroup, kMostPairs>(row, j, vector);
    for (; j < pairs; j += 4) input_pairs<kGroup, 4>(row, j, vector);
  }
  if (row.stream) vstreamed();
}

// Taps kFrom to kTo of channels [c, c + kChannels) of the group, one vector of dy, one pixel.
template <int kUnit, int kInUnit, int kChannels, int kStep, int kFrom, int kTo>
FB_INLINE void pixel(V (&acc)[kChannels][3], const float* grad, const float* x) {
  const V g = vload(grad);
#pragma GCC unroll 8
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 3
    for (int s = kFrom; s <= kTo; ++s) vfma_repeated<kUnit>(acc[c][s], x + s * kStep + c * kInUnit, g);
}

// All taps of kPixels pixels: a repeated channel serves up to 3 of them.
template <int kUnit, int kInUnit, int kChannels, int kStep, int kGradStep, int kStride>
FB_INLINE void pixels(V (&acc)[kChannels][3], const float* grad, const float* x) {
  constexpr int kColumns = (kPixels - 1) * kStride + 3;
  asm("" : "+r"(x));  // or GCC keeps columns for the next call and spills the sums (AVX2: 60 % of the speed)
  V g[kPixels];
#pragma GCC unroll 4
  for (int q = 0; q < kPixels; ++q) g[q] = vload(grad + q * kGradStep);
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) {
      const V v = vrepeat<kUnit>(x + j * kStep + c * kInUnit);
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kPixels) vfma_into(acc[c][s], v, g[(j - s) / kStride]);
      }
    }
  }
}

template <int kGroup, int kFilters, int kStride>
void weight_rows(const WeightRows& t) {
  constexpr int kUnit = kGroupsInVector<kFilters>, kInUnit = kGroupsInVector<kGroup>, kStep = kBlock<kGroup>;
  constexpr int kChannels = kGroup < kMostChannels ? kGroup : kMostChannels;
  constexpr int kGradStep = kBlock<kFilters>;
  const bool left = t.pad > 0, right = (t.pixels - 1) * kStride + 2 - t.pad >= t.width,
             only_middle = t.pixels == 1 && left && right;
  const int64_t begin = left ? 1 : 0, end = right ? t.pixels - 1 : t.pixels;
  for (int vector = 0; vector < kGradStep / kLanes; ++vector) {
    float* sums = t.sums + vector * (9 * kGroup * kLanes);
    for (int64_t r = 0; r < 3; ++r) {
#pragma GCC unroll 1
      for (int c = 0; c < kGroup; c += kChannels) {
        V acc[kChannels][3];
#pragma GCC unroll 8
        for (int i = 0; i < kChannels; ++i)
#pragma GCC unroll 3
          for (int s = 0; s < 3; ++s) acc[i][s] = vzero();
        for (int64_t p = 0; p < t.rows; ++p) {
          const int64_t h = t.first + p * kStride + r;
          if (h < 0 || h >= t.height) continue;
          const float* const grad = t.grad + p * t.pixels * kGradStep + vector * kLanes;
          const float* const x = t.x + h * t.x_step + c * kInUnit - t.pad * kStep;
          if (only_middle) {
            pixel<kUnit, kInUnit, kChannels, kStep, 1, 1>(acc, grad, x);
            continue;
          }
          if (left) pixel<kUnit, kInUnit, kChannels, kStep, 1, 2>(acc, grad, x);
          int64_t q = begin;
          if constexpr (!kRepeatsInFma<kUnit>) {
            for (; q + kPixels <= end; q += kPixels)
              pixels<kUnit, kInUnit, kChannels, kStep, kGradStep, kStride>(acc, grad + q * kGradStep, x + q * kStride * kStep);
          }
          for (; q < end; ++q) pixel<kUnit, kInUnit, kChannels, kStep, 0, 2>(acc, grad + q * kGradStep, x + q * kStride * kStep);
          if (right) pixel<kUnit, kInUnit, kChannels, kStep, 0, 1>(acc, grad + end * kGradStep, x + end * kStride * kStep);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kChannels; ++i)
#pragma GCC unroll 3
          for (int s = 0; s < 3; ++s) vstore(sums + (3 * i + s) * kLanes, vadd(vload(sums + (3 * i + s) * kLanes), acc[i][s]));
        sums += 3 * kChannels * kLanes;
      }
    }
  }
}

void add(double* total, const float* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
}

}  // namespace

#define FB_WEIGHT_ROWS(group, filters) {weight_rows<group, filters, 1>, weight_rows<group, filters, 2>}
#define FB_GROUPED_BACKWARD_KERNELS                                                               \
  {kLanes,                                                                                        \
   kMostPairs,                                                                                    \
   {input_row<4>, input_row<8>, input_row<16>, input_row<32>},                                    \
   {{FB_WEIGHT_ROWS(4, 4), FB_WEIGHT_ROWS(8, 8), FB_WEIGHT_ROWS(16, 16), FB_WEIGHT_ROWS(32, 32)}, \
    {FB_WEIGHT_ROWS(2, 4), FB_WEIGHT_ROWS(4, 8), FB_WEIGHT_ROWS(8, 16), FB_WEIGHT_ROWS(16, 32)}}, \
   add}

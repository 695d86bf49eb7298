// Pixel after pixel, as they lie in memory; sums over pixels are kept in L1 (see batch_norm/generic.h).
#pragma once

#include "../simd/by_activation.h"
#include "squeeze_excite.h"

namespace {

using fb::squeeze_excite::Apply;
using fb::squeeze_excite::Dots;
using fb::squeeze_excite::Gradient;
using fb::squeeze_excite::Product;
using fb::squeeze_excite::Sums;

// Weights are read as they lie: to pack them would take longer than to multiply by them. A dot product has 16 partial sums, whatever
// a vector holds, so that AVX2 and AVX-512 give the same bits.
constexpr int64_t kDotLanes = 16;
constexpr int kVectors = kDotLanes / kLanes;

FB_INLINE float sum_of_lanes(const V (&sum)[kVectors]) {
  float lanes[kDotLanes];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) vstore(lanes + v * kLanes, sum[v]);
#pragma GCC unroll 4
  for (int64_t half = kDotLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// kRows dot products at once, each with its own sums: they hide the latency of a multiply-add.
template <int kRows>
FB_INLINE void dot_rows(const Dots& t, int64_t k) {
  for (int64_t n = 0; n < t.images; ++n) {
    const float *x = t.x + n * t.inputs, *weight = t.weight + k * t.inputs;
    V sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = vzero();
    int64_t i = 0;
    for (; i + kDotLanes <= t.inputs; i += kDotLanes)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          vfma_into(sums[r][v], vload(x + i + v * kLanes), vload(weight + r * t.inputs + i + v * kLanes));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kLanes;
      if (at >= t.inputs) break;
      const int left = static_cast<int>(t.inputs - at < kLanes ? t.inputs - at : kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        vfma_into(sums[r][v], vload_tail(x + at, left), vload_tail(weight + r * t.inputs + at, left));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) t.y[n * t.ldy + k + r] = sum_of_lanes(sums[r]) + (t.bias != nullptr ? t.bias[k + r] : 0.0f);
  }
}

void layer_dots(const Dots& t) {
  int64_t k = 0;
  for (; k + 4 <= t.outputs; k += 4) dot_rows<4>(t, k);
  for (; k < t.outputs; ++k) dot_rows<1>(t, k);
  activate_rows(t.y, t.ldy, t.images, t.outputs, t.activation);
}

constexpr int64_t kBlock = 128;  // products in one chain

template <int kAcross, typename AnyPart>
FB_INLINE void product_columns(const Product& t, int64_t j, const AnyPart& part) {
  for (int64_t k = 0; k < t.rows; ++k) {
    V total[kAcross];
#pragma GCC unroll 4
    for (int v = 0; v < kAcross; ++v) total[v] = vzero();
    for (int64_t first = 0; first < t.inner; first += kBlock) {
      V sum[kAcross];
#pragma GCC unroll 4
      for (int v = 0; v < kAcross; ++v) sum[v] = vzero();
      const int64_t end = first + kBlock < t.inner ? first + kBlock : t.inner;
      for (int64_t i = first; i < end; ++i) {
        const V a = vbroadcast(t.a[k * t.step_k + i * t.step_i]);
#pragma GCC unroll 4
        for (int v = 0; v < kAcross; ++v) vfma_into(sum[v], a, part.load(t.b + i * t.ldb + j + v * kLanes));
      }
#pragma GCC unroll 4
      for (int v = 0; v < kAcross; ++v) total[v] = vadd(total[v], sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kAcross; ++v) part.store(t.y + k * t.ldy + j + v * kLanes, total[v]);
  }
}

void matrix_product(const Product& t) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= t.columns; j += 4 * kLanes) product_columns<4>(t, j, Part<false>{kLanes});
  for (; j + kLanes <= t.columns; j += kLanes) product_columns<1>(t, j, Part<false>{kLanes});
  if (j < t.columns) product_columns<1>(t, j, Part<true>{static_cast<int>(t.columns - j)});
}

// Added up in float for kRun pixels, in double from there on.
constexpr int64_t kRun = 8;

template <bool kProducts, bool kMasked, typename T>
FB_INLINE void sums_of_rows(const Sums<T>& t) {
  for (int64_t c = 0; c < t.channels; ++c) t.sums[c] = 0.0;
  for (int64_t first = 0; first < t.rows; first += kRun) {
    const int64_t end = first + kRun < t.rows ? first + kRun : t.rows;
    for (int64_t row = first; row < end; ++row) {
      const T *dy = kProducts ? t.dy.data + row * t.dy.ld : nullptr, *x = t.x.data + row * t.x.ld;
      const uint8_t* const mask = kMasked ? t.mask + row * t.mask_ld : nullptr;
      for_elements(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
        V sum = row == first ? vzero() : part.load(t.run + c);
        if constexpr (kProducts) {
          vfma_into(sum, vdz<kMasked>(dy, mask, c, part), part.load(x + c));
        } else {
          sum = vadd(sum, part.load(x + c));
        }
        part.store(t.run + c, sum);
      });
    }
    for (int64_t c = 0; c < t.channels; ++c) t.sums[c] += t.run[c];
  }
}

template <typename T>
void rows_sums(const Sums<T>& t) {
  if (t.dy.data == nullptr) {
    sums_of_rows<false, false>(t);
  } else if (t.mask != nullptr) {
    sums_of_rows<true, true>(t);
  } else {
    sums_of_rows<true, false>(t);
  }
}

// The product and the addition of the residual round once together.
template <int64_t kActivation, bool kResidual, bool kMask, typename T>
FB_INLINE void apply_to_rows(const Apply<T>& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const T *x = t.x.data + row * t.x.ld, *residual = kResidual ? t.residual.data + row * t.residual.ld : nullptr;
    T* const y = t.y + row * t.channels;
    uint8_t* const mask = kMask ? t.mask + row * fb::mask_stride(t.channels) : nullptr;
    for_elements(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      V v;
      if constexpr (kResidual) {
        v = part.load(residual + c);
        vfma_into(v, part.load(x + c), part.load(t.gate + c));
      } else {
        v = vmul(part.load(x + c), part.load(t.gate + c));
      }
      if constexpr (kMask) store_bits(mask, c, passed<kActivation>(v));
      part.store(y + c, vclip(v, kActivation));
    });
  }
}

template <int64_t kActivation, bool kResidual, typename T>
FB_INLINE void apply_kept(const Apply<T>& t) {
  if constexpr (kActivation != fb::kNone) {
    if (t.mask != nullptr) return apply_to_rows<kActivation, kResidual, true>(t);
  }
  apply_to_rows<kActivation, kResidual, false>(t);
}

template <typename T>
void rows_apply(const Apply<T>& t) {
  by_activation(t.activation, [&](auto activation) __attribute__((always_inline)) {
    if (t.residual.data != nullptr) {
      apply_kept<activation.value, true>(t);
    } else {
      apply_kept<activation.value, false>(t);
    }
  });
}

template <bool kMasked, bool kX, bool kResidual, typename T>
FB_INLINE void gradient_of_rows(const Gradient<T>& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const T* const dy = t.dy.data + row * t.dy.ld;
    const uint8_t* const mask = kMasked ? t.mask + row * fb::mask_stride(t.channels) : nullptr;
    T *const dx = kX ? t.dx + row * t.channels : nullptr, *const dresidual = kResidual ? t.dresidual + row * t.channels : nullptr;
    for_elements(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
      const V dz = vdz<kMasked>(dy, mask, c, part);
      if constexpr (kResidual) part.store(dresidual + c, dz);
      if constexpr (kX) {
        V v = part.load(t.share + c);
        vfma_into(v, dz, part.load(t.gate + c));
        part.store(dx + c, v);
      }
    });
  }
}

template <bool kMasked, typename T>
FB_INLINE void gradient_wanted(const Gradient<T>& t) {
  if (t.dx == nullptr) {
    gradient_of_rows<kMasked, false, true>(t);
  } else if (t.dresidual == nullptr) {
    gradient_of_rows<kMasked, true, false>(t);
  } else {
    gradient_of_rows<kMasked, true, true>(t);
  }
}

template <typename T>
void rows_gradient(const Gradient<T>& t) {
  t.mask != nullptr ? gradient_wanted<true>(t) : gradient_wanted<false>(t);
}

}  // namespace

#define FB_SQUEEZE_EXCITE_OF(T) {layer_dots, matrix_product, rows_sums<T>, rows_apply<T>, rows_gradient<T>}
#define FB_SQUEEZE_EXCITE_KERNELS \
  {FB_SQUEEZE_EXCITE_OF(float), FB_SQUEEZE_EXCITE_OF(fb::Bfloat16), FB_SQUEEZE_EXCITE_OF(fb::Float16)}

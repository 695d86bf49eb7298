// Pixel after pixel, as they lie in memory; sums over pixels are kept in L1 (see batch_norm/generic.h).
#pragma once

#include "squeeze_excite.h"

namespace {

using fb::squeeze_excite::Apply;
using fb::squeeze_excite::Gradient;
using fb::squeeze_excite::Sums;

// Added up in float for kRun pixels, in double from there on.
constexpr int64_t kRun = 8;

template <bool kProducts, bool kMasked>
FB_INLINE void sums_of_rows(const Sums& t) {
  for (int64_t c = 0; c < t.channels; ++c) t.sums[c] = 0.0;
  for (int64_t first = 0; first < t.rows; first += kRun) {
    const int64_t end = first + kRun < t.rows ? first + kRun : t.rows;
    for (int64_t row = first; row < end; ++row) {
      const float *dy = kProducts ? t.dy.data + row * t.dy.ld : nullptr, *x = t.x.data + row * t.x.ld;
      const uint8_t* const mask = kMasked ? t.mask + row * t.mask_ld : nullptr;
      for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
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

void rows_sums(const Sums& t) {
  if (t.dy.data == nullptr) {
    sums_of_rows<false, false>(t);
  } else if (t.mask != nullptr) {
    sums_of_rows<true, true>(t);
  } else {
    sums_of_rows<true, false>(t);
  }
}

// The product and the addition of the residual round once together.
template <int64_t kActivation, bool kResidual, bool kMask>
FB_INLINE void apply_to_rows(const Apply& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const float *x = t.x.data + row * t.x.ld, *residual = kResidual ? t.residual.data + row * t.residual.ld : nullptr;
    float* const y = t.y + row * t.channels;
    uint8_t* const mask = kMask ? t.mask + row * fb::mask_stride(t.channels) : nullptr;
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
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

template <int64_t kActivation, bool kResidual>
FB_INLINE void apply_kept(const Apply& t) {
  if constexpr (kActivation != fb::kNone) {
    if (t.mask != nullptr) return apply_to_rows<kActivation, kResidual, true>(t);
  }
  apply_to_rows<kActivation, kResidual, false>(t);
}

template <int64_t kActivation>
FB_INLINE void apply_with(const Apply& t) {
  if (t.residual.data != nullptr) {
    apply_kept<kActivation, true>(t);
  } else {
    apply_kept<kActivation, false>(t);
  }
}

void rows_apply(const Apply& t) {
  switch (t.activation) {
    case fb::kRelu:
      return apply_with<fb::kRelu>(t);
    case fb::kRelu6:
      return apply_with<fb::kRelu6>(t);
    default:
      return apply_with<fb::kNone>(t);
  }
}

template <bool kMasked, bool kX, bool kResidual>
FB_INLINE void gradient_of_rows(const Gradient& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const float* const dy = t.dy.data + row * t.dy.ld;
    const uint8_t* const mask = kMasked ? t.mask + row * fb::mask_stride(t.channels) : nullptr;
    float *const dx = kX ? t.dx + row * t.channels : nullptr, *const dresidual =
                                                                  kResidual ? t.dresidual + row * t.channels : nullptr;
    for_vectors(t.channels, [&](int64_t c, const auto& part) __attribute__((always_inline)) {
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

template <bool kMasked>
FB_INLINE void gradient_wanted(const Gradient& t) {
  if (t.dx == nullptr) {
    gradient_of_rows<kMasked, false, true>(t);
  } else if (t.dresidual == nullptr) {
    gradient_of_rows<kMasked, true, false>(t);
  } else {
    gradient_of_rows<kMasked, true, true>(t);
  }
}

void rows_gradient(const Gradient& t) { t.mask != nullptr ? gradient_wanted<true>(t) : gradient_wanted<false>(t); }

}  // namespace

#define FB_SQUEEZE_EXCITE_KERNELS {rows_sums, rows_apply, rows_gradient}

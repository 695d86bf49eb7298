// Bits of what an activation passed (rows.h), a vector at a time. Included after a vector header and part.h, in its target region.
#pragma once

#include "../activation.h"

namespace {

template <int64_t kActivation>
FB_INLINE uint32_t passed(V z) {
  uint32_t bits = vnot_at_most(z, vzero());
  if constexpr (kActivation == fb::kRelu6) bits &= vnot_at_least(z, vbroadcast(6.0f));
  return bits;
}

// The bits of the vector at channel c of a row.
FB_INLINE void store_bits(uint8_t* row, int64_t c, uint32_t bits) {
  uint8_t* const p = row + c / 8;
  if constexpr (kLanes == 16) {
    p[0] = static_cast<uint8_t>(bits);
    p[1] = static_cast<uint8_t>(bits >> 8);
  } else if constexpr (kLanes == 8) {
    *p = static_cast<uint8_t>(bits);
  } else {
    *p = static_cast<uint8_t>(c % 8 == 0 ? bits : *p | bits << 4);
  }
}

FB_INLINE uint32_t load_bits(const uint8_t* row, int64_t c) {
  const uint8_t* const p = row + c / 8;
  if constexpr (kLanes == 16) {
    return p[0] | static_cast<uint32_t>(p[1]) << 8;
  } else if constexpr (kLanes == 8) {
    return *p;
  } else {
    return *p >> c % 8 & 15;
  }
}

// The gradient in front of the activation: dy where the bit is set, else 0.
template <bool kMasked, typename T, typename AnyPart>
FB_INLINE V vdz(const T* dy, const uint8_t* mask, int64_t c, const AnyPart& part) {
  if constexpr (kMasked) {
    return vkeep(load_bits(mask, c), part.load(dy + c));
  } else {
    return part.load(dy + c);
  }
}

}  // namespace

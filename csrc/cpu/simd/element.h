// Loads and stores of maps of any type (cpu/element.h) as vectors of floats. Included after activation.h and part.h, in their target region.
//
// Written with the compiler's vectors for all instruction sets, so that all round alike: AVX512-BF16's own conversion takes subnormal
// numbers for zero, and F16C's is missing on some machines with AVX2. What surrounds these few instructions waits for memory.
#pragma once

#include "../element.h"

namespace {

typedef uint16_t Shorts __attribute__((vector_size(sizeof(V) / 2)));

FB_INLINE V vwiden(const fb::Bfloat16*, UnsignedBits half) { return (V)(half << 16); }

FB_INLINE UnsignedBits vnarrow(const fb::Bfloat16*, V v) {
  const UnsignedBits bits = (UnsignedBits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return v == v ? rounded : (bits >> 16 | 0x40);  // a NaN stays one
}

FB_INLINE V vwiden(const fb::Float16*, UnsignedBits half) {
  const UnsignedBits exponent = half & 0x7c00;
  const UnsignedBits magnitude = (UnsignedBits)vmul((V)((half & 0x7fff) << 13), vbroadcast(0x1p112f));  // subnormal ones, too
  const UnsignedBits special = exponent == 0x7c00 ? magnitude | 0x7f800000 : magnitude;                 // infinity, NaN
  return (V)(special | (half & 0x8000) << 16);
}

FB_INLINE UnsignedBits vnarrow(const fb::Float16*, V v) {
  const UnsignedBits bits = (UnsignedBits)v, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const UnsignedBits normal =
      (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;  // 65520 and more carry into infinity
  const UnsignedBits subnormal = (UnsignedBits)vadd((V)magnitude, vbroadcast(0.5f)) - 0x3f000000;  // a unit of 0.5 is 2^-24
  const UnsignedBits large = magnitude > 0x7f800000 ? (magnitude >> 13 & 0x3ff) | 0x7e00 : UnsignedBits{} + 0x7c00;
  const UnsignedBits finite = magnitude < (113u << 23) ? subnormal : normal;
  return sign | (magnitude < (143u << 23) ? finite : large);
}

// part.h, for elements of any type.
template <bool kTail>
struct ElementPart : Part<kTail> {
  using Part<kTail>::load;
  using Part<kTail>::store;

  template <typename T>
  FB_INLINE V load(const T* p) const {
    Shorts half{};
    if constexpr (kTail) {
      for (int i = 0; i < this->left; ++i) half[i] = p[i].bits;
    } else {
      __builtin_memcpy(&half, p, sizeof(half));
    }
    return vwiden(p, __builtin_convertvector(half, UnsignedBits));
  }

  template <typename T>
  FB_INLINE void store(T* p, V v) const {
    const Shorts half = __builtin_convertvector(vnarrow(p, v), Shorts);
    if constexpr (kTail) {
      for (int i = 0; i < this->left; ++i) p[i].bits = half[i];
    } else {
      __builtin_memcpy(p, &half, sizeof(half));
    }
  }
};

// Calls body(c, part) for every vector of a row of `channels` elements.
template <typename Body>
FB_INLINE void for_elements(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, ElementPart<false>{{kLanes}});
  if (c < channels) body(c, ElementPart<true>{{static_cast<int>(channels - c)}});
}

}  // namespace

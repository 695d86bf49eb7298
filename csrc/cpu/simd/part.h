// Loads and stores of a row's vectors: whole ones, and the last with fewer lanes. Included after a vector header.
#pragma once

namespace {

template <bool kTail>
struct Part {
  int left;  // lanes that exist

  FB_INLINE V load(const float* p) const {
    if constexpr (kTail) {
      return vload_tail(p, left);
    } else {
      return vload(p);
    }
  }
  FB_INLINE void store(float* p, V v) const {
    if constexpr (kTail) {
      vstore_tail(p, v, left);
    } else {
      vstore(p, v);
    }
  }
};

// Calls body(c, part) for every vector of a row of `channels` floats.
template <typename Body>
FB_INLINE void for_vectors(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, Part<false>{kLanes});
  if (c < channels) body(c, Part<true>{static_cast<int>(channels - c)});
}

}  // namespace

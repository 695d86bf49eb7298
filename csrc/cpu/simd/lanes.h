// Lane numbers for permutations, from the kLanes of the vector header that includes this.
#pragma once

namespace {

using DoubleWord = double __attribute__((may_alias, aligned(4)));  // two floats, loaded as one

struct LaneIndex {
  int lane[kLanes];
};

// Lane i of the transpose of a kRows x (kLanes / kRows) matrix.
template <int kRows>
constexpr LaneIndex transposed_lanes() {
  LaneIndex index{};
  for (int i = 0; i < kLanes; ++i) index.lane[i] = i % kRows * (kLanes / kRows) + i / kRows;
  return index;
}

}  // namespace

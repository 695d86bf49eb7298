// Sums that are rounded to float once, at their end: float squares are exact in double, so every instruction set gives the same bits.
#pragma once

#include <cstdint>

namespace fb {

// The sum of term(i), doubles, for i below count: eight partial sums, added in pairs. What the compiler makes vectors of.
template <typename Term>
double sum_in_double(int64_t count, const Term& term) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace fb

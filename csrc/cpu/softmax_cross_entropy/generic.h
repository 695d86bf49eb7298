// One row of logits: forward reads it from memory once and sweeps it twice, for the maximum and for the sums; backward sweeps once.
//
//   for block of 512 logits                  sums of float, added up in double between blocks
//     for group of 16                        one, two or four vectors: lane i always sums the logits i, i + 16, ...
//       d = x - max, sum exp(d), sum w d
//
// The lanes of a group are the same on every instruction set, so the sums are the same bits. exp is that of simd/activation.h;
// below -104 it is 0 in float32, and d is cut there. A NaN anywhere, or a maximum that is infinite, makes d and both sums NaN.
#pragma once

#include "softmax_cross_entropy.h"

namespace {

using fb::softmax_cross_entropy::Gradient;
using fb::softmax_cross_entropy::Sums;

constexpr int kGroup = 16;
constexpr int kParts = kGroup / kLanes;
constexpr int64_t kBlock = 512;

FB_INLINE V vlane_numbers() {
  V v = vzero();
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

FB_INLINE V vlarger(V a, V b) { return b > a ? b : a; }  // b only when it is larger: a NaN in b is passed over

// Calls whole(k, part) for every vector of groups that exist to the last lane, and rest(k, part, lanes) for those of the last
// group, where fewer lanes (none, even) are in the row. `part` numbers the vectors of a group.
template <typename Whole, typename Rest>
FB_INLINE void for_groups(int64_t begin, int64_t end, const Whole& whole, const Rest& rest) {
  int64_t k = begin;
  for (; k + kGroup <= end; k += kGroup)
    for (int part = 0; part < kParts; ++part) whole(k + part * kLanes, part);
  for (int part = 0; k < end && part < kParts; ++part, k += kLanes)
    rest(k, part, static_cast<int>(end - k < kLanes ? end - k : kLanes));
}

float largest(const float* x, int64_t classes) {
  constexpr int kWays = 4;
  const float least = -__builtin_inff();
  V most[kWays] = {vbroadcast(least), vbroadcast(least), vbroadcast(least), vbroadcast(least)};
  int64_t k = 0;
  for (; k + kWays * kLanes <= classes; k += kWays * kLanes)
    for (int i = 0; i < kWays; ++i) most[i] = vlarger(most[i], vload(x + k + i * kLanes));
  for (; k + kLanes <= classes; k += kLanes) most[0] = vlarger(most[0], vload(x + k));
  const V all = vlarger(vlarger(most[0], most[1]), vlarger(most[2], most[3]));
  float lanes[kLanes];
  vstore(lanes, all);
  float found = least;
  for (const float lane : lanes) found = lane > found ? lane : found;
  for (; k < classes; ++k) found = x[k] > found ? x[k] : found;
  return found + 0.0f;  // +0 whichever zero was met first
}

FB_INLINE V vexp_of_distance(V d) { return vexp_of_negative(vat_least(d, -104.0f)); }

template <bool kWeighted>
FB_INLINE void add_block(const float* x, const float* weight, int64_t begin, int64_t end, V max, double* exponential, double* distance) {
  V exponentials[kParts], distances[kParts];
  for (int part = 0; part < kParts; ++part) exponentials[part] = distances[part] = vzero();
  const auto whole = [&](int64_t k, int part) __attribute__((always_inline)) {
    const V d = vsub(vload(x + k), max);
    exponentials[part] = vadd(exponentials[part], vexp_of_distance(d));
    if constexpr (kWeighted) {
      vfma_into(distances[part], d, vload(weight + k));
    } else {
      distances[part] = vadd(distances[part], d);
    }
  };
  const auto rest = [&](int64_t k, int part, int lanes) __attribute__((always_inline)) {
    const auto inside = vlane_numbers() < vbroadcast(static_cast<float>(lanes));
    const V d = vsub(vload_tail(x + k, lanes), max);
    exponentials[part] = vadd(exponentials[part], inside ? vexp_of_distance(d) : vzero());
    V product = d;
    if constexpr (kWeighted) product = vmul(d, vload_tail(weight + k, lanes));
    distances[part] = vadd(distances[part], inside ? product : vzero());
  };
  for_groups(begin, end, whole, rest);
  float lanes[kGroup];
  for (int part = 0; part < kParts; ++part) vstore(lanes + part * kLanes, exponentials[part]);
  for (int i = 0; i < kGroup; ++i) exponential[i] += lanes[i];
  for (int part = 0; part < kParts; ++part) vstore(lanes + part * kLanes, distances[part]);
  for (int i = 0; i < kGroup; ++i) distance[i] += lanes[i];
}

FB_INLINE double sum_of_lanes(const double* lanes) {
  double sum = lanes[0];
  for (int i = 1; i < kGroup; ++i) sum += lanes[i];
  return sum;
}

Sums sums(const float* x, const float* weight, int64_t classes) {
  const float most = largest(x, classes);
  const V max = vbroadcast(most);
  double exponential[kGroup] = {}, distance[kGroup] = {};
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = classes - begin < kBlock ? classes : begin + kBlock;
    if (weight != nullptr) {
      add_block<true>(x, weight, begin, end, max, exponential, distance);
    } else {
      add_block<false>(x, weight, begin, end, max, exponential, distance);
    }
  }
  return {most, sum_of_lanes(exponential), sum_of_lanes(distance)};
}

template <bool kWeighted>
FB_INLINE void gradient_of_row(const Gradient& t) {
  const V max = vbroadcast(t.max), scale = vbroadcast(t.scale), even = vbroadcast(-t.even);
  for_vectors(t.classes, [&](int64_t k, const auto& part) __attribute__((always_inline)) {
    V y = even;
    if constexpr (kWeighted) y = vmul(even, part.load(t.weight + k));
    vfma_into(y, vexp_of_distance(vsub(part.load(t.x + k), max)), scale);
    part.store(t.y + k, y);
  });
  V own = vbroadcast(-t.own);
  vfma_into(own, vexp_of_distance(vsub(vbroadcast(t.x[t.label]), max)), scale);
  t.y[t.label] = own[0];
}

void gradient(const Gradient& t) {
  if (t.weight != nullptr) {
    gradient_of_row<true>(t);
  } else {
    gradient_of_row<false>(t);
  }
}

}  // namespace

#define FB_SOFTMAX_CROSS_ENTROPY_KERNELS {sums, gradient}

// 12 independent chains of fma (or of what `vproduct_into` is): two a cycle at a latency of four need eight.
#pragma once

namespace {

double product_rounds(int64_t rounds) {
  V acc[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) acc[i] = vbroadcast(static_cast<float>(i));
  const V a = vbroadcast(0.999f), b = vbroadcast(0.001f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) vproduct_into(acc[i], a, b);
  }
  V sum = acc[0];
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) sum = vadd(sum, acc[i]);
  volatile float sink[kLanes];
  float out[kLanes];
  vstore(out, sum);
  for (int i = 0; i < kLanes; ++i) sink[i] = out[i];
  (void)sink;
  return 2.0 * 12 * kLanes * static_cast<double>(rounds);
}

}  // namespace

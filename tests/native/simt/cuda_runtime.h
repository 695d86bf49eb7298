// Stands where CUDA's header is looked for: what the kernels need of it, on the CPU.
#pragma once

#include "simt.h"

#define FB_SIMT 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return simt::error != nullptr; }
inline const char* cudaGetErrorString(cudaError_t) {
  const char* found = simt::error;
  simt::error = nullptr;
  return found;
}

using std::isnan;
inline void __syncthreads() { simt::wait(simt::block->barrier, simt::threads()); }
inline float __shfl_down_sync(unsigned, float value, int distance) { return simt::shuffle_down(value, distance); }
inline float __fdiv_rn(float a, float b) { return a / b; }

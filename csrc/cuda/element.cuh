// Elements and vectors of elements: 16 bytes are one memory transaction of a thread, 4 floats or 8 halves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace fb::cuda {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T>
constexpr int kWide = 16 / sizeof(T);

template <typename T, int vec>
struct alignas(sizeof(T) * vec) Vector {
  T at[vec];
};

template <int vec, typename T>
__device__ __forceinline__ Vector<T, vec> load(const T* from) {
  return *reinterpret_cast<const Vector<T, vec>*>(from);
}

template <int vec, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, vec>& value) {
  *reinterpret_cast<Vector<T, vec>*>(to) = value;
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls body with a null pointer of the element type: the shortest way to pass a type to a lambda in C++17.
template <typename Body>
const char* with_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::float32:
      return body(static_cast<float*>(nullptr));
    case Dtype::float16:
      return body(static_cast<__half*>(nullptr));
    case Dtype::bfloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
  return "unknown element type";
}

}  // namespace fb::cuda

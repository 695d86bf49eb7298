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

// Puts a kernel on the stream. On the CPU (tests/native/simt) it runs here and now.
template <typename... Parameters, typename... Args>
const char* start(void (*kernel)(Parameters...), dim3 grid, dim3 threads, Stream stream, Args... args) {
#if defined(FB_SIMT)
  simt::launch(kernel, grid, threads, args...);
#else
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
#endif
  return last_error();
}

// Sigmoid and tanh: rare and long, so once for all elements of a thread.
inline __device__ __noinline__ float activate_by_exponential(float v, int activation) {
  return activation == 3 ? __fdiv_rn(1.0f, 1.0f + expf(-v)) : tanhf(v);
}

// The activation of this number: none, relu, relu6, sigmoid, tanh. NaN stays NaN.
__device__ __forceinline__ float activate(float v, int activation) {
  if (activation == 0) return v;
  if (activation > 2) return activate_by_exponential(v, activation);
  v = v < 0.0f ? 0.0f : v;
  return activation == 2 && v > 6.0f ? 6.0f : v;
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

// The instructions that C++ has no words for: asynchronous copies into shared memory, and matrix products of a warp,
// from sm_80 on. On the CPU (tests/native/simt) they are functions with the same meaning.
#pragma once

#include "element.cuh"

namespace fb::cuda {

#if defined(FB_SIMT)
using simt::load_matrices;
using simt::wait_for_copies;
__device__ __forceinline__ void copy16(void* to, const void* from, bool inside) {
  simt::copy_later(to, from, inside ? 16 : 0);
}
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::multiply<T>(sums, a, b);
}
#else

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes into shared memory, or zeros; there after wait_for_copies().
__device__ __forceinline__ void copy16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0));
}

// Of this thread; a barrier has to follow before others read.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements: lane i points at row i % 8 of matrix i / 8, lane 4g + t gets elements 2t and
// 2t + 1 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// sums [16, 8] += a [16, 16] b [16, 8], in float32. Lane 4g + t has of a: columns 2t, 2t + 1 of rows g and g + 8, then
// columns 2t + 8, 2t + 9; of b: rows 2t, 2t + 1, then 2t + 8, 2t + 9, of column g; of sums: columns 2t, 2t + 1 of row g,
// then of row g + 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FB_MULTIPLY(TYPE, NAME)                                                                            \
  template <>                                                                                              \
  __device__ __forceinline__ void multiply<TYPE>(float (&sums)[4], const uint32_t (&a)[4],                 \
                                                 const uint32_t (&b)[2]) {                                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                            \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                         \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                      \
  }
FB_MULTIPLY(__half, "f16")
FB_MULTIPLY(__nv_bfloat16, "bf16")
#undef FB_MULTIPLY
#endif

}  // namespace fb::cuda

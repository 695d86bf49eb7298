// Max pooling:  y[n, p, q, c] = max_{r, s} x[n, p*stride_h + r - pad_h, q*stride_w + s - pad_w, c]
//
//   for each work item             (grid-stride loop; nhwc: 16 bytes of channels of a pixel, nchw: one element)
//     for r, s inside the image    the running maxima stay in registers: vec floats
//
// Memory bound: a 3x3 stride-2 window reads each input 2.25 times, and the repeats come from L1 and L2, since
// neighbouring threads share rows. Indices are 32-bit when the tensors allow it: 64-bit divisions cost more than the loads.
// At least 4 blocks on a multiprocessor: left alone, ptxas holds three variants at 32 registers and spills up to 20 bytes.
#include "element.cuh"

namespace fb::cuda {
namespace {

constexpr int kThreads = 256;

template <Layout layout, int vec, typename T, typename Int>
__global__ void __launch_bounds__(kThreads, 4)
    max_pool2d_kernel(const T* __restrict__ x, T* __restrict__ y, PoolShape<Int> shape, Int items) {
  const Int step = static_cast<Int>(gridDim.x) * kThreads;
  for (Int item = static_cast<Int>(blockIdx.x) * kThreads + threadIdx.x; item < items; item += step) {
    const Place<Int> at = split<layout, vec>(item, shape);
    const Span<Int> rows = window(at.p, shape.stride_h, shape.pad_h, shape.r, shape.h);
    const Span<Int> columns = window(at.q, shape.stride_w, shape.pad_w, shape.s, shape.w);

    float best[vec];
    for (int v = 0; v < vec; ++v) best[v] = -INFINITY;
    for (Int row = rows.begin; row < rows.end; ++row) {
      for (Int column = columns.begin; column < columns.end; ++column) {
        const Vector<T, vec> value =
            load<vec>(x + offset<layout>(at.n, row, column, at.c, shape.h, shape.w, shape.c));
#pragma unroll
        for (int v = 0; v < vec; ++v) {
          const float candidate = widen(value.at[v]);
          // A NaN that has won is never beaten: x > NaN is false.
          if (candidate > best[v] || isnan(candidate)) best[v] = candidate;
        }
      }
    }

    Vector<T, vec> result;
#pragma unroll
    for (int v = 0; v < vec; ++v) result.at[v] = narrow<T>(best[v]);
    store<vec>(y + offset<layout>(at.n, at.p, at.q, at.c, shape.p, shape.q, shape.c), result);
  }
}

template <Layout layout, int vec, typename T, typename Int>
const char* launch(const T* x, T* y, const PoolShape<int64_t>& wide, Stream stream) {
  const int64_t items = pool_items(layout, wide.n, wide.p, wide.q, wide.c, vec);
  if (items == 0) return nullptr;
  const PoolShape<Int> shape{Int(wide.n), Int(wide.h),   Int(wide.w),   Int(wide.c), Int(wide.p), Int(wide.q),
                             wide.r,      wide.s,        wide.stride_h, wide.stride_w, wide.pad_h, wide.pad_w};
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  const int64_t most = 1 << 16;  // 16.7 million items in flight; the loop does the rest
  return start(max_pool2d_kernel<layout, vec, T, Int>, static_cast<unsigned>(blocks < most ? blocks : most), kThreads,
               stream, x, y, shape, Int(items));
}

}  // namespace

const char* max_pool2d(Dtype dtype, Layout layout, const void* x, void* y, const PoolShape<int64_t>& shape,
                       Stream stream) {
  const int64_t inputs = shape.n * shape.h * shape.w * shape.c;
  const int64_t outputs = shape.n * shape.p * shape.q * shape.c;
  // Room for one grid step past the end of either tensor, so that 32-bit indices never wrap.
  const bool small = inputs < (int64_t{1} << 30) && outputs < (int64_t{1} << 30);
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    constexpr int wide = kWide<T>;
    const bool vectors = shape.c % wide == 0 && aligned16(x) && aligned16(y);
    if (layout == Layout::nchw) {
      return small ? launch<Layout::nchw, 1, T, uint32_t>(from, to, shape, stream)
                   : launch<Layout::nchw, 1, T, int64_t>(from, to, shape, stream);
    }
    if (vectors) {
      return small ? launch<Layout::nhwc, wide, T, uint32_t>(from, to, shape, stream)
                   : launch<Layout::nhwc, wide, T, int64_t>(from, to, shape, stream);
    }
    return small ? launch<Layout::nhwc, 1, T, uint32_t>(from, to, shape, stream)
                 : launch<Layout::nhwc, 1, T, int64_t>(from, to, shape, stream);
  });
}

}  // namespace fb::cuda

// Global average pooling:  y[n, c] = 1/(H W) sum_{h, w} x[n, h, w, c]
//
// nhwc: a block owns kLanes vectors of channels of one image
//   for pixel in kRows-th rows        thread (lane, row) adds every kRows-th pixel: coalesced over lanes
//   kRows partial sums in shared memory, added in row order by row 0
// nchw: a warp owns one plane; 32 partial sums, then a shuffle tree
//
// Which thread adds which pixel depends on H and W alone, so the bits do not depend on the batch. Sums are float32.
// Shared memory: kRows * kLanes * vec floats = 8 KiB (vec 8).
#include "element.cuh"

namespace fb::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kRows = 8;

template <int vec, typename T>
__global__ void __launch_bounds__(kLanes * kRows)
    global_avg_pool_nhwc(const T* __restrict__ x, T* __restrict__ y, int64_t pixels, int64_t c) {
  __shared__ float partial[kRows][kLanes][vec];
  const int lane = threadIdx.x;
  const int row = threadIdx.y;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kLanes + lane) * vec;
  const int64_t image = blockIdx.y;

  float sum[vec];
#pragma unroll
  for (int v = 0; v < vec; ++v) sum[v] = 0.0f;
  if (first < c) {
    const T* from = x + image * pixels * c + first;
    for (int64_t pixel = row; pixel < pixels; pixel += kRows) {
      const Vector<T, vec> value = load<vec>(from + pixel * c);
#pragma unroll
      for (int v = 0; v < vec; ++v) sum[v] += widen(value.at[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < vec; ++v) partial[row][lane][v] = sum[v];
  __syncthreads();
  if (row != 0 || first >= c) return;

  Vector<T, vec> result;
#pragma unroll
  for (int v = 0; v < vec; ++v) {
    float total = partial[0][lane][v];
#pragma unroll
    for (int other = 1; other < kRows; ++other) total += partial[other][lane][v];
    result.at[v] = narrow<T>(total / static_cast<float>(pixels));
  }
  store<vec>(y + image * c + first, result);
}

template <typename T>
__global__ void __launch_bounds__(kLanes * kRows)
    global_avg_pool_nchw(const T* __restrict__ x, T* __restrict__ y, int64_t pixels, int64_t planes) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t plane = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y; plane < planes; plane += step) {
    float sum = 0.0f;
    for (int64_t pixel = threadIdx.x; pixel < pixels; pixel += kLanes) sum += widen(x[plane * pixels + pixel]);
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (threadIdx.x == 0) y[plane] = narrow<T>(sum / static_cast<float>(pixels));
  }
}

constexpr int64_t kMostImages = 65535;  // gridDim.y

template <int vec, typename T>
const char* launch_nhwc(const T* x, T* y, int64_t n, int64_t pixels, int64_t c, Stream stream) {
  const int64_t tiles = (c + kLanes * vec - 1) / (kLanes * vec);
  for (int64_t first = 0; first < n; first += kMostImages) {
    const int64_t images = n - first < kMostImages ? n - first : kMostImages;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(images));
    const char* error = start(global_avg_pool_nhwc<vec, T>, grid, dim3(kLanes, kRows), stream, x + first * pixels * c,
                              y + first * c, pixels, c);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace

const char* global_avg_pool(Dtype dtype, Layout layout, const void* x, void* y, int64_t n, int64_t h, int64_t w,
                            int64_t c, Stream stream) {
  if (n == 0 || c == 0) return nullptr;
  const int64_t pixels = h * w;
  return with_type(dtype, [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    if (layout == Layout::nchw) {
      const int64_t blocks = (n * c + kRows - 1) / kRows;
      const int64_t most = 1 << 20;
      return start(global_avg_pool_nchw<T>, static_cast<unsigned>(blocks < most ? blocks : most), dim3(kLanes, kRows),
                   stream, from, to, pixels, n * c);
    }
    constexpr int wide = kWide<T>;
    if (c % wide == 0 && aligned16(x) && aligned16(y)) return launch_nhwc<wide>(from, to, n, pixels, c, stream);
    return launch_nhwc<1>(from, to, n, pixels, c, stream);
  });
}

}  // namespace fb::cuda

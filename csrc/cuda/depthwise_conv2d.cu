// Depthwise convolution:  y[n, p, q, c] = act((sum_{r, s} pre_act(x[n, h, w, c]) * w[r, s, c]) * scale[c] + bias[c])
//
//   thread: `kAcross` output pixels of a row, `down` rows below each other, 16 bytes of channels
//     filters of 3x3 stay in registers for all of them; larger ones are read again for each row of taps, from L1
//     for row in down
//       for r in R
//         for each input pixel of this row under the strip     read once: 16 bytes
//           for each output pixel that it belongs to           fma, in float32
//
// Memory bound: with strips of 4 an input is read 1.5 times per row of taps, 4.5 times for 3x3, where 9 taps would be 9;
// the repeats come from L1. A sum adds its taps in order, whatever the strip: same bits for any batch.
#include "element.cuh"

namespace fb::cuda {
namespace {

constexpr int kThreads = 128;

// What the activation before the sums leaves of a value: none, relu or relu6. NaN stays NaN.
struct Range {
  float least, most;
  __device__ __forceinline__ float clamp(float v) const { return v < least ? least : v > most ? most : v; }
};

template <typename T, int vec>
__device__ __forceinline__ Vector<T, vec> zeros() {
  Vector<T, vec> value;
#pragma unroll
  for (int v = 0; v < vec; ++v) value.at[v] = narrow<T>(0.0f);
  return value;
}

template <typename T, int vec>
__device__ __forceinline__ void write(T* to, const float (&sum)[vec], int c, const Finish& finish) {
  Vector<T, vec> result;
#pragma unroll
  for (int v = 0; v < vec; ++v) {
    float value = sum[v];
    if (finish.scale != nullptr) value *= finish.scale[c + v];
    if (finish.bias != nullptr) value += finish.bias[c + v];
    result.at[v] = narrow<T>(activate(value, finish.activation));
  }
  store<vec>(to, result);
}

// A window of kR x kS and stride kStride both ways, no dilation.
template <int kR, int kS, int kStride, int kAcross, int vec, typename T>
__global__ void __launch_bounds__(kThreads, 3)
    depthwise_strips(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y, ConvShape shape,
                     Strips strips, int down, Range range, Finish finish, unsigned items) {
  constexpr bool kHeld = kR * kS <= 9;
  constexpr int kSpan = (kAcross - 1) * kStride + kS;
  const unsigned item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const Place<int> at = strip(item, strips, vec, kAcross, down);
  x += (at.n * int64_t{shape.h} * shape.w) * shape.pixel_x + at.c;
  y += (at.n * int64_t{shape.p} * shape.q) * shape.pixel_y + at.c;
  weight += at.c;

  Vector<T, vec> filters[kHeld ? kR * kS : kS];
  if (kHeld) {
#pragma unroll
    for (int tap = 0; tap < kR * kS; ++tap) filters[tap] = load<vec>(weight + tap * shape.c);
  }
  const int left = at.q * kStride - shape.pad_w;
  for (int p = at.p; p < at.p + down && p < shape.p; ++p) {
    float sum[kAcross][vec] = {};
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int h = p * kStride + r - shape.pad_h;
      if (h < 0 || h >= shape.h) continue;
      const T* line = x + int64_t{h} * shape.w * shape.pixel_x;
      if (!kHeld) {
#pragma unroll
        for (int s = 0; s < kS; ++s) filters[s] = load<vec>(weight + (r * kS + s) * shape.c);
      }
      Vector<T, vec> pixels[kSpan];
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const int w = left + i;
        pixels[i] = w >= 0 && w < shape.w ? load<vec>(line + w * shape.pixel_x) : zeros<T, vec>();
      }
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
#pragma unroll
        for (int v = 0; v < vec; ++v) {
          const float value = range.clamp(widen(pixels[i].at[v]));
#pragma unroll
          for (int a = 0; a < kAcross; ++a) {
            const int s = i - a * kStride;
            if (s >= 0 && s < kS) {
              sum[a][v] = fmaf(value, widen(filters[kHeld ? r * kS + s : s].at[v]), sum[a][v]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kAcross; ++a) {
      if (at.q + a < shape.q) {
        write(y + (int64_t{p} * shape.q + at.q + a) * shape.pixel_y, sum[a], at.c, finish);
      }
    }
  }
}

// Any window, stride and dilation: one output pixel.
template <int vec, typename T>
__global__ void __launch_bounds__(kThreads, 8)
    depthwise_any(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y, ConvShape shape,
                  Strips strips, Range range, Finish finish, unsigned items) {
  const unsigned item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const Place<int> at = strip(item, strips, vec, 1, 1);
  x += (at.n * int64_t{shape.h} * shape.w) * shape.pixel_x + at.c;
  float sum[vec] = {};
  for (int r = 0; r < shape.r; ++r) {
    const int h = at.p * shape.stride_h + r * shape.dilation_h - shape.pad_h;
    if (h < 0 || h >= shape.h) continue;
    for (int s = 0; s < shape.s; ++s) {
      const int w = at.q * shape.stride_w + s * shape.dilation_w - shape.pad_w;
      if (w < 0 || w >= shape.w) continue;
      const Vector<T, vec> pixel = load<vec>(x + (int64_t{h} * shape.w + w) * shape.pixel_x);
      const Vector<T, vec> filter = load<vec>(weight + int64_t{r * shape.s + s} * shape.c + at.c);
#pragma unroll
      for (int v = 0; v < vec; ++v) {
        sum[v] = fmaf(range.clamp(widen(pixel.at[v])), widen(filter.at[v]), sum[v]);
      }
    }
  }
  write(y + ((at.n * int64_t{shape.p} + at.p) * shape.q + at.q) * shape.pixel_y + at.c, sum, at.c, finish);
}

constexpr int64_t kMostItems = 1u << 31;
constexpr int64_t kManyThreads = 132 * 2048;  // what fills an H200 once; more than that may do several rows each

// Images in one launch: `items` counts in 32 bits.
int64_t images_at_once(const ConvShape& shape, const Strips& strips) {
  const int64_t most = kMostItems / strip_count(1, strips);
  return most < shape.n ? most : shape.n;
}

template <int kR, int kS, int kStride, int kAcross, typename T>
const char* start_strips(const T* x, const T* weight, T* y, const ConvShape& shape, Range range, Finish finish,
                         Stream stream) {
  constexpr int vec = kWide<T>;
  int down = 4;
  while (down > 1 && strip_count(shape.n, strips_of(shape, vec, kAcross, down)) < kManyThreads) down /= 2;
  const Strips strips = strips_of(shape, vec, kAcross, down);
  const int64_t images = images_at_once(shape, strips);
  for (int64_t n = 0; n < shape.n; n += images) {
    const int64_t items = strip_count(shape.n - n < images ? shape.n - n : images, strips);
    const char* error =
        start(depthwise_strips<kR, kS, kStride, kAcross, vec, T>, static_cast<unsigned>(parts(items, kThreads)),
              kThreads, stream, x + n * shape.h * shape.w * shape.pixel_x, weight,
              y + n * shape.p * shape.q * shape.pixel_y, shape, strips, down, range, finish,
              static_cast<unsigned>(items));
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <int vec, typename T>
const char* start_any(const T* x, const T* weight, T* y, const ConvShape& shape, Range range, Finish finish,
                      Stream stream) {
  const Strips strips = strips_of(shape, vec, 1, 1);
  const int64_t images = images_at_once(shape, strips);
  for (int64_t n = 0; n < shape.n; n += images) {
    const int64_t items = strip_count(shape.n - n < images ? shape.n - n : images, strips);
    const char* error = start(depthwise_any<vec, T>, static_cast<unsigned>(parts(items, kThreads)), kThreads, stream,
                              x + n * shape.h * shape.w * shape.pixel_x, weight,
                              y + n * shape.p * shape.q * shape.pixel_y, shape, strips, range, finish,
                              static_cast<unsigned>(items));
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace

const char* depthwise_conv2d(Dtype dtype, const void* x, const void* weight, void* y, const ConvShape& shape,
                             int pre_activation, Finish finish, Stream stream) {
  if (shape.n == 0) return nullptr;
  const Range range{pre_activation == 0 ? -INFINITY : 0.0f, pre_activation == 2 ? 6.0f : INFINITY};
  return with_type(dtype, [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *from = static_cast<const T*>(x), *filters = static_cast<const T*>(weight);
    T* to = static_cast<T*>(y);
    constexpr int wide = kWide<T>;
    const bool vectors = shape.c % wide == 0 && shape.pixel_x % wide == 0 && shape.pixel_y % wide == 0 &&
                         aligned16(x) && aligned16(weight) && aligned16(y);
    if (!vectors) return start_any<1>(from, filters, to, shape, range, finish, stream);
    const bool square = shape.r == shape.s && shape.stride_h == shape.stride_w;
    const bool dense = shape.dilation_h == 1 && shape.dilation_w == 1;
    if (square && dense && shape.stride_h <= 2) {
      switch (shape.r * 10 + shape.stride_h) {
        case 31:
          return start_strips<3, 3, 1, 4>(from, filters, to, shape, range, finish, stream);
        case 32:
          return start_strips<3, 3, 2, 2>(from, filters, to, shape, range, finish, stream);
        case 51:
          return start_strips<5, 5, 1, 4>(from, filters, to, shape, range, finish, stream);
        case 52:
          return start_strips<5, 5, 2, 2>(from, filters, to, shape, range, finish, stream);
      }
    }
    return start_any<wide>(from, filters, to, shape, range, finish, stream);
  });
}

}  // namespace fb::cuda

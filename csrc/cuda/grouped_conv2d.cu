// Grouped 3x3 convolution with 4 to 64 channels per group, on tensor cores:
//
//   y[n, p, q, k] = act((sum_{r, s, c in group(k)} x[n, h, w, c] * w[k, c, r, s]) * scale[k] + bias[k])
//
// block: a tile of output pixels of one image, 8 x 16 (stride 1) or 8 x 8 (stride 2), and 64 channels
//   the input under the tile, 64 channels a pixel, goes into shared memory by asynchronous copies, zeros outside the image
//   jobs: 16 to 64 pixels of the tile x the channels of one group (two groups of 4 are one of 8, half of it zeros)
//     for each step of 16 of the sum, two units of 8 channels under one tap each
//       b, of each 8 filters             packed in the order of the lanes, from L1
//       a, of each 16 pixels             ldmatrix: its rows are 16 bytes, 8 channels of a pixel under a tap
//       sums += a b                      mma.m16n8k16
//   scale, bias, activation; the tile goes through shared memory once more, so that a pixel's 64 channels are written
//   as one line of 128 bytes
//
// The order of a sum is (tap, channel) in steps of 16 whatever the batch. 8 channels per group fill the instruction,
// 4 fill half of it; a layer with so few channels is memory bound either way. Shared memory: 39 KiB, stride 2: 45 KiB.
#include "tensor_core.cuh"

namespace fb::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kChannels = 64;  // of a block: 8 chunks of 16 bytes
constexpr int kChunks = 8;
constexpr int kTaps = 9;

template <int kStride>
using ConvTile = Tile<8, kStride == 1 ? 16 : 8, kStride, 3>;

template <int kGroup, int kStride>
struct Jobs {
  static constexpr int tiles = ConvTile<kStride>::pixels / 16;  // of 16 pixels
  static constexpr int groups = kChannels / kGroup;
  static constexpr int tiles_each = kGroup <= 16 ? 4 : kGroup == 32 ? tiles / 2 : tiles / 4;
  static constexpr int count = groups * tiles / tiles_each;
  static constexpr int columns = kGroup / 8;               // of 8 filters
  static constexpr int units = kTaps * kGroup / 8;         // of 8 channels under a tap
  static constexpr int steps = (units + 1) / 2;
};

template <int kGroup, int kStride, typename T>
__global__ void __launch_bounds__(kThreads, kGroup == 64 ? 3 : 4)
    grouped_kernel(const T* __restrict__ x, const uint2* __restrict__ packed, T* __restrict__ y, ConvShape shape,
                   int tiles_down, int tiles_across, Finish finish) {
  using Pixels = ConvTile<kStride>;
  using Job = Jobs<kGroup, kStride>;
  alignas(16) __shared__ T input[Pixels::in_pixels * kChannels];
  alignas(16) __shared__ T output[Pixels::pixels * kChannels];
  alignas(16) __shared__ T nothing[8];  // what the last half step reads when the number of units is odd

  const int tile = blockIdx.x, across = tile % tiles_across, down = tile / tiles_across % tiles_down;
  const int64_t image = tile / (tiles_across * tiles_down);
  const int first_channel = blockIdx.y * kChannels;
  const int top = down * Pixels::rows, left = across * Pixels::columns;

  x += image * shape.h * shape.w * shape.pixel_x + first_channel;
  for (int i = threadIdx.x; i < Pixels::in_pixels * kChunks; i += kThreads) {
    const int pixel = i / kChunks, chunk = i % kChunks;
    const int h = top * kStride + pixel / Pixels::in_columns - shape.pad_h;
    const int w = left * kStride + pixel % Pixels::in_columns - shape.pad_w;
    const bool inside = h >= 0 && h < shape.h && w >= 0 && w < shape.w;
    const T* from = inside ? x + (int64_t{h} * shape.w + w) * shape.pixel_x + chunk * 8 : x;
    copy16(input + Pixels::at(pixel, chunk) * 8, from, inside);
  }
  if (threadIdx.x < 8) nothing[threadIdx.x] = narrow<T>(0.0f);
  wait_for_copies();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane % 8 + lane / 8 % 2 * 8, second = lane / 16;  // whose row this lane names to ldmatrix
  for (int job = warp; job < Job::count; job += kWarps) {
    const int group = job % Job::groups, first_tile = job / Job::groups * Job::tiles_each;
    const uint2* filters = packed + int64_t{blockIdx.y * Job::groups + group} * Job::steps * Job::columns * 32 + lane;
    int under[Job::tiles_each];
#pragma unroll
    for (int m = 0; m < Job::tiles_each; ++m) under[m] = Pixels::under((first_tile + m) * 16 + row);

    float sums[Job::tiles_each][Job::columns][4] = {};
#pragma unroll(kGroup <= 8 ? 5 : 3)
    for (int step = 0; step < Job::steps; ++step) {
      uint32_t b[Job::columns][2];
#pragma unroll
      for (int n = 0; n < Job::columns; ++n) {
        const uint2 pair = filters[(step * Job::columns + n) * 32];
        b[n][0] = pair.x, b[n][1] = pair.y;
      }
      const int unit = 2 * step + second;
      const int tap = unit / Job::columns, chunk = group * Job::columns + unit % Job::columns;
      const int offset = tap / 3 * Pixels::in_columns + tap % 3;
#pragma unroll
      for (int m = 0; m < Job::tiles_each; ++m) {
        uint32_t a[4];
        load_matrices(a, unit < Job::units ? input + Pixels::at(under[m] + offset, chunk) * 8 : nothing);
#pragma unroll
        for (int n = 0; n < Job::columns; ++n) multiply<T>(sums[m][n], a, b[n]);
      }
    }

    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < Job::columns; ++n) {
      const int chunk = group * Job::columns + n, k = first_channel + chunk * 8 + 2 * t;
      const float scale0 = finish.scale != nullptr ? finish.scale[k] : 1.0f;
      const float scale1 = finish.scale != nullptr ? finish.scale[k + 1] : 1.0f;
      const float bias0 = finish.bias != nullptr ? finish.bias[k] : 0.0f;
      const float bias1 = finish.bias != nullptr ? finish.bias[k + 1] : 0.0f;
#pragma unroll
      for (int m = 0; m < Job::tiles_each; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Vector<T, 2> pair;
          pair.at[0] = narrow<T>(activate(sums[m][n][2 * half] * scale0 + bias0, finish.activation));
          pair.at[1] = narrow<T>(activate(sums[m][n][2 * half + 1] * scale1 + bias1, finish.activation));
          const int pixel = (first_tile + m) * 16 + half * 8 + g;
          store<2>(output + Pixels::at_output(pixel, chunk) * 8 + 2 * t, pair);
        }
      }
    }
  }
  __syncthreads();

  y += image * shape.p * shape.q * shape.pixel_y + first_channel;
  for (int i = threadIdx.x; i < Pixels::pixels * kChunks; i += kThreads) {
    const int pixel = i / kChunks, chunk = i % kChunks;
    const int p = top + pixel / Pixels::columns, q = left + pixel % Pixels::columns;
    if (p < shape.p && q < shape.q) {
      store<8>(y + (int64_t{p} * shape.q + q) * shape.pixel_y + chunk * 8,
               load<8>(output + Pixels::at_output(pixel, chunk) * 8));
    }
  }
}

template <int kGroup, int kStride, typename T>
const char* start_grouped(const T* x, const void* packed, T* y, const ConvShape& shape, Finish finish, Stream stream) {
  using Pixels = ConvTile<kStride>;
  const int64_t down = parts(shape.p, Pixels::rows), across = parts(shape.q, Pixels::columns);
  const int64_t images = (int64_t{1} << 30) / (down * across);  // gridDim.x, and the kernel's 32 bits
  for (int64_t n = 0; n < shape.n; n += images) {
    const int64_t tiles = (shape.n - n < images ? shape.n - n : images) * down * across;
    const char* error =
        start(grouped_kernel<kGroup, kStride, T>,
              dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(shape.c / kChannels)), kThreads, stream,
              x + n * shape.h * shape.w * shape.pixel_x, static_cast<const uint2*>(packed),
              y + n * shape.p * shape.q * shape.pixel_y, shape, static_cast<int>(down), static_cast<int>(across), finish);
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <int kStride, typename T>
const char* with_group(int per_group, const T* x, const void* packed, T* y, const ConvShape& shape, Finish finish,
                       Stream stream) {
  switch (per_group) {
    case 4:  // two of them, see the packing
    case 8:
      return start_grouped<8, kStride>(x, packed, y, shape, finish, stream);
    case 16:
      return start_grouped<16, kStride>(x, packed, y, shape, finish, stream);
    case 32:
      return start_grouped<32, kStride>(x, packed, y, shape, finish, stream);
    case 64:
      return start_grouped<64, kStride>(x, packed, y, shape, finish, stream);
  }
  return "groups have 4, 8, 16, 32 or 64 channels";
}

}  // namespace

const char* grouped_conv2d(Dtype dtype, int per_group, const void* x, const void* packed, void* y,
                           const ConvShape& shape, Finish finish, Stream stream) {
  if (shape.n == 0) return nullptr;
  const auto typed = [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    return shape.stride_h == 1 ? with_group<1>(per_group, from, packed, to, shape, finish, stream)
                               : with_group<2>(per_group, from, packed, to, shape, finish, stream);
  };
  if (dtype == Dtype::float16) return typed(static_cast<__half*>(nullptr));
  if (dtype == Dtype::bfloat16) return typed(static_cast<__nv_bfloat16*>(nullptr));
  return "x must be float16 or bfloat16";
}

}  // namespace fb::cuda

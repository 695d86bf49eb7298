// The CUDA kernels as host code, in the SIMT emulator, behind functions that ctypes can call. Sizes come as one list.
// Each returns null, or the launcher's words.
#include "cuda/tensor_core.cuh"

namespace {

fb::cuda::ConvShape conv_shape(const int64_t* s) {
  const auto i = [s](int at) { return static_cast<int>(s[at]); };
  return {s[0], i(1), i(2), i(3), i(4), i(5), i(6), i(7), i(8), i(9), i(10), i(11), i(12), i(13), i(14), s[15], s[16]};
}

// Mistakes, to see that the emulator finds them: a barrier that half of the threads reach, a value that is read before
// its copy has been waited for, and a sum that lacks a barrier.
void half_a_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
}

void read_too_early(float* y) {
  alignas(16) static float shared[4];
  const float ones[4] = {1, 1, 1, 1};
  shared[threadIdx.x % 4] = 0;
  fb::cuda::copy16(shared, ones, true);
  y[0] = shared[0];
  fb::cuda::wait_for_copies();
}

void no_barrier(float* y) {
  static float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  y[threadIdx.x] = shared[63 - threadIdx.x];
  shared[threadIdx.x] = -1;
}

}  // namespace

extern "C" {

const char* mistake(int which, float* y) {
  void (*const kernels[])(float*) = {half_a_barrier, read_too_early, no_barrier};
  return fb::cuda::start(kernels[which], 1, which == 1 ? 32 : 64, nullptr, y);
}

void backwards(int yes) { simt::backwards = yes != 0; }

const char* depthwise_conv2d(int dtype, const void* x, const void* weight, void* y, const int64_t* sizes,
                             int pre_activation, const float* scale, const float* bias, int activation) {
  return fb::cuda::depthwise_conv2d(static_cast<fb::cuda::Dtype>(dtype), x, weight, y, conv_shape(sizes),
                                    pre_activation, {scale, bias, activation}, nullptr);
}

const char* grouped_conv2d(int dtype, int per_group, const void* x, const void* packed, void* y, const int64_t* sizes,
                           const float* scale, const float* bias, int activation) {
  return fb::cuda::grouped_conv2d(static_cast<fb::cuda::Dtype>(dtype), per_group, x, packed, y, conv_shape(sizes),
                                  {scale, bias, activation}, nullptr);
}

// sizes: n h w c p q r s stride_h stride_w pad_h pad_w
const char* max_pool2d(int dtype, int nchw, const void* x, void* y, const int64_t* s) {
  const auto i = [s](int at) { return static_cast<int>(s[at]); };
  const fb::cuda::PoolShape<int64_t> shape{s[0], s[1], s[2], s[3], s[4], s[5], i(6), i(7), i(8), i(9), i(10), i(11)};
  return fb::cuda::max_pool2d(static_cast<fb::cuda::Dtype>(dtype), static_cast<fb::cuda::Layout>(nchw), x, y, shape,
                              nullptr);
}

const char* global_avg_pool(int dtype, int nchw, const void* x, void* y, int64_t n, int64_t h, int64_t w, int64_t c) {
  return fb::cuda::global_avg_pool(static_cast<fb::cuda::Dtype>(dtype), static_cast<fb::cuda::Layout>(nchw), x, y, n,
                                   h, w, c, nullptr);
}
}

// The CUDA doors of max_pool2d and global_avg_pool: the schemas are those of csrc/torch/library.cpp. A channels_last
// tensor is read and written where it lies, any other as contiguous [N, C, H, W]. Half precision sums in float32.
#include <vector>

#include "cuda/torch_tensors.h"

namespace {

using fb::cuda::current_stream;
using fb::cuda::Dtype;
using fb::cuda::dtype_of;
using fb::cuda::Ints;
using fb::cuda::Layout;
using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

// torch's Tensor::suggest_memory_format() for four dimensions.
Layout layout_of(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t least = 0;
  if (strides[1] == 0) return Layout::nchw;
  for (const size_t d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return Layout::nchw;
    if (d == 0 && least == strides[1]) return Layout::nchw;
    least = sizes[d] > 1 ? strides[d] * sizes[d] : strides[d];
  }
  return Layout::nhwc;
}

MemoryFormat format_of(Layout layout) {
  return layout == Layout::nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

void check_map(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x has ", x.dim(), " dimensions, expected [N, C, H, W]");
  STD_TORCH_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, op, ": only the batch of x may be empty");
}

int pair_value(const char* name, const Ints& values, size_t axis, int64_t least) {
  STD_TORCH_CHECK(values.size() == 2, "max_pool2d: ", name, " has ", values.size(), " values, expected 2");
  const int64_t value = values[axis];
  STD_TORCH_CHECK(value >= least && value <= INT32_MAX, "max_pool2d: ", name, " is ", value, ", expected ", least,
                  " or more");
  return static_cast<int>(value);
}

Tensor max_pool2d(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode) {
  constexpr const char* kOp = "max_pool2d";
  check_map(kOp, x);
  const Dtype dtype = dtype_of(kOp, x);
  fb::cuda::PoolShape<int64_t> shape{};
  shape.n = x.size(0), shape.c = x.size(1), shape.h = x.size(2), shape.w = x.size(3);
  shape.r = pair_value("kernel_size", kernel_size, 0, 1), shape.s = pair_value("kernel_size", kernel_size, 1, 1);
  shape.stride_h = pair_value("stride", stride, 0, 1), shape.stride_w = pair_value("stride", stride, 1, 1);
  shape.pad_h = pair_value("padding", padding, 0, 0), shape.pad_w = pair_value("padding", padding, 1, 0);
  STD_TORCH_CHECK(shape.pad_h <= shape.r / 2 && shape.pad_w <= shape.s / 2, kOp,
                  ": padding is more than half of kernel_size");
  STD_TORCH_CHECK(shape.h + 2 * shape.pad_h >= shape.r && shape.w + 2 * shape.pad_w >= shape.s, kOp,
                  ": the window is larger than the padded input");
  shape.p = fb::cuda::pooled(shape.h, shape.r, shape.stride_h, shape.pad_h, ceil_mode);
  shape.q = fb::cuda::pooled(shape.w, shape.s, shape.stride_w, shape.pad_w, ceil_mode);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Layout layout = layout_of(x);
  const Tensor from = torch::stable::contiguous(x, format_of(layout));
  const Ints sizes{shape.n, shape.c, shape.p, shape.q};
  const Tensor y = torch::stable::empty({sizes.data(), sizes.size()}, x.scalar_type(), std::nullopt, x.device(),
                                        std::nullopt, format_of(layout));
  const char* error = fb::cuda::max_pool2d(dtype, layout, from.const_data_ptr(), y.mutable_data_ptr(), shape,
                                           current_stream(x));
  STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
  return y;
}

Tensor global_avg_pool(const Tensor& x) {
  constexpr const char* kOp = "global_avg_pool";
  check_map(kOp, x);
  const Dtype dtype = dtype_of(kOp, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Layout layout = layout_of(x);
  const Tensor from = torch::stable::contiguous(x, format_of(layout));
  const Ints sizes{x.size(0), x.size(1)};
  const Tensor y = torch::stable::empty({sizes.data(), sizes.size()}, x.scalar_type(), std::nullopt, x.device());
  const char* error = fb::cuda::global_avg_pool(dtype, layout, from.const_data_ptr(), y.mutable_data_ptr(), x.size(0),
                                                x.size(2), x.size(3), x.size(1), current_stream(x));
  STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CUDA, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("global_avg_pool", TORCH_BOX(&global_avg_pool));
}

// The CUDA doors of depthwise_conv2d_into and grouped_conv2d_into, which kernels/_cuda calls: convolutions between maps
// that lie as NHWC, slices of wider ones or not, into memory that is there. The schemas are CUDA's alone.
#include <optional>
#include <string>

#include "cuda/torch_tensors.h"

namespace {

using fb::cuda::ConvShape;
using fb::cuda::Dtype;
using fb::cuda::Ints;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

std::string words(const Tensor& x) {
  std::string found = "[";
  for (int64_t d = 0; d < x.dim(); ++d) found += (d > 0 ? ", " : "") + std::to_string(x.size(d));
  return found + "]";
}

// Elements from pixel to pixel of a map [N, C, H, W] whose channels lie side by side and whose rows and images follow
// each other without gaps.
int64_t pixel_stride(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " has ", x.dim(), " dimensions, expected [N, C, H, W]");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t step = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : n > 1 ? x.stride(0) : c;
  const bool lies = (c == 1 || x.stride(1) == 1) && (w == 1 || x.stride(3) == step) &&
                    (h == 1 || x.stride(2) == w * step) && (n <= 1 || x.stride(0) == h * w * step) && step >= c;
  STD_TORCH_CHECK(lies, op, ": ", name, " of sizes ", words(x), " does not lie as NHWC");
  return step;
}

int value(const char* op, const char* name, const Ints& values, size_t axis, int64_t least) {
  STD_TORCH_CHECK(values.size() == 2, op, ": ", name, " has ", values.size(), " values, expected 2");
  STD_TORCH_CHECK(values[axis] >= least && values[axis] <= 1 << 16, op, ": ", name, " is ", values[axis],
                  ", expected ", least, " to 65536");
  return static_cast<int>(values[axis]);
}

// Everything that the two kernels ask for alike.
ConvShape shape_of(const char* op, const Tensor& x, const Tensor& weight, const Tensor& y, const Ints& kernel,
                   const Ints& stride, const Ints& padding, const Ints& dilation) {
  ConvShape shape{};
  shape.pixel_x = pixel_stride(op, "x", x), shape.pixel_y = pixel_stride(op, "y", y);
  for (const Tensor* each : {&weight, &y}) {
    STD_TORCH_CHECK(each->scalar_type() == x.scalar_type(), op, ": x, weight and y have different types");
    STD_TORCH_CHECK(each->is_cuda() && each->get_device_index() == x.get_device_index(), op,
                    ": x, weight and y are on different devices");
  }
  STD_TORCH_CHECK(weight.is_contiguous(), op, ": weight is not contiguous");
  for (const int64_t size : {x.size(1), x.size(2), x.size(3), y.size(1), y.size(2), y.size(3)}) {
    STD_TORCH_CHECK(size >= 1 && size <= 1 << 24, op, ": x has sizes ", words(x), ", y ", words(y));
  }
  STD_TORCH_CHECK(x.size(0) == y.size(0), op, ": x has ", x.size(0), " images, y ", y.size(0));
  const auto i = [](int64_t size) { return static_cast<int>(size); };
  shape.n = x.size(0), shape.c = i(x.size(1)), shape.h = i(x.size(2)), shape.w = i(x.size(3));
  shape.k = i(y.size(1)), shape.p = i(y.size(2)), shape.q = i(y.size(3));
  shape.r = value(op, "kernel", kernel, 0, 1), shape.s = value(op, "kernel", kernel, 1, 1);
  shape.stride_h = value(op, "stride", stride, 0, 1), shape.stride_w = value(op, "stride", stride, 1, 1);
  shape.pad_h = value(op, "padding", padding, 0, 0), shape.pad_w = value(op, "padding", padding, 1, 0);
  shape.dilation_h = value(op, "dilation", dilation, 0, 1), shape.dilation_w = value(op, "dilation", dilation, 1, 1);
  return shape;
}

const float* numbers(const char* op, const char* name, const Maybe& vector, const Tensor& y) {
  if (!vector.has_value()) return nullptr;
  STD_TORCH_CHECK(vector->scalar_type() == ScalarType::Float && vector->dim() == 1 && vector->size(0) == y.size(1) &&
                      vector->is_contiguous() && vector->is_cuda() && vector->get_device_index() == y.get_device_index(),
                  op, ": ", name, " has sizes ", words(*vector), ", expected float32 [", y.size(1), "] on y's device");
  return static_cast<const float*>(vector->const_data_ptr());
}

fb::cuda::Finish finish_of(const char* op, const Maybe& scale, const Maybe& bias, const Tensor& y, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, op, ": activation is ", activation, ", expected 0 to 4");
  return {numbers(op, "scale", scale, y), numbers(op, "bias", bias, y), static_cast<int>(activation)};
}

void depthwise_conv2d_into(const Tensor& x, const Tensor& weight, Tensor y, const Maybe& scale, const Maybe& bias,
                           const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                           int64_t pre_activation, int64_t activation) {
  constexpr const char* kOp = "depthwise_conv2d_into";
  const Dtype dtype = fb::cuda::dtype_of(kOp, x);
  const ConvShape shape = shape_of(kOp, x, weight, y, kernel, stride, padding, dilation);
  STD_TORCH_CHECK(shape.k == shape.c, kOp, ": x has ", shape.c, " channels, y ", shape.k);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == int64_t{shape.r} * shape.s && weight.size(1) == shape.c, kOp,
                  ": weight has sizes ", words(weight), ", expected [", shape.r * shape.s, ", ", shape.c, "]");
  STD_TORCH_CHECK(pre_activation >= 0 && pre_activation <= 2, kOp, ": pre_activation is ", pre_activation,
                  ", expected 0 to 2");
  const auto finish = finish_of(kOp, scale, bias, y, activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* error = fb::cuda::depthwise_conv2d(dtype, x.const_data_ptr(), weight.const_data_ptr(),
                                                 y.mutable_data_ptr(), shape, static_cast<int>(pre_activation),
                                                 finish, fb::cuda::current_stream(x));
  STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
}

void grouped_conv2d_into(const Tensor& x, const Tensor& packed, Tensor y, const Maybe& scale, const Maybe& bias,
                         const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                         int64_t per_group, int64_t activation) {
  constexpr const char* kOp = "grouped_conv2d_into";
  const Dtype dtype = fb::cuda::dtype_of(kOp, x);
  const ConvShape shape = shape_of(kOp, x, packed, y, kernel, stride, padding, dilation);
  const bool fits = shape.r == 3 && shape.s == 3 && shape.stride_h == shape.stride_w && shape.stride_h <= 2 &&
                    shape.dilation_h == 1 && shape.dilation_w == 1 && shape.k == shape.c && shape.c % 64 == 0;
  STD_TORCH_CHECK(fits && dtype != Dtype::float32, kOp, ": 3x3 of stride 1 or 2, a multiple of 64 channels, as many "
                  "out as in, in 16 bits; got x of sizes ", words(x), ", y ", words(y));
  STD_TORCH_CHECK(per_group == 4 || per_group == 8 || per_group == 16 || per_group == 32 || per_group == 64, kOp,
                  ": per_group is ", per_group, ", expected 4, 8, 16, 32 or 64");
  const int64_t block = per_group < 8 ? 8 : per_group, steps = (9 * block / 8 + 1) / 2;
  const Ints sizes{shape.c / block, steps, block / 8, 32, 4};
  bool packs = packed.dim() == 5;
  for (int64_t d = 0; packs && d < 5; ++d) packs = packed.size(d) == sizes[d];
  STD_TORCH_CHECK(packs, kOp, ": packed has sizes ", words(packed), ", expected [", sizes[0], ", ", sizes[1], ", ",
                  sizes[2], ", 32, 4]");
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  STD_TORCH_CHECK(aligned(x.const_data_ptr()) && aligned(y.const_data_ptr()) && aligned(packed.const_data_ptr()) &&
                      shape.pixel_x % 8 == 0 && shape.pixel_y % 8 == 0,
                  kOp, ": pixels of x and y do not lie on multiples of 16 bytes");
  const auto finish = finish_of(kOp, scale, bias, y, activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* error = fb::cuda::grouped_conv2d(dtype, static_cast<int>(per_group), x.const_data_ptr(),
                                               packed.const_data_ptr(), y.mutable_data_ptr(), shape, finish,
                                               fb::cuda::current_stream(x));
  STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fast_backbones, m) {
  m.def(
      "depthwise_conv2d_into(Tensor x, Tensor weight, Tensor(a!) y, Tensor? scale, Tensor? bias, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation, int pre_activation, int activation) -> ()");
  m.def(
      "grouped_conv2d_into(Tensor x, Tensor packed, Tensor(a!) y, Tensor? scale, Tensor? bias, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation, int per_group, int activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CUDA, m) {
  m.impl("depthwise_conv2d_into", TORCH_BOX(&depthwise_conv2d_into));
  m.impl("grouped_conv2d_into", TORCH_BOX(&grouped_conv2d_into));
}

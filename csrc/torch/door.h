// Helpers of the operators' doors: where tensors are checked and become pointers.
//
// The stable ABI has no is_contiguous(memory_format), so layouts are read from sizes and strides here. Everything is checked
// before a kernel starts: an exception inside torch's parallel region would lose its text.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "op.h"

namespace fb::door {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// A sentence from its parts, thrown as std::runtime_error, which arrives in Python as RuntimeError.
template <typename... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string sizes_text(const Tensor& t);

// float32, on the CPU, strided, of the given rank; `op` and `name` are for the message.
void check_tensor(const char* op, const char* name, const Tensor& t, int64_t rank);
// The same of a map [N, C, H, W], which may be bfloat16 and float16 as well.
void check_map(const char* op, const char* name, const Tensor& t);
std::array<int64_t, 2> check_pair(const char* op, const char* name, const Ints& values, int64_t least);
// The number OpSpec wants; activations after `last` are refused.
int64_t check_activation(const char* op, const std::string& activation, fb::Activation last = fb::kRelu);

// (size + 2 padding - dilation (window - 1) - 1) / stride + 1, rounded up in ceil mode but with every window starting inside
// the image or its left padding; throws when it is not positive or does not fit in 31 bits.
int64_t output_size(const char* op, const char* axis, int64_t size, int64_t window, int64_t stride, int64_t padding,
                    int64_t dilation, bool ceil_mode);

// Throws when the product, counted in floats, cannot be addressed in bytes by an int64.
void check_addressable(const char* op, std::initializer_list<int64_t> sizes);

// torch's Tensor::suggest_memory_format() == channels_last.
bool suggests_channels_last(const Tensor& t);

// The distance between pixels in floats if a kernel can read t as NHWC where it lies, else 0.
int64_t pixel_stride(const Tensor& t);

// Uninitialised, dense, float32 or one of the types of maps. Large ones lie in map_memory: dropped ones are used again.
Tensor empty(const Ints& sizes, bool channels_last = false);
Tensor empty(const Ints& sizes, bool channels_last, torch::headeronly::ScalarType type);
Tensor empty_bytes(const Ints& sizes);

// A feature map as the kernels see it. `owner` keeps a converted copy alive.
struct Map {
  Tensor owner;
  const float* data;
  int64_t ld;
};
Map as_nhwc(const Tensor& t);
Map as_rows(const Tensor& t);  // of a matrix [N, C]; ld: floats between rows

// Where an op writes: straight into y when y lies in NHWC order, else into a dense NHWC buffer that finish() copies over.
class Output {
 public:
  Output(const Ints& sizes, bool channels_last);
  float* data() const { return data_; }
  Tensor finish() const;

 private:
  Tensor y_, nhwc_;
  float* data_;
  Ints sizes_;
  bool direct_;
};

// Of a convolution of that kind, x [N, C, H, W], weight [K, C/groups, R, S]: everything but the epilogue, checked.
OpSpec convolution_spec(const char* op, const char* kind, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                        const Ints& dilation, int64_t groups);
// What such an op reads becomes act(x * scale + shift): spec.pre and its activation, where scale and shift are given.
void set_affine_input(const char* op, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::string& activation,
                      OpSpec& spec);
OpSpec map_spec(const char* kind, const Tensor& x);  // of an op from a map [N, C, H, W] to one with as many channels
// A pool: the sizes are checked, and torch's rules for padding and ceil mode.
OpSpec pool_spec(const char* op, const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode);
Tensor run_map(OpSpec spec, const Tensor& x);   // an op that reads nothing but x and keeps its sizes
std::array<int64_t, 2> pooled_sizes(const OpSpec& spec, const Tensor& x);  // of a pool's output, checked
Tensor run_pool(OpSpec spec, const Tensor& x);                             // after pool_spec

const float* floats(const Tensor& t);
float* mutable_floats(const Tensor& t);

}  // namespace fb::door

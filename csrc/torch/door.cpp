#include "door.h"

#include "map_memory/map_memory.h"

namespace fb::door {

namespace {

using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

OpSpec map_spec(const char* kind, const Ints& sizes) {
  OpSpec spec;
  spec.kind = kind;
  spec.n = sizes[0];
  spec.c = spec.k = sizes[1];
  spec.h = sizes[2];
  spec.w = sizes[3];
  return spec;
}

}  // namespace

std::string sizes_text(const Tensor& t) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : t.sizes()) {
    text << separator << size;
    separator = ", ";
  }
  text << (t.dim() == 0 ? "[]" : "]");
  return text.str();
}

void check_tensor(const char* op, const char* name, const Tensor& t, int64_t rank) {
  check(t.defined(), op, ": ", name, " is an undefined tensor");
  check(t.is_cpu(), op, ": ", name, " must be on the CPU");
  check(t.layout() == Layout::Strided, op, ": ", name, " must have a strided layout");
  check(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
  check(t.dim() == rank, op, ": ", name, " has sizes ", sizes_text(t), ", expected ", rank, " dimensions");
}

void check_map(const char* op, const char* name, const Tensor& t) {
  check(t.defined(), op, ": ", name, " is an undefined tensor");
  check(t.is_cpu() && t.layout() == Layout::Strided, op, ": ", name, " must be on the CPU, with a strided layout");
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
        " must be float32, bfloat16 or float16");
  check(t.dim() == 4, op, ": ", name, " has sizes ", sizes_text(t), ", expected 4 dimensions");
}

std::array<int64_t, 2> check_pair(const char* op, const char* name, const Ints& values, int64_t least) {
  check(values.size() == 2, op, ": ", name, " has ", values.size(), " values, expected 2");
  for (const int64_t value : values) {
    check(value >= least && value <= INT32_MAX, op, ": ", name, " is ", value, ", expected ", least, " to ", INT32_MAX);
  }
  return {values[0], values[1]};
}

int64_t check_activation(const char* op, const std::string& activation, fb::Activation last) {
  static const char* const names[] = {"none", "relu", "relu6", "sigmoid", "tanh"};
  std::string known;
  for (int64_t i = 0; i <= last; ++i) {
    if (activation == names[i]) return i;
    known += std::string(i == 0 ? "" : i == last ? " or " : ", ") + "\"" + names[i] + "\"";
  }
  check(false, op, ": activation is \"", activation, "\", expected ", known);
  return fb::kNone;
}

int64_t output_size(const char* op, const char* axis, int64_t size, int64_t window, int64_t stride, int64_t padding,
                    int64_t dilation, bool ceil_mode) {
  // Every factor has at most 31 bits, except size, whose tensor exists: nothing below overflows.
  const int64_t padded = size + 2 * padding, extent = dilation * (window - 1) + 1;
  const int64_t room = padded - extent + (ceil_mode ? stride - 1 : 0);
  check(room >= 0, op, ": the window covers ", extent, " in ", axis, ", but the padded input has only ", padded);
  int64_t outputs = room / stride + 1;
  if (ceil_mode && (outputs - 1) * stride >= size + padding) --outputs;
  check(outputs <= INT32_MAX, op, ": the output would have ", outputs, " elements in ", axis, ", at most ", INT32_MAX,
        " are supported");
  return outputs;
}

void check_addressable(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t product = sizeof(float);
  for (const int64_t size : sizes) {
    check(!__builtin_mul_overflow(product, size, &product), op, ": the result would not fit in 64-bit addresses");
  }
}

bool suggests_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t least = 0;
  if (strides[1] == 0) return false;
  for (const size_t d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;  // N111 is both: torch calls it contiguous
    least = sizes[d] > 1 ? strides[d] * sizes[d] : strides[d];
  }
  return true;
}

int64_t pixel_stride(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t n = sizes[0], c = sizes[1], h = sizes[2], w = sizes[3];
  if (c != 1 && strides[1] != 1) return 0;
  const int64_t ld = w > 1 ? strides[3] : h > 1 ? strides[2] : n > 1 ? strides[0] : c;
  const bool dense = (h <= 1 || strides[2] == w * ld) && (n <= 1 || strides[0] == h * w * ld);
  return dense && ld >= c ? ld : 0;
}

namespace {

// Strides as torch::empty has them.
Ints dense_strides(const Ints& sizes, bool channels_last) {
  Ints strides(sizes.size());
  int64_t distance = 1;
  const auto next = [&](size_t d) {
    strides[d] = distance;
    distance *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) {
    for (const size_t d : {1, 3, 2, 0}) next(d);
  } else {
    for (size_t d = sizes.size(); d-- > 0;) next(d);
  }
  return strides;
}

Tensor recycled(const Ints& sizes, bool channels_last, ScalarType type, size_t element) {
  size_t bytes = element;
  for (const int64_t size : sizes) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) bytes = 0;  // torch says what is wrong
  }
  void* data = bytes >= map_memory::kLeastBytes ? map_memory::take(bytes) : nullptr;
  if (data == nullptr) {
    return torch::stable::empty({sizes.data(), sizes.size()}, type, std::nullopt, std::nullopt, std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  const Ints strides = dense_strides(sizes, channels_last);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(data, {sizes.data(), sizes.size()}, {strides.data(), strides.size()}, cpu, type, &map_memory::give);
}

}  // namespace

Tensor empty(const Ints& sizes, bool channels_last) { return recycled(sizes, channels_last, ScalarType::Float, sizeof(float)); }

Tensor empty(const Ints& sizes, bool channels_last, ScalarType type) {
  return recycled(sizes, channels_last, type, type == ScalarType::Float ? sizeof(float) : sizeof(uint16_t));
}

Tensor empty_bytes(const Ints& sizes) { return recycled(sizes, false, ScalarType::Byte, 1); }

namespace {

Tensor empty_map(const Tensor& x, int64_t channels) {
  check_map("empty_map", "x", x);
  check(channels >= 1, "empty_map: channels is ", channels, ", expected at least 1");
  return empty({x.size(0), channels, x.size(2), x.size(3)}, true, x.scalar_type());
}

}  // namespace

Map as_nhwc(const Tensor& t) {
  if (const int64_t ld = pixel_stride(t)) return {t, floats(t), ld};
  const auto sizes = t.sizes();
  if (!t.is_contiguous()) {
    const Tensor copy = torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
    return {copy, floats(copy), sizes[1]};
  }
  const Ints shape(sizes.begin(), sizes.end());
  const Tensor copy = empty(shape, true);
  Pointers pointers;
  pointers.x = floats(t);
  pointers.y = mutable_floats(copy);
  run_op(map_spec("to_nhwc", shape), pointers, 0);
  return {copy, floats(copy), sizes[1]};
}

Map as_rows(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  const bool in_place = (columns == 1 || t.stride(1) == 1) && (rows <= 1 || t.stride(0) >= columns);
  const Tensor plain = in_place ? t : torch::stable::contiguous(t);
  return {plain, floats(plain), rows <= 1 ? columns : plain.stride(0)};
}

Output::Output(const Ints& sizes, bool channels_last) : y_(empty(sizes, channels_last)), nhwc_(y_), sizes_(sizes) {
  direct_ = sizes[0] == 0 || pixel_stride(y_) == sizes[1];
  if (!direct_) nhwc_ = empty(sizes, true);
  data_ = mutable_floats(nhwc_);
}

Tensor Output::finish() const {
  if (!direct_) {
    Pointers pointers;
    pointers.x = data_;
    pointers.y = mutable_floats(y_);
    run_op(map_spec("to_nchw", sizes_), pointers, 0);
  }
  return y_;
}

void set_affine_input(const char* op, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::string& activation,
                      OpSpec& spec) {
  const int64_t number = check_activation(op, activation, kRelu6);
  check(scale.has_value() == shift.has_value() && (scale || number == kNone), op,
        ": scale and shift go together, and an activation of the input with them");
  if (!scale) return;
  for (const Tensor* t : {&*scale, &*shift}) {
    const char* const name = t == &*scale ? "scale" : "shift";
    check_tensor(op, name, *t, 1);
    check(t->size(0) == spec.c && t->is_contiguous(), op, ": ", name, " has sizes ", sizes_text(*t), ", expected [", spec.c, "] in one piece");
  }
  spec.pre = 1;
  spec.pre_activation = number;
}

OpSpec convolution_spec(const char* op, const char* kind, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                        const Ints& dilation, int64_t groups) {
  check_tensor(op, "x", x, 4);
  check_tensor(op, "weight", weight, 4);
  const auto strides = check_pair(op, "stride", stride, 1);
  const auto pads = check_pair(op, "padding", padding, 0);
  const auto dilations = check_pair(op, "dilation", dilation, 1);
  OpSpec spec;
  spec.kind = kind;
  spec.n = x.size(0);
  spec.c = x.size(1);
  spec.h = x.size(2);
  spec.w = x.size(3);
  spec.k = weight.size(0);
  spec.r = weight.size(2);
  spec.s = weight.size(3);
  spec.stride_h = strides[0];
  spec.stride_w = strides[1];
  spec.pad_h = pads[0];
  spec.pad_w = pads[1];
  spec.dilation_h = dilations[0];
  spec.dilation_w = dilations[1];
  spec.groups = groups;
  check(groups >= 1, op, ": groups is ", groups, ", expected at least 1");
  check(spec.c >= 1 && spec.h >= 1 && spec.w >= 1, op, ": x has sizes ", sizes_text(x), ", only the batch may be empty");
  check(spec.k >= 1 && spec.r >= 1 && spec.s >= 1, op, ": weight has sizes ", sizes_text(weight), ", none may be 0");
  check(spec.c == weight.size(1) * groups && spec.k % groups == 0, op, ": weight ", sizes_text(weight), " with ", groups,
        " groups does not fit x ", sizes_text(x));
  check(spec.r <= INT32_MAX && spec.s <= INT32_MAX, op, ": weight ", sizes_text(weight), " is too large");
  output_size(op, "height", spec.h, spec.r, spec.stride_h, spec.pad_h, spec.dilation_h, false);
  output_size(op, "width", spec.w, spec.s, spec.stride_w, spec.pad_w, spec.dilation_w, false);
  return spec;
}

OpSpec map_spec(const char* kind, const Tensor& x) {
  const auto sizes = x.sizes();
  return map_spec(kind, Ints(sizes.begin(), sizes.end()));
}

OpSpec pool_spec(const char* op, const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode) {
  check_tensor(op, "x", x, 4);
  const auto windows = check_pair(op, "kernel_size", kernel_size, 1);
  const auto strides = check_pair(op, "stride", stride, 1);
  const auto pads = check_pair(op, "padding", padding, 0);
  OpSpec spec = map_spec(op, x);
  spec.r = windows[0];
  spec.s = windows[1];
  spec.stride_h = strides[0];
  spec.stride_w = strides[1];
  spec.pad_h = pads[0];
  spec.pad_w = pads[1];
  spec.ceil_mode = ceil_mode;
  check(2 * pads[0] <= windows[0] && 2 * pads[1] <= windows[1], op, ": padding (", pads[0], ", ", pads[1],
        ") is more than half of kernel_size (", windows[0], ", ", windows[1], ")");
  return spec;
}

namespace {

Tensor run(OpSpec spec, const Tensor& x, int64_t p, int64_t q) {
  if (const std::string reason = refusal(spec); !reason.empty()) check(false, spec.kind, ": ", reason);
  const Output output({spec.n, spec.k, p, q}, suggests_channels_last(x));
  if (spec.n > 0) {
    const Map image = as_nhwc(x);
    spec.ldx = image.ld;
    Pointers pointers;
    pointers.x = image.data;
    pointers.y = output.data();
    run_op(spec, pointers, 0);
  }
  return output.finish();
}

void check_image(const OpSpec& spec, const Tensor& x) {
  check(spec.c >= 1 && spec.h >= 1 && spec.w >= 1, spec.kind, ": x has sizes ", sizes_text(x),
        ", only the batch may be empty");
}

}  // namespace

Tensor run_map(OpSpec spec, const Tensor& x) {
  check_image(spec, x);
  return run(spec, x, spec.h, spec.w);
}

std::array<int64_t, 2> pooled_sizes(const OpSpec& spec, const Tensor& x) {
  check_image(spec, x);
  const char* op = spec.kind.c_str();
  const bool ceil_mode = spec.ceil_mode != 0;
  const int64_t p = output_size(op, "height", spec.h, spec.r, spec.stride_h, spec.pad_h, 1, ceil_mode);
  const int64_t q = output_size(op, "width", spec.w, spec.s, spec.stride_w, spec.pad_w, 1, ceil_mode);
  check_addressable(op, {spec.n, spec.k, p, q});
  return {p, q};
}

Tensor run_pool(OpSpec spec, const Tensor& x) {
  const auto [p, q] = pooled_sizes(spec, x);
  return run(spec, x, p, q);
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace fb::door

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("empty_map", TORCH_BOX(&fb::door::empty_map)); }

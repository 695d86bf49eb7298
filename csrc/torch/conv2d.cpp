// The doors of the convolutions: y = act(conv(x, weight) + bias + residual), x [N, C, H, W], weight [K, C/groups, R, S].
//
// The output is channels_last when x or weight is, as in torch. The weight is packed on every call: a cache could go stale.
#include "cpu/layout/spread_pixels.h"
#include "cpu/layout/turned_filters.h"
#include "rows.h"

namespace {

using fb::door::check;
using fb::door::Ints;
using fb::door::Tensor;

constexpr int64_t kPlanarChannels = 4;  // planar inputs with up to this many channels are read as they lie

// act(x * scale + shift), which is convolved in the place of x.
struct AffineInput {
  std::optional<Tensor> scale, shift;
  std::string activation = "none";
};

Tensor convolution(const char* kind, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const Ints& stride, const Ints& padding, const Ints& dilation,
                   int64_t groups, const std::string& activation, const AffineInput& before = {}) {
  using namespace fb::door;
  fb::OpSpec spec = convolution_spec(kind, kind, x, weight, stride, padding, dilation, groups);
  spec.activation = check_activation(kind, activation, spec.kind == "depthwise_conv2d" ? fb::kRelu6 : fb::kRelu);
  const int64_t p = spec.p(), q = spec.q();
  check_addressable(kind, {spec.n, spec.k, p, q});
  check_addressable(kind, {spec.c, spec.h + 2 * spec.pad_h, spec.w + 2 * spec.pad_w});
  if (bias) {
    check_tensor(kind, "bias", *bias, 1);
    check(bias->size(0) == spec.k, kind, ": bias has sizes ", sizes_text(*bias), ", expected [", spec.k, "]");
  }
  const Ints y_sizes{spec.n, spec.k, p, q};
  if (residual) {
    check_tensor(kind, "residual", *residual, 4);
    const auto sizes = residual->sizes();
    check(Ints(sizes.begin(), sizes.end()) == y_sizes, kind, ": residual has sizes ", sizes_text(*residual),
          ", expected [", spec.n, ", ", spec.k, ", ", p, ", ", q, "]");
  }

  set_affine_input(kind, before.scale, before.shift, before.activation, spec);

  const bool channels_last = suggests_channels_last(x) || suggests_channels_last(weight);
  spec.nchw_in = spec.kind == "conv2d" && spec.c <= kPlanarChannels && pixel_stride(x) == 0 && x.is_contiguous();
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kind, ": ", reason);
  const Output output(y_sizes, channels_last);
  if (spec.n > 0) {
    const Map image = spec.nchw_in ? Map{x, floats(x), 0} : as_nhwc(x);
    const Tensor plain_weight = torch::stable::contiguous(weight);
    const Tensor packed = empty({fb::packed_floats(spec)});
    fb::pack_weight(spec, floats(plain_weight), mutable_floats(packed));
    fb::Pointers pointers;
    std::optional<Map> added;  // these keep converted copies alive
    std::optional<Tensor> plain_bias;
    spec.ldx = image.ld;
    pointers.x = image.data;
    pointers.weight = floats(packed);
    if (spec.pre != 0) {
      pointers.pre_scale = floats(*before.scale);
      pointers.pre_shift = floats(*before.shift);
    }
    if (bias) {
      plain_bias = torch::stable::contiguous(*bias);
      pointers.bias = floats(*plain_bias);
    }
    if (residual) {
      added = as_nhwc(*residual);
      spec.ldr = added->ld;
      pointers.residual = added->data;
    }
    pointers.y = output.data();
    fb::run_op(spec, pointers, 0);
  }
  return output.finish();
}

// One operator each: TORCH_BOX wants a function, not a function with its first argument bound.
#define FB_CONVOLUTION(kind)                                                                                        \
  Tensor kind(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,                             \
              const std::optional<Tensor>& residual, const Ints& stride, const Ints& padding, const Ints& dilation, \
              int64_t groups, const std::string& activation) {                                                      \
    return convolution(#kind, x, weight, bias, residual, stride, padding, dilation, groups, activation);            \
  }
FB_CONVOLUTION(conv2d)
FB_CONVOLUTION(winograd_conv2d)
FB_CONVOLUTION(grouped_conv2d)
#undef FB_CONVOLUTION

Tensor affine_conv2d(const std::string& kind, const Tensor& x, const Tensor& scale, const Tensor& shift, const std::string& pre_activation,
                     const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int64_t groups) {
  constexpr const char* kKinds[] = {"conv2d", "winograd_conv2d", "grouped_conv2d", "depthwise_conv2d"};
  const AffineInput before{scale, shift, pre_activation};
  for (const char* known : kKinds) {
    if (kind == known) return convolution(known, x, weight, bias, std::nullopt, stride, padding, dilation, groups, "none", before);
  }
  check(false, "affine_conv2d: kind is '", kind, "', expected that of a convolution");
  return x;
}

// One filter per channel: weight [C, 1, R, S].
Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                        const Ints& padding, const Ints& dilation, const std::string& activation) {
  fb::door::check_tensor("depthwise_conv2d", "x", x, 4);
  const int64_t channels = x.size(1) > 0 ? x.size(1) : 1;  // none is refused in words later
  return convolution("depthwise_conv2d", x, weight, bias, std::nullopt, stride, padding, dilation, channels, activation);
}

Tensor transposed_filters(const Tensor& weight, int64_t groups) {
  using namespace fb::door;
  constexpr const char* kOp = "transposed_filters";
  check_tensor(kOp, "weight", weight, 4);
  const int64_t filters = weight.size(0), depth = weight.size(1), taps = weight.size(2) * weight.size(3);
  check(groups >= 1 && filters % groups == 0, kOp, ": ", filters, " filters in ", groups, " groups");
  const int64_t of_group = filters / groups;
  const Tensor plain = torch::stable::contiguous(weight), out = empty({depth * groups, of_group, weight.size(2), weight.size(3)});
  fb::turn_filters(floats(plain), groups, of_group, depth, taps, mutable_floats(out));
  return out;
}

Tensor spread_pixels(const Tensor& small, int64_t height, int64_t width, const Ints& stride, const std::optional<Tensor>& added) {
  using namespace fb::door;
  constexpr const char* kOp = "spread_pixels";
  check_tensor(kOp, "small", small, 4);
  const auto steps = check_pair(kOp, "stride", stride, 1);
  const auto sizes = small.sizes();
  check(height >= 1 && width >= 1, kOp, ": height is ", height, ", width ", width, ", expected at least 1");
  check_addressable(kOp, {sizes[0], sizes[1], height, width});
  const Ints out_sizes{sizes[0], sizes[1], height, width};
  const Map read = as_nhwc(small);
  std::optional<Map> more;
  if (added) {
    check_tensor(kOp, "added", *added, 4);
    check(Ints(added->sizes().begin(), added->sizes().end()) == out_sizes, kOp, ": added has sizes ", sizes_text(*added), ", expected [",
          sizes[0], ", ", sizes[1], ", ", height, ", ", width, "]");
    more = as_nhwc(*added);
  }
  const Output out(out_sizes, true);
  fb::Spread t{{read.data, read.ld}, sizes[0], sizes[2], sizes[3], sizes[1], {nullptr, 0}, height, width, steps[0], steps[1], out.data()};
  if (more) t.added = {more->data, more->ld};
  fb::spread_pixels(t);
  return out.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("affine_conv2d", TORCH_BOX(&affine_conv2d));
  m.impl("spread_pixels", TORCH_BOX(&spread_pixels));
  m.impl("transposed_filters", TORCH_BOX(&transposed_filters));
  m.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d));
  m.impl("grouped_conv2d", TORCH_BOX(&grouped_conv2d));
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
}

// The door of separable_conv2d: y = act( conv1x1( depth_act( depthwise(x) + depth_bias ) ) + bias ), x [N, C, H, W],
// depth_weight [C, 1, R, S], weight [K, C, 1, 1]. The output is channels_last when x or a weight is.
#include "door.h"

namespace {

using namespace fb::door;

constexpr const char* kOp = "separable_conv2d";

std::optional<Tensor> checked_bias(const char* name, const std::optional<Tensor>& bias, int64_t channels) {
  if (!bias) return std::nullopt;
  check_tensor(kOp, name, *bias, 1);
  check(bias->size(0) == channels, kOp, ": ", name, " has sizes ", sizes_text(*bias), ", expected [", channels, "]");
  return torch::stable::contiguous(*bias);
}

Tensor packed(const fb::OpSpec& spec, const Tensor& weight) {
  const Tensor plain = torch::stable::contiguous(weight);
  const Tensor out = empty({fb::packed_floats(spec)});
  fb::pack_weight(spec, floats(plain), mutable_floats(out));
  return out;
}

Tensor separable_conv2d(const Tensor& x, const Tensor& depth_weight, const Tensor& weight, const std::optional<Tensor>& depth_bias,
                        const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding, const Ints& dilation,
                        const std::string& depth_activation, const std::string& activation) {
  check_tensor(kOp, "x", x, 4);
  check_tensor(kOp, "depth_weight", depth_weight, 4);
  check_tensor(kOp, "weight", weight, 4);
  const auto strides = check_pair(kOp, "stride", stride, 1);
  const auto pads = check_pair(kOp, "padding", padding, 0);
  const auto dilations = check_pair(kOp, "dilation", dilation, 1);
  fb::OpSpec spec;
  spec.kind = kOp;
  spec.n = x.size(0);
  spec.c = x.size(1);
  spec.h = x.size(2);
  spec.w = x.size(3);
  spec.k = weight.size(0);
  spec.r = depth_weight.size(2);
  spec.s = depth_weight.size(3);
  spec.stride_h = strides[0];
  spec.stride_w = strides[1];
  spec.pad_h = pads[0];
  spec.pad_w = pads[1];
  spec.dilation_h = dilations[0];
  spec.dilation_w = dilations[1];
  spec.depth_activation = check_activation(kOp, depth_activation, fb::kRelu6);
  spec.activation = check_activation(kOp, activation, fb::kRelu6);
  check(spec.c >= 1 && spec.h >= 1 && spec.w >= 1, kOp, ": x has sizes ", sizes_text(x), ", only the batch may be empty");
  check(depth_weight.size(0) == spec.c && depth_weight.size(1) == 1 && spec.r >= 1 && spec.s >= 1, kOp, ": depth_weight ",
        sizes_text(depth_weight), " does not fit x ", sizes_text(x));
  check(spec.k >= 1 && weight.size(1) == spec.c && weight.size(2) == 1 && weight.size(3) == 1, kOp, ": weight ", sizes_text(weight),
        " does not fit x ", sizes_text(x));
  const int64_t p = output_size(kOp, "height", spec.h, spec.r, spec.stride_h, spec.pad_h, spec.dilation_h, false);
  const int64_t q = output_size(kOp, "width", spec.w, spec.s, spec.stride_w, spec.pad_w, spec.dilation_w, false);
  check_addressable(kOp, {spec.n, std::max(spec.k, spec.c), p, q});
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  const std::optional<Tensor> plain_depth_bias = checked_bias("depth_bias", depth_bias, spec.c);
  const std::optional<Tensor> plain_bias = checked_bias("bias", bias, spec.k);

  // As after two convolutions of torch: a map of one channel and one pixel in between is both, which torch calls contiguous.
  const bool between = (suggests_channels_last(x) || suggests_channels_last(depth_weight)) && spec.c * p * q > 1;
  const Output output({spec.n, spec.k, p, q}, between || suggests_channels_last(weight));
  if (spec.n > 0) {
    fb::OpSpec depth = spec;
    depth.kind = "depthwise_conv2d";
    depth.k = depth.groups = spec.c;
    depth.activation = spec.depth_activation;
    depth.depth_activation = fb::kNone;
    const Tensor packed_depth_weight = packed(depth, depth_weight), packed_weight = packed(spec, weight);
    const Map image = as_nhwc(x);
    spec.ldx = image.ld;
    fb::Pointers pointers;
    pointers.x = image.data;
    pointers.depth_weight = floats(packed_depth_weight);
    pointers.weight = floats(packed_weight);
    if (plain_depth_bias) pointers.depth_bias = floats(*plain_depth_bias);
    if (plain_bias) pointers.bias = floats(*plain_bias);
    pointers.y = output.data();
    fb::run_op(spec, pointers, 0);
  }
  return output.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("separable_conv2d", TORCH_BOX(&separable_conv2d)); }

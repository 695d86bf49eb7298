// The doors of the convolutions' gradients, dx and dw of y = conv(x, weight). An output that is not asked for is empty.
#include <algorithm>
#include <tuple>

#include "cpu/conv2d_backward/conv2d_backward.h"
#include "cpu/depthwise_conv2d_backward/depthwise_conv2d_backward.h"
#include "cpu/grouped_conv2d_backward/grouped_conv2d_backward.h"
#include "cpu/layout/turned_filters.h"
#include "door.h"
#include "ops.h"
#include "rows.h"

namespace {

using namespace fb::door;
using Pair = std::tuple<Tensor, Tensor>;

// The forward's spec, after all checks.
fb::OpSpec forward_spec(const char* op, const char* kind, const Tensor& grad, const Tensor& x, const Tensor& weight,
                        const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  fb::OpSpec spec = convolution_spec(op, kind, x, weight, stride, padding, dilation, groups);
  check_tensor(op, "grad", grad, 4);
  const int64_t p = spec.p(), q = spec.q();
  check(grad.size(0) == spec.n && grad.size(1) == spec.k && grad.size(2) == p && grad.size(3) == q, op, ": grad has sizes ",
        sizes_text(grad), ", expected [", spec.n, ", ", spec.k, ", ", p, ", ", q, "]");
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, op, ": ", reason);
  return spec;
}

// dx of stride 1: the forward's kind of convolution, grouped, of dy, back to the sizes of x; `weight` is as that one wants it.
void convolve_back(const fb::OpSpec& spec, const float* grad, int64_t ldg, const float* weight, float* dx) {
  fb::OpSpec back = spec;
  back.c = spec.k;
  back.k = spec.c;
  back.h = spec.p();
  back.w = spec.q();
  back.pad_h = (spec.r - 1) * spec.dilation_h - spec.pad_h;
  back.pad_w = (spec.s - 1) * spec.dilation_w - spec.pad_w;
  Tensor padded;
  if (std::max(back.pad_h, back.pad_w) > 1) {  // grouped rows pad by 1 at most
    fb::OpSpec pad = back;
    pad.kind = "pad2d";
    pad.k = pad.c;
    pad.groups = pad.r = pad.s = 1;
    pad.ldx = ldg;
    pad.pad_h = std::max<int64_t>(0, back.pad_h - 1);
    pad.pad_w = std::max<int64_t>(0, back.pad_w - 1);
    back.h = pad.padded_h();
    back.w = pad.padded_w();
    back.pad_h -= pad.pad_h;
    back.pad_w -= pad.pad_w;
    padded = empty({back.n, back.c, back.h, back.w}, true);
    fb::Pointers pointers;
    pointers.x = grad;
    pointers.y = mutable_floats(padded);
    fb::run_op(pad, pointers, 0);
    grad = floats(padded);
    ldg = back.c;
  }
  back.ldx = ldg;
  const Tensor packed = empty({fb::packed_floats(back)});
  fb::pack_weight(back, weight, mutable_floats(packed));
  fb::Pointers pointers;
  pointers.x = grad;
  pointers.weight = floats(packed);
  pointers.y = dx;
  fb::run_op(back, pointers, 0);
}

// w[c, k, r, s] = weight[k, c, R - 1 - r, S - 1 - s] within each group.
Tensor turned(const fb::OpSpec& spec, const float* weight) {
  const int64_t group = spec.c / spec.groups, filters = spec.k / spec.groups, taps = spec.r * spec.s;
  const Tensor t = empty({spec.c * filters * taps});
  fb::turn_filters(weight, spec.groups, filters, group, taps, mutable_floats(t));
  return t;
}

// Both gradients, by the kernels of a namespace.
template <typename InputGradient, typename WeightGradient>
Pair gradients(fb::OpSpec spec, const Tensor& grad, const Tensor& x, const Tensor& weight, bool needs_x, bool needs_weight,
               const InputGradient& input_gradient, const WeightGradient& weight_gradient) {
  const auto x_sizes = x.sizes(), weight_sizes = weight.sizes();
  std::optional<Output> dx;
  Tensor dw = empty({0});
  if (needs_x) dx.emplace(Ints(x_sizes.begin(), x_sizes.end()), suggests_channels_last(x) || suggests_channels_last(weight));
  if (needs_weight) dw = empty(Ints(weight_sizes.begin(), weight_sizes.end()), suggests_channels_last(weight));
  if (spec.n == 0) {
    if (needs_weight) std::fill_n(mutable_floats(dw), dw.numel(), 0.0f);
  } else {
    const Map dy = as_nhwc(grad);
    if (needs_x) input_gradient(spec, dy.data, dy.ld, floats(torch::stable::contiguous(weight)), dx->data());
    if (needs_weight) {
      const Map image = as_nhwc(x);
      spec.ldx = image.ld;
      const auto strides = dw.strides();
      weight_gradient(spec, dy.data, dy.ld, image.data, mutable_floats(dw), Ints(strides.begin(), strides.end()));
    }
  }
  return {dx ? dx->finish() : empty({0}), dw};
}

Pair depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                               const Ints& dilation, bool needs_x, bool needs_weight) {
  namespace kernels = fb::depthwise_conv2d_backward;
  constexpr const char* kOp = "depthwise_conv2d_backward";
  check_tensor(kOp, "x", x, 4);
  const int64_t groups = std::max<int64_t>(1, x.size(1));
  const fb::OpSpec spec = forward_spec(kOp, "depthwise_conv2d", grad, x, weight, stride, padding, dilation, groups);
  const auto input = [](const fb::OpSpec& spec, const float* dy, int64_t ldg, const float* weight, float* dx) {
    const Tensor packed = empty({fb::packed_floats(spec)});
    fb::pack_weight(spec, weight, mutable_floats(packed));
    kernels::input_gradient(spec, dy, ldg, floats(packed), dx);
  };
  const auto weights = [](const fb::OpSpec& spec, const float* dy, int64_t ldg, const float* image, float* dw,
                          const Ints& steps) {
    const int64_t own[] = {steps[0], steps[2], steps[3]};
    kernels::weight_gradient(spec, dy, ldg, image, dw, own);
  };
  return gradients(spec, grad, x, weight, needs_x, needs_weight, input, weights);
}

Pair grouped_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                             const Ints& dilation, int64_t groups, bool needs_x, bool needs_weight, const std::optional<Tensor>& scale,
                             const std::optional<Tensor>& shift, const std::string& activation) {
  namespace kernels = fb::grouped_conv2d_backward;
  constexpr const char* kOp = "grouped_conv2d_backward";
  const fb::OpSpec spec = forward_spec(kOp, "grouped_conv2d", grad, x, weight, stride, padding, dilation, groups);
  if (needs_x) {
    if (const std::string reason = kernels::input_refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  }
  const auto input = [](const fb::OpSpec& spec, const float* dy, int64_t ldg, const float* weight, float* dx) {
    if (spec.stride_h == 1) return convolve_back(spec, dy, ldg, floats(turned(spec, weight)), dx);
    kernels::input_gradient(spec, dy, ldg, weight, dx);
  };
  const auto weights = [&](fb::OpSpec spec, const float* dy, int64_t ldg, const float* image, float* dw, const Ints& steps) {
    set_affine_input(kOp, scale, shift, activation, spec);
    fb::Pointers read;
    read.x = image;
    if (spec.pre != 0) {
      read.pre_scale = floats(*scale);
      read.pre_shift = floats(*shift);
    }
    kernels::weight_gradient(spec, dy, ldg, read, dw, steps.data());
  };
  return gradients(spec, grad, x, weight, needs_x, needs_weight, input, weights);
}

Tensor conv2d_backward_weight(const Tensor& grad, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                              const Ints& dilation, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                              const std::optional<Tensor>& bias, const std::string& activation) {
  constexpr const char* kOp = "conv2d_backward_weight";
  fb::OpSpec spec = forward_spec(kOp, "conv2d", grad, x, weight, stride, padding, dilation, 1);
  const Floats means = per_channel(kOp, "mean", mean, spec.c, 0.0f), scales = per_channel(kOp, "scale", scale, spec.c, 1.0f),
               biases = per_channel(kOp, "bias", bias, spec.c, 0.0f);
  fb::conv2d_backward::Norm norm{nullptr, nullptr, nullptr, check_activation(kOp, activation, fb::kRelu6)};
  check((scale && bias) || (!mean && !scale && !bias && norm.activation == fb::kNone), kOp,
        ": mean, scale and bias go together (mean may be absent), and an activation with them");
  if (scale) norm = {mean ? means.data() : nullptr, scales.data(), biases.data(), norm.activation};
  const auto sizes = weight.sizes();
  const Tensor dw = empty(Ints(sizes.begin(), sizes.end()), suggests_channels_last(weight));
  if (spec.n == 0) {
    std::fill_n(mutable_floats(dw), dw.numel(), 0.0f);
    return dw;
  }
  const Map dy = as_nhwc(grad), image = as_nhwc(x);
  const auto strides = dw.strides();
  const Ints steps(strides.begin(), strides.end());
  fb::conv2d_backward::weight_gradient(spec, {dy.data, dy.ld}, {image.data, image.ld}, norm, mutable_floats(dw), steps.data());
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) {
  m.impl("conv2d_backward_weight", TORCH_BOX(&conv2d_backward_weight));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
  m.impl("grouped_conv2d_backward", TORCH_BOX(&grouped_conv2d_backward));
}

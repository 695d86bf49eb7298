// The doors of max_pool2d and its gradient: y[n, c, p, q] = max over the window; padding counts as minus infinity, NaN wins.
#include <tuple>

#include "cpu/pooling/pooling.h"
#include "door.h"

namespace {

using namespace fb::door;

Tensor max_pool2d(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode) {
  return run_pool(pool_spec("max_pool2d", x, kernel_size, stride, padding, ceil_mode), x);
}

std::tuple<Tensor, Tensor> max_pool2d_taps(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding,
                                           bool ceil_mode) {
  constexpr const char* kOp = "max_pool2d";
  fb::OpSpec spec = pool_spec(kOp, x, kernel_size, stride, padding, ceil_mode);
  const auto [p, q] = pooled_sizes(spec, x);
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  const Output y({spec.n, spec.c, p, q}, suggests_channels_last(x));
  const Tensor taps = empty_bytes({spec.n, p, q, spec.c});
  if (spec.n > 0) {
    const Map image = as_nhwc(x);
    spec.ldx = image.ld;
    spec.ldy = spec.c;
    fb::Pointers pointers;
    pointers.x = image.data;
    pointers.y = y.data();
    fb::pooling::max_with_taps(spec, pointers, static_cast<uint8_t*>(taps.mutable_data_ptr()));
  }
  return {y.finish(), taps};
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& taps, int64_t height, int64_t width, const Ints& kernel_size,
                           const Ints& stride, const Ints& padding) {
  constexpr const char* kOp = "max_pool2d_backward";
  check_tensor(kOp, "grad", grad, 4);
  const auto windows = check_pair(kOp, "kernel_size", kernel_size, 1), strides = check_pair(kOp, "stride", stride, 1),
             pads = check_pair(kOp, "padding", padding, 0);
  const auto sizes = grad.sizes();
  const Ints tap_sizes{sizes[0], sizes[2], sizes[3], sizes[1]};
  check(taps.is_cpu() && taps.scalar_type() == torch::headeronly::ScalarType::Byte && taps.is_contiguous() &&
            Ints(taps.sizes().begin(), taps.sizes().end()) == tap_sizes,
        kOp, ": taps has sizes ", sizes_text(taps), ", expected bytes [N, P, Q, C] of grad ", sizes_text(grad), " in one piece");
  fb::OpSpec spec;
  spec.kind = "max_pool2d";
  spec.n = sizes[0];
  spec.c = spec.k = sizes[1];
  spec.h = height;
  spec.w = width;
  spec.r = windows[0];
  spec.s = windows[1];
  spec.stride_h = strides[0];
  spec.stride_w = strides[1];
  spec.pad_h = pads[0];
  spec.pad_w = pads[1];
  if (spec.p() != sizes[2] || spec.q() != sizes[3]) spec.ceil_mode = 1;
  check(height >= 1 && width >= 1 && spec.p() == sizes[2] && spec.q() == sizes[3], kOp, ": grad has sizes ", sizes_text(grad),
        ", not those of an output for ", height, "x", width);
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  check_addressable(kOp, {spec.n, spec.c, height, width});
  const Output dx({spec.n, spec.c, height, width}, suggests_channels_last(grad));
  if (spec.n > 0) {
    const Map dy = as_nhwc(grad);
    fb::pooling::max_gradient(spec, dy.data, dy.ld, static_cast<const uint8_t*>(taps.const_data_ptr()), dx.data());
  }
  return dx.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_taps", TORCH_BOX(&max_pool2d_taps));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
}

// The door of max_pool2d: y[n, c, p, q] = max over the window; padding counts as minus infinity, NaN wins.
#include "door.h"

namespace {

using namespace fb::door;

Tensor max_pool2d(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode) {
  constexpr const char* kOp = "max_pool2d";
  check_tensor(kOp, "x", x, 4);
  const auto windows = check_pair(kOp, "kernel_size", kernel_size, 1);
  const auto strides = check_pair(kOp, "stride", stride, 1);
  const auto pads = check_pair(kOp, "padding", padding, 0);
  const auto sizes = x.sizes();
  fb::OpSpec spec;
  spec.kind = kOp;
  spec.n = sizes[0];
  spec.c = spec.k = sizes[1];
  spec.h = sizes[2];
  spec.w = sizes[3];
  spec.r = windows[0];
  spec.s = windows[1];
  spec.stride_h = strides[0];
  spec.stride_w = strides[1];
  spec.pad_h = pads[0];
  spec.pad_w = pads[1];
  spec.ceil_mode = ceil_mode;
  check(spec.c >= 1 && spec.h >= 1 && spec.w >= 1, kOp, ": x has sizes ", sizes_text(x),
        ", only the batch may be empty");
  check(2 * pads[0] <= windows[0] && 2 * pads[1] <= windows[1], kOp, ": padding (", pads[0], ", ", pads[1],
        ") is more than half of kernel_size (", windows[0], ", ", windows[1], ")");
  const int64_t p = output_size(kOp, "height", spec.h, spec.r, spec.stride_h, spec.pad_h, 1, ceil_mode);
  const int64_t q = output_size(kOp, "width", spec.w, spec.s, spec.stride_w, spec.pad_w, 1, ceil_mode);
  check_addressable(kOp, {spec.n, spec.k, p, q});
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  const Output output({spec.n, spec.k, p, q}, suggests_channels_last(x));
  if (spec.n > 0) {
    const Map image = as_nhwc(x);
    spec.ldx = image.ld;
    fb::Pointers pointers;
    pointers.x = image.data;
    pointers.y = output.data();
    fb::run_op(spec, pointers, 0);
  }
  return output.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }

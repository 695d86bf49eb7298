// The door of global_avg_pool: y[n, c] = sum_hw x[n, c, h, w] / (H W).
#include "door.h"

namespace {

using namespace fb::door;

Tensor global_avg_pool(const Tensor& x) {
  constexpr const char* kOp = "global_avg_pool";
  check_tensor(kOp, "x", x, 4);
  const auto sizes = x.sizes();
  fb::OpSpec spec;
  spec.kind = kOp;
  spec.n = sizes[0];
  spec.c = spec.k = sizes[1];
  spec.h = sizes[2];
  spec.w = sizes[3];
  check(spec.c >= 1 && spec.h >= 1 && spec.w >= 1, kOp, ": x has sizes ", sizes_text(x),
        ", only the batch may be empty");
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  const Tensor y = empty({spec.n, spec.c});
  if (spec.n > 0) {
    const Map image = as_nhwc(x);
    spec.ldx = image.ld;
    fb::Pointers pointers;
    pointers.x = image.data;
    pointers.y = mutable_floats(y);
    fb::run_op(spec, pointers, 0);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("global_avg_pool", TORCH_BOX(&global_avg_pool)); }

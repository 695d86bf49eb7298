// The door of squared_distances: y[n, k] = sum_c (x[n, c] - centers[k, c])^2.
#include "door.h"

namespace {

using namespace fb::door;

Tensor squared_distances(const Tensor& x, const Tensor& centers) {
  constexpr const char* kOp = "squared_distances";
  check_tensor(kOp, "x", x, 2);
  check_tensor(kOp, "centers", centers, 2);
  fb::OpSpec spec;
  spec.kind = kOp;
  spec.n = x.size(0);
  spec.c = x.size(1);
  spec.k = centers.size(0);
  check(spec.c >= 1 && spec.k >= 1 && centers.size(1) == spec.c, kOp, ": centers ", sizes_text(centers), " do not fit x ",
        sizes_text(x));
  check_addressable(kOp, {spec.n, spec.k});
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  const Tensor y = empty({spec.n, spec.k});
  if (spec.n > 0) {
    const Map rows = as_rows(x);
    const Tensor plain = torch::stable::contiguous(centers);
    spec.ldx = rows.ld;
    fb::Pointers pointers;
    pointers.x = rows.data;
    pointers.weight = floats(plain);
    pointers.y = mutable_floats(y);
    fb::run_op(spec, pointers, 0);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("squared_distances", TORCH_BOX(&squared_distances)); }

// The door of l2_normalize: y = x / max(||x||, eps), the length taken over the channels of every pixel.
#include "door.h"

namespace {

using namespace fb::door;

Tensor l2_normalize(const Tensor& x, double eps) {
  constexpr const char* kOp = "l2_normalize";
  check_tensor(kOp, "x", x, 4);
  fb::OpSpec spec = map_spec(kOp, x);
  spec.eps = eps;
  return run_map(spec, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("l2_normalize", TORCH_BOX(&l2_normalize)); }

// The door of local_response_norm: y = x / (k + alpha / size * sum of x^2 over neighbouring channels)^beta.
#include "door.h"

namespace {

using namespace fb::door;

Tensor local_response_norm(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  constexpr const char* kOp = "local_response_norm";
  check_tensor(kOp, "x", x, 4);
  fb::OpSpec spec = map_spec(kOp, x);
  spec.size = size;
  spec.alpha = alpha;
  spec.beta = beta;
  spec.offset = k;
  return run_map(spec, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("local_response_norm", TORCH_BOX(&local_response_norm)); }

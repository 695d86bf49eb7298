// The door of max_pool2d: y[n, c, p, q] = max over the window; padding counts as minus infinity, NaN wins.
#include "door.h"

namespace {

using namespace fb::door;

Tensor max_pool2d(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode) {
  return run_pool(pool_spec("max_pool2d", x, kernel_size, stride, padding, ceil_mode), x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }

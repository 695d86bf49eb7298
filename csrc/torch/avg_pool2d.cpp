// The door of avg_pool2d: y[n, c, p, q] = sum over the window / its size, with torch's rules for windows that leave the image.
#include "door.h"

namespace {

using namespace fb::door;

Tensor avg_pool2d(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode,
                  bool count_include_pad) {
  fb::OpSpec spec = pool_spec("avg_pool2d", x, kernel_size, stride, padding, ceil_mode);
  spec.count_include_pad = count_include_pad;
  return run_pool(spec, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("avg_pool2d", TORCH_BOX(&avg_pool2d)); }

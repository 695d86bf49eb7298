// The door of linear: y[n, k] = act( sum_c x[n, c] weight[k, c] + bias[k] ).
#include "door.h"

namespace {

using namespace fb::door;

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::string& activation) {
  constexpr const char* kOp = "linear";
  check_tensor(kOp, "x", x, 2);
  check_tensor(kOp, "weight", weight, 2);
  fb::OpSpec spec;
  spec.kind = kOp;
  spec.n = x.size(0);
  spec.c = x.size(1);
  spec.k = weight.size(0);
  spec.activation = check_activation(kOp, activation);
  check(spec.c >= 1 && spec.k >= 1 && weight.size(1) == spec.c, kOp, ": weight ", sizes_text(weight),
        " does not fit x ", sizes_text(x));
  check_addressable(kOp, {spec.n, spec.k});
  if (bias) {
    check_tensor(kOp, "bias", *bias, 1);
    check(bias->size(0) == spec.k, kOp, ": bias has sizes ", sizes_text(*bias), ", expected [", spec.k, "]");
  }
  if (const std::string reason = fb::refusal(spec); !reason.empty()) check(false, kOp, ": ", reason);
  const Tensor y = empty({spec.n, spec.k});
  if (spec.n > 0) {
    const Map rows = as_rows(x);
    const Tensor plain_weight = torch::stable::contiguous(weight);
    const Tensor packed = empty({fb::packed_floats(spec)});
    fb::pack_weight(spec, floats(plain_weight), mutable_floats(packed));
    spec.ldx = rows.ld;
    std::optional<Tensor> plain_bias;  // keeps a converted copy alive
    fb::Pointers pointers;
    pointers.x = rows.data;
    pointers.weight = floats(packed);
    if (bias) {
      plain_bias = torch::stable::contiguous(*bias);
      pointers.bias = floats(*plain_bias);
    }
    pointers.y = mutable_floats(y);
    fb::run_op(spec, pointers, 0);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

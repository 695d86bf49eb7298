// The door of squeeze_excite: y[n, c] = x[n, c] * sigmoid(weight2 relu(weight1 mean(x[n]) + bias1) + bias2)[c].
#include "door.h"

namespace {

using namespace fb::door;

// y = act(x weight^T + bias), x and y dense.
void layer(const float* x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t n, fb::Activation activation,
           float* y) {
  fb::OpSpec spec;
  spec.kind = "linear";
  spec.n = n;
  spec.c = weight.size(1);
  spec.k = weight.size(0);
  spec.activation = activation;
  const Tensor plain = torch::stable::contiguous(weight), packed = empty({fb::packed_floats(spec)});
  fb::pack_weight(spec, floats(plain), mutable_floats(packed));
  std::optional<Tensor> plain_bias;  // keeps a converted copy alive
  fb::Pointers pointers;
  pointers.x = x;
  pointers.weight = floats(packed);
  if (bias) {
    plain_bias = torch::stable::contiguous(*bias);
    pointers.bias = floats(*plain_bias);
  }
  pointers.y = y;
  fb::run_op(spec, pointers, 0);
}

void check_layer(const char* op, const char* name, const Tensor& weight, const char* bias_name,
                 const std::optional<Tensor>& bias, int64_t inputs) {
  check_tensor(op, name, weight, 2);
  check(weight.size(0) >= 1 && weight.size(1) == inputs, op, ": ", name, " has sizes ", sizes_text(weight),
        ", expected [any, ", inputs, "]");
  if (!bias) return;
  check_tensor(op, bias_name, *bias, 1);
  check(bias->size(0) == weight.size(0), op, ": ", bias_name, " has sizes ", sizes_text(*bias), ", expected [",
        weight.size(0), "]");
}

Tensor squeeze_excite(const Tensor& x, const Tensor& weight1, const std::optional<Tensor>& bias1, const Tensor& weight2,
                      const std::optional<Tensor>& bias2) {
  constexpr const char* kOp = "squeeze_excite";
  check_tensor(kOp, "x", x, 4);
  fb::OpSpec spec = map_spec("affine", x);
  spec.gated = 1;
  check(spec.c >= 1 && spec.h >= 1 && spec.w >= 1, kOp, ": x has sizes ", sizes_text(x),
        ", only the batch may be empty");
  check_layer(kOp, "weight1", weight1, "bias1", bias1, spec.c);
  check_layer(kOp, "weight2", weight2, "bias2", bias2, weight1.size(0));
  check(weight2.size(0) == spec.c, kOp, ": weight2 has sizes ", sizes_text(weight2), ", expected [", spec.c, ", ",
        weight1.size(0), "]");
  const Output output({spec.n, spec.c, spec.h, spec.w}, suggests_channels_last(x));
  if (spec.n == 0) return output.finish();
  const Map image = as_nhwc(x);
  spec.ldx = image.ld;
  const Tensor means = empty({spec.n, spec.c}), hidden = empty({spec.n, weight1.size(0)}), gate = empty({spec.n, spec.c});
  fb::OpSpec pool = spec;
  pool.kind = "global_avg_pool";
  pool.gated = 0;
  fb::Pointers pointers;
  pointers.x = image.data;
  pointers.y = mutable_floats(means);
  fb::run_op(pool, pointers, 0);
  layer(floats(means), weight1, bias1, spec.n, fb::kRelu, mutable_floats(hidden));
  layer(floats(hidden), weight2, bias2, spec.n, fb::kSigmoid, mutable_floats(gate));
  pointers.gate = floats(gate);
  pointers.y = output.data();
  fb::run_op(spec, pointers, 0);
  return output.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) { m.impl("squeeze_excite", TORCH_BOX(&squeeze_excite)); }

// The doors of softmax_cross_entropy and of its gradient: loss = -sum_k q'[k] log softmax(logits)[k] of rows, q' smoothed targets.
#include "cpu/softmax_cross_entropy/softmax_cross_entropy.h"

#include <tuple>

#include "door.h"

namespace {

using namespace fb::door;
using fb::softmax_cross_entropy::kRowFloats;
using fb::softmax_cross_entropy::Problem;
using fb::softmax_cross_entropy::Reduction;

Reduction check_reduction(const char* op, const std::string& reduction) {
  if (reduction == "none") return Reduction::none;
  if (reduction == "sum") return Reduction::sum;
  check(reduction == "mean", op, ": reduction is \"", reduction, "\", expected \"none\", \"sum\" or \"mean\"");
  return Reduction::mean;
}

// The rows of a call; converted copies live as long as this.
struct Rows {
  Map logits{};
  Tensor target;
  std::optional<Tensor> weight;
  Problem problem{};

  Rows(const char* op, const Tensor& x, const Tensor& labels, const std::optional<Tensor>& weights, double label_smoothing,
       int64_t ignore_index, const std::string& reduction)
      : target(labels) {
    check_tensor(op, "logits", x, 2);
    problem.rows = x.size(0);
    problem.classes = x.size(1);
    check(problem.classes >= 1, op, ": logits have sizes ", sizes_text(x), ", expected at least one class");
    check(labels.is_cpu() && labels.scalar_type() == torch::headeronly::ScalarType::Long, op, ": target must be int64 on the CPU");
    check(labels.dim() == 1 && labels.size(0) == problem.rows, op, ": target has sizes ", sizes_text(labels), ", expected [",
          problem.rows, "]");
    check(label_smoothing >= 0.0 && label_smoothing <= 1.0, op, ": label_smoothing is ", label_smoothing, ", expected 0 to 1");
    if (!target.is_contiguous()) target = torch::stable::contiguous(labels);
    if (weights) {
      check_tensor(op, "weight", *weights, 1);
      check(weights->size(0) == problem.classes, op, ": weight has sizes ", sizes_text(*weights), ", expected [", problem.classes, "]");
      weight = torch::stable::contiguous(*weights);
      problem.weight = floats(*weight);
    }
    logits = as_rows(x);
    problem.logits = logits.data;
    problem.ld = logits.ld;
    problem.target = static_cast<const int64_t*>(target.const_data_ptr());
    problem.smoothing = label_smoothing;
    problem.ignore_index = ignore_index;
    problem.reduction = check_reduction(op, reduction);
    const int64_t wrong = fb::softmax_cross_entropy::wrong_row(problem);
    if (wrong >= 0)
      check(false, op, ": target ", problem.target[wrong], " is not a class from 0 to ", problem.classes - 1, " (row ", wrong, ")");
  }
};

std::tuple<Tensor, Tensor> softmax_cross_entropy(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                                 double label_smoothing, int64_t ignore_index, const std::string& reduction) {
  const Rows rows("softmax_cross_entropy", logits, target, weight, label_smoothing, ignore_index, reduction);
  const Problem& problem = rows.problem;
  const Tensor loss = empty(problem.reduction == Reduction::none ? Ints{problem.rows} : Ints{});
  const Tensor kept = empty({problem.rows, kRowFloats});
  fb::softmax_cross_entropy::forward(problem, mutable_floats(kept), mutable_floats(loss));
  return {loss, kept};
}

Tensor softmax_cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                      const std::optional<Tensor>& weight, const Tensor& kept, double label_smoothing,
                                      int64_t ignore_index, const std::string& reduction) {
  constexpr const char* kOp = "softmax_cross_entropy_backward";
  const Rows rows(kOp, logits, target, weight, label_smoothing, ignore_index, reduction);
  const Problem& problem = rows.problem;
  const bool reduced = problem.reduction != Reduction::none;
  check_tensor(kOp, "grad", grad, reduced ? 0 : 1);
  check(reduced || grad.size(0) == problem.rows, kOp, ": grad has sizes ", sizes_text(grad), ", expected [", problem.rows, "]");
  check_tensor(kOp, "kept", kept, 2);
  check(kept.size(0) == problem.rows && kept.size(1) == kRowFloats && kept.is_contiguous(), kOp, ": kept has sizes ",
        sizes_text(kept), ", expected [", problem.rows, ", ", kRowFloats, "] in one piece");
  const Tensor y = empty({problem.rows, problem.classes});
  const int64_t grad_stride = reduced || problem.rows == 0 ? 0 : grad.stride(0);
  fb::softmax_cross_entropy::backward(problem, floats(kept), floats(grad), grad_stride, mutable_floats(y));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&softmax_cross_entropy));
  m.impl("softmax_cross_entropy_backward", TORCH_BOX(&softmax_cross_entropy_backward));
}

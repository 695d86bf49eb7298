// Cross entropy against smoothed targets over rows, forward and backward.
//
// The kernels sum over classes; what is done once a row is done here, in double. From log S, S = sum_k exp(x[k] - max):
//
//   loss = (1 - eps) w[y] (log S - (x[y] - max)) + eps / K ((sum_k w[k]) log S - sum_k w[k] (x[k] - max))
//
// task = a run of rows. Sums over rows go in their order, whoever computed them.
#include "softmax_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../ops.h"

namespace fb::softmax_cross_entropy {

namespace {

constexpr int64_t kTaskFloats = 1 << 13;

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

// Shares of the target: own[y] (1 - eps) w[y], even eps / K, all their sum without weights.
class Shares {
 public:
  explicit Shares(const Problem& problem)
      : problem_(problem), even_(problem.smoothing / static_cast<double>(problem.classes)), weights_(static_cast<double>(problem.classes)) {
    if (problem.weight == nullptr || problem.smoothing == 0.0) return;  // nothing is spread: no weight but the label's counts
    weights_ = 0.0;
    for (int64_t k = 0; k < problem.classes; ++k) weights_ += problem.weight[k];
  }

  bool ignored(int64_t row) const { return problem_.target[row] == problem_.ignore_index; }
  int64_t label(int64_t row) const { return ignored(row) ? 0 : problem_.target[row]; }
  double weight(int64_t k) const { return problem_.weight != nullptr ? problem_.weight[k] : 1.0; }
  double weights() const { return weights_; }  // sum_k w[k]
  double even() const { return even_; }        // times w[k]
  double own(int64_t label) const { return (1.0 - problem_.smoothing) * weight(label); }
  double all(int64_t label) const { return own(label) + even_ * weights_; }  // sum_k q'[k]

  double counted() const {  // what the mean divides by
    double count = 0.0;
    for (int64_t row = 0; row < problem_.rows; ++row)
      if (!ignored(row)) count += weight(problem_.target[row]);
    return count;
  }

 private:
  const Problem& problem_;
  double even_, weights_;
};

void for_rows(const Problem& problem, const std::function<void(int64_t)>& body) {
  const int64_t rows = std::max<int64_t>(1, kTaskFloats / problem.classes);
  parallel_for(ceil_div(problem.rows, rows), problem.rows * problem.classes, [&](int64_t task) {
    const int64_t end = std::min(problem.rows, (task + 1) * rows);
    for (int64_t row = task * rows; row < end; ++row) body(row);
  });
}

double row_loss(const Problem& problem, const Shares& shares, int64_t row, float* kept) {
  const float* x = problem.logits + row * problem.ld;
  const bool smoothed = problem.smoothing > 0.0;
  const Sums sums = kernels().sums(x, smoothed ? problem.weight : nullptr, problem.classes);
  kept[0] = sums.max;
  kept[1] = static_cast<float>(sums.exponential);
  if (shares.ignored(row)) return 0.0;
  const int64_t label = shares.label(row);
  const double log_sum = std::log(sums.exponential);
  const float distance = x[label] - sums.max;  // -inf where the float overflows, as in the sums
  const double loss = shares.own(label) * (log_sum - distance);
  return smoothed ? loss + shares.even() * (shares.weights() * log_sum - sums.distance) : loss;
}

}  // namespace

int64_t wrong_row(const Problem& problem) {
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t label = problem.target[row];
    if (label != problem.ignore_index && (label < 0 || label >= problem.classes)) return row;
  }
  return -1;
}

void forward(const Problem& problem, float* kept, float* loss) {
  const Shares shares(problem);
  std::vector<double> losses(static_cast<size_t>(problem.rows));
  for_rows(problem, [&](int64_t row) { losses[row] = row_loss(problem, shares, row, kept + row * kRowFloats); });
  if (problem.reduction == Reduction::none) {
    for (int64_t row = 0; row < problem.rows; ++row) loss[row] = static_cast<float>(losses[row]);
    return;
  }
  double sum = 0.0;
  for (const double one : losses) sum += one;
  *loss = static_cast<float>(problem.reduction == Reduction::mean ? sum / shares.counted() : sum);
}

void backward(const Problem& problem, const float* kept, const float* grad, int64_t grad_stride, float* y) {
  const Shares shares(problem);
  const double count = problem.reduction == Reduction::mean ? shares.counted() : 1.0;
  for_rows(problem, [&](int64_t row) {
    const int64_t label = shares.label(row);
    const double upstream = problem.reduction == Reduction::none ? grad[row * grad_stride] : *grad / count;
    const double g = shares.ignored(row) ? 0.0 : upstream;
    Gradient t{};
    t.x = problem.logits + row * problem.ld;
    t.weight = problem.smoothing > 0.0 ? problem.weight : nullptr;
    t.classes = problem.classes;
    t.label = label;
    t.max = kept[row * kRowFloats];
    t.scale = static_cast<float>(g * shares.all(label) / kept[row * kRowFloats + 1]);
    t.even = static_cast<float>(g * shares.even());
    t.own = static_cast<float>(g * (shares.own(label) + shares.even() * shares.weight(label)));
    t.y = y + row * problem.classes;
    kernels().gradient(t);
  });
}

}  // namespace fb::softmax_cross_entropy

// Squared distances of rows to centres: y[i, k] = sum_c (x[i, c] - weight[k, c])^2, weight [K, C] as it is.
//
// Differences, squares and sums are double and rounded once. task = (run of rows, run of centres).
#include <algorithm>

#include "../ops.h"
#include "../sum_in_double.h"

namespace fb {

namespace squared_distances {

namespace {

constexpr int64_t kTaskTerms = 1 << 14;

class SquaredDistances final : public Op {
 public:
  explicit SquaredDistances(const OpSpec& spec) : Op(spec) {
    centres_per_task_ = std::clamp<int64_t>(kTaskTerms / spec.c, 1, spec.k);
    rows_per_task_ = std::clamp<int64_t>(kTaskTerms / (spec.c * centres_per_task_), 1, spec.n);
    split_ = ceil_div(spec.k, centres_per_task_);
  }

  int64_t tasks() const override { return ceil_div(spec_.n, rows_per_task_) * split_; }

  void run(int64_t task, const Pointers& x, const Worker&) const override {
    const Range rows = input_pixels(task);
    const int64_t first = task % split_ * centres_per_task_, end = std::min(first + centres_per_task_, spec_.k);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t k = first; k < end; ++k) x.y[row * spec_.ldy + k] = distance(x.x + row * spec_.ldx, x.weight + k * spec_.c);
  }

  Range input_pixels(int64_t task) const override {
    const int64_t first = task / split_ * rows_per_task_;
    return {first, std::min(first + rows_per_task_, spec_.n)};
  }
  Range tasks_writing(Range rows) const override {
    if (rows.begin >= rows.end) return {0, 0};
    return {rows.begin / rows_per_task_ * split_, ((rows.end - 1) / rows_per_task_ + 1) * split_};
  }

 private:
  float distance(const float* x, const float* centre) const {
    return static_cast<float>(sum_in_double(spec_.c, [x, centre](int64_t c) {
      const double apart = static_cast<double>(x[c]) - static_cast<double>(centre[c]);
      return apart * apart;
    }));
  }

  int64_t centres_per_task_ = 1, rows_per_task_ = 1, split_ = 1;
};

}  // namespace

}  // namespace squared_distances

std::unique_ptr<Op> make_squared_distances(const OpSpec& spec) { return std::make_unique<squared_distances::SquaredDistances>(spec); }

std::string squared_distances_refusal(const OpSpec& spec) {
  return spec.h == 1 && spec.w == 1 ? "" : "squared_distances has no spatial sizes";
}

}  // namespace fb

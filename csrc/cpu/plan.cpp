#include "plan.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "ops.h"

namespace fb {

class Plan::Shared {
 public:
  explicit Shared(const Plan& plan) : plan_(plan) {
    const int64_t floats = plan.shared_[0] + plan.shared_[1];
    if (floats == 0) return;
    {
      const std::lock_guard<std::mutex> lock(plan.mutex_);
      if (!plan.free_shared_.empty()) {
        memory_ = std::move(plan.free_shared_.back());
        plan.free_shared_.pop_back();
      }
    }
    if (!memory_) memory_ = std::make_unique<AlignedFloats>();
    data_ = memory_->reserve(floats);
    poison(data_, floats);
  }
  ~Shared() {
    if (!memory_) return;
    const std::lock_guard<std::mutex> lock(plan_.mutex_);
    plan_.free_shared_.push_back(std::move(memory_));
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  float* data() const { return data_; }

 private:
  const Plan& plan_;
  std::unique_ptr<AlignedFloats> memory_;
  float* data_ = nullptr;
};

int Plan::add(const OpSpec& spec, const Operands& operands, std::vector<Dependency> dependencies, const std::string& name) {
  if (finished_) throw std::logic_error("Plan.add after Plan.finish");
  for (const Dependency& dependency : dependencies)
    if (dependency.step < 0 || dependency.step >= static_cast<int>(size()))
      throw std::invalid_argument("Plan.add: dependency on step " + std::to_string(dependency.step) + ", which is not an earlier step");
  if ((operands.scale.slot >= 0 || operands.scale.offset != 0) && spec.bf16 == 0)
    throw std::invalid_argument("Plan.add: a scale, which float32 kernels have folded into their weights");
  for (const Place& place : operands.all()) externals_ = std::max(externals_, place.slot);
  std::shared_ptr<const Op> op = make_op(spec);
  int half = -1;
  if (op->shared_floats() > 0) {
    half = next_half_;
    next_half_ = 1 - next_half_;
    shared_[half] = std::max(shared_[half], round_up(op->shared_floats(), 16));
    if (last_user_[half] >= 0) dependencies.push_back({last_user_[half], Wait::whole});
    last_user_[half] = static_cast<int>(size());
  }
  shared_half_.push_back(half);
  weight_floats_.push_back(operands.weight.offset != 0 ? packed_floats(spec) : 0);
  operands_.push_back(operands);
  names_.push_back(name);
  return list_.add(std::move(op), std::move(dependencies));
}

void Plan::finish() { finished_ = true; }

std::vector<Pointers> Plan::bind(void* arena, const std::vector<void*>& externals, float* shared) const {
  if (!finished_) throw std::logic_error("Plan.run before Plan.finish");
  if (static_cast<int>(externals.size()) < externals_)
    throw std::invalid_argument("Plan.run: got " + std::to_string(externals.size()) + " external tensors, expected " + std::to_string(externals_));
  const auto address = [&](const Place& place) -> float* {
    if (place.slot < 0) return reinterpret_cast<float*>(place.offset);
    void* base = place.slot == 0 ? arena : externals[static_cast<size_t>(place.slot - 1)];
    return reinterpret_cast<float*>(static_cast<char*>(base) + place.offset);
  };
  std::vector<Pointers> pointers(operands_.size());
  for (size_t i = 0; i < operands_.size(); ++i) {
    const Operands& o = operands_[i];
    Pointers& p = pointers[i];
    p.x = address(o.x);
    p.weight = address(o.weight);
    p.scale = address(o.scale);
    p.bias = address(o.bias);
    p.residual = address(o.residual);
    p.gate = address(o.gate);
    p.pre_scale = address(o.pre_scale);
    p.pre_shift = address(o.pre_shift);
    p.depth_weight = address(o.depth_weight);
    p.depth_bias = address(o.depth_bias);
    p.y = address(o.y);
    p.shared = shared_half_[i] < 0 ? nullptr : shared + (shared_half_[i] == 0 ? 0 : shared_[0]);
  }
  for (size_t i = pointers.size(); i-- > 1;) {  // a step without weights passes on what it is told
    const int64_t floats = weight_floats_[i];
    pointers[i - 1].next_weight = floats > 0 ? pointers[i].weight : pointers[i].next_weight;
    pointers[i - 1].next_weight_floats = floats > 0 ? floats : pointers[i].next_weight_floats;
    pointers[i - 1].next_weight_in_parts = floats > 0 ? list_.steps()[i].op->weights_in_parts() : pointers[i].next_weight_in_parts;
  }
  return pointers;
}

bool Plan::run(void* arena, const std::vector<void*>& externals, int threads, const std::function<bool()>& check) const {
  const Shared shared(*this);
  return list_.run(bind(arena, externals, shared.data()), threads, -1, check);
}

std::vector<StepTime> Plan::profile(void* arena, const std::vector<void*>& externals, int repeats, int threads) const {
  const Shared shared(*this);
  const std::vector<Pointers> pointers = bind(arena, externals, shared.data());
  std::vector<std::vector<double>> seconds(size());
  for (int repeat = 0; repeat < std::max(1, repeats); ++repeat) {
    for (size_t i = 0; i < size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      list_.run(pointers, threads, static_cast<int>(i));
      seconds[i].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
  }
  std::vector<StepTime> out;
  for (size_t i = 0; i < size(); ++i) {
    StepTime time = facts(static_cast<int>(i));
    std::sort(seconds[i].begin(), seconds[i].end());
    time.seconds = seconds[i][seconds[i].size() / 2];
    out.push_back(time);
  }
  return out;
}

StepTime Plan::facts(int step) const {
  const size_t i = static_cast<size_t>(step);
  const Op& op = *list_.steps().at(i).op;
  StepTime time;
  time.name = names_[i];
  time.kind = op.spec().kind;
  time.detail = op.detail();
  time.flops = op.flops();
  time.bytes = op.bytes();
  const Place& residual = operands_[i].residual;
  if (residual.slot >= 0 || residual.offset != 0) time.bytes += 4.0 * static_cast<double>(op.spec().n * op.spec().p() * op.spec().q() * op.spec().k);
  time.tasks = op.tasks();
  return time;
}

}  // namespace fb

// A network as a list of steps over one arena: what the Python engine lowers a plan to. Immutable after finish(), so that
// several threads can run it at once, each with its own arena.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "runner.h"

namespace fb {

// slot -1: an absolute address; 0: the arena; 1, 2, ...: external tensors given at run time.
struct Place {
  int slot = -1;
  int64_t offset = 0;  // bytes, or the address itself; {-1, 0} is null
};

struct Operands {
  Place x, weight, scale, bias, residual, gate, pre_scale, pre_shift, depth_weight, depth_bias, y;

  std::array<Place, 11> all() const { return {x, weight, scale, bias, residual, gate, pre_scale, pre_shift, depth_weight, depth_bias, y}; }
};

struct StepTime {
  std::string name, kind, detail;
  double seconds = 0, flops = 0, bytes = 0;
  int64_t tasks = 0;
};

class Plan {
 public:
  int add(const OpSpec& spec, const Operands& operands, std::vector<Dependency> dependencies, const std::string& name);
  void finish();

  int64_t team(int threads) const { return list_.team(threads); }

  // externals[i] is slot i + 1. threads 0: the host library's number. check: see TaskList::run.
  bool run(void* arena, const std::vector<void*>& externals, int threads, const std::function<bool()>& check = nullptr) const;
  std::vector<StepTime> profile(void* arena, const std::vector<void*>& externals, int repeats, int threads) const;  // median of each step alone

  int64_t scratch_bytes() const { return list_.scratch_floats() * 4; }
  int64_t shared_bytes() const { return (shared_[0] + shared_[1]) * 4; }
  StepTime facts(int step) const;
  size_t size() const { return list_.steps().size(); }

 private:
  class Shared;  // shared memory borrowed for one call

  std::vector<Pointers> bind(void* arena, const std::vector<void*>& externals, float* shared) const;

  TaskList list_;
  std::vector<Operands> operands_;
  std::vector<std::string> names_;
  std::vector<int64_t> weight_floats_;     // packed; 0: the step has no weights
  std::vector<int> shared_half_;           // -1: the step needs no shared memory
  std::array<int64_t, 2> shared_{0, 0};    // floats; steps that need any take the halves in turn
  std::array<int, 2> last_user_{-1, -1};
  int next_half_ = 0;
  int externals_ = 0;
  bool finished_ = false;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<AlignedFloats>> free_shared_;
};

double peak_gflops(double seconds, int threads, bool bf16 = false);  // of fma, or of products of bfloat16 pairs
double copy_gbps(double seconds, int threads);
double round_trip_ns(double seconds);

}  // namespace fb

// Runs a list of ops on several threads without barriers.
//
// All tasks of all steps stand in one queue, in step order. A thread takes the next ticket, waits until what the task needs is
// finished, and runs it. Because tickets are handed out in order and every earlier ticket is held by a thread that is running,
// the wait always ends, with any number of threads, one included. A step can start while the last tasks of the previous one
// still run, as far as the rows it reads are done; so there is one parallel region for a whole network and no idle tail per step.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "op.h"

namespace fb {

enum class Wait { whole = 0, input_rows = 1, residual_rows = 2 };

struct Dependency {
  int step;
  Wait wait;
};

struct Step {
  std::shared_ptr<const Op> op;
  std::vector<Dependency> dependencies;
  int64_t first_ticket = 0;
};

// Fills memory that a kernel must write before it reads with NaN, when the environment says FB_POISON=1 (tests).
void poison(float* data, int64_t count);

class TaskList {
 public:
  int add(std::shared_ptr<const Op> op, std::vector<Dependency> dependencies);
  const std::vector<Step>& steps() const { return steps_; }
  int64_t tickets() const { return tickets_; }
  int64_t scratch_floats() const { return scratch_floats_; }

  // pointers[i] belongs to step i. Re-entrant: all state of a run is local to the call. With only >= 0, runs that step alone.
  // `check` runs on the calling thread first, while the other threads already compute; when it returns false the rest is left out,
  // and the result is false.
  bool run(const std::vector<Pointers>& pointers, int threads, int only = -1, const std::function<bool()>& check = nullptr) const;

 private:
  std::vector<Step> steps_;
  int64_t tickets_ = 0;
  int64_t scratch_floats_ = 0;
};

}  // namespace fb

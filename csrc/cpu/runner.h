// Runs a list of ops on several threads without barriers, and keeps each thread at its own part of the image.
//
// The tasks of a step are cut into as many runs of consecutive tasks as there are threads. A thread takes those of its own run from the
// front, then helps the others from the back, and goes on to the next step when every task has been taken. Tasks are numbered along
// the rows of the output, so in step after step a thread reads what it wrote itself. That matters where cores do not share a cache: two
// virtual CPUs that sit on different core complexes pay 400 ns instead of 100 for a cache line, and queues that hand out tasks in
// turn were 6 (batch 1) to 12 % (batch 16) slower there. Flags and counters are kept by run for the same reason.
//
// Before it runs a task, a thread waits until what that task needs is finished. The wait always ends, with any number of threads,
// one included: everything that a task needs belongs to earlier steps, and when a thread has come to a step, all tasks of the earlier
// ones are held by threads that are running. A step can start while the last tasks of the previous one still run, as far as the
// rows it reads are done; so there is one parallel region for a whole network and no idle tail per step.
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

  // How many threads a run of all steps, or of the step `only`, uses of `threads` or, if that is 0, of the host library's number.
  int64_t team(int threads, int only = -1) const;

  // pointers[i] belongs to step i. Re-entrant: all state of a run is local to the call. With only >= 0, runs that step alone.
  // `check` runs on the calling thread first, while the other threads already compute; when it returns false the rest is left out,
  // and the result is false.
  bool run(const std::vector<Pointers>& pointers, int threads, int only = -1, const std::function<bool()>& check = nullptr) const;

 private:
  std::vector<Step> steps_;
  int64_t tickets_ = 0, most_tasks_ = 0;  // of all steps, of the step with the most
  int64_t scratch_floats_ = 0;
};

}  // namespace fb
